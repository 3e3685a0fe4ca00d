"""`python -m lm eval`"""

import argparse
import dataclasses

from lm import terminal
from lm.commands import flags

HELP = "Measure loss, perplexity and bits per byte on held-out or other text."
OUT_OF_MEMORY = "Use a shorter --context, or shard the model over more devices with --mesh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of eval."""
    flags.add_run(parser)
    parser.add_argument(
        "--data",
        help="a file or glob of text, .jsonl, .csv or .parquet (default: the run's held-out text)",
    )
    flags.add_context(parser, "tokens of a sequence (default: as trained)")
    flags.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Prints the results as a table or as JSON."""
    loaded = flags.open_run(options)
    results = loaded.evaluate(options.data, context=options.context)
    if options.json:
        records = [dataclasses.asdict(result) for result in results]
        print(
            terminal.json_text({"run": str(options.run), "step": loaded.step, "results": records})
        )
        return
    rows = [
        (r.name, f"{r.value:.4f}", "" if r.stderr is None else f"{r.stderr:.4f}", f"{r.count:,}")
        for r in results
    ]
    print(terminal.table(("measure", "value", "standard error", "tokens"), rows))
