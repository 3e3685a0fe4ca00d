"""`python -m lm bench`"""

import argparse

from lm import terminal
from lm.commands import flags

HELP = "Time a training step against the matmul rate, or reading weights against a plain read."
OUT_OF_MEMORY = (
    "Use more micro-batches (--set places.PLACE.microbatches=8), remat (--set "
    "places.PLACE.remat=block), a shorter batch.length, or more devices with --mesh"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of bench."""
    parser.add_argument(
        "what", choices=("step", "import"), help="a training step, or reading weights"
    )
    parser.add_argument(
        "target",
        help="of step, a module (experiments.bench_llama) or a run folder; of import, a Hugging "
        "Face folder",
    )
    flags.add_declaration(parser)
    parser.add_argument("--steps", type=flags.whole(), default=20, help="timed steps (default: 20)")
    flags.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Prints the measurements as a table or as JSON."""
    from lm.commands import measure
    from lm.parallel import distributed

    mesh = flags.mesh(options)
    if options.what == "import":
        distributed.initialize()
        reading = measure.reading(options.target, mesh=mesh)
        print(terminal.json_text(reading) if options.json else measure.reading_text(reading))
        return
    experiment = flags.change(measure.find(options.target), options.set)
    step = measure.step(experiment, on=options.on, mesh=mesh, steps=options.steps)
    print(terminal.json_text(step) if options.json else measure.step_text(step))
