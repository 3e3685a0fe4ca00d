"""`python -m lm bench`"""

import argparse
import os
from typing import Any

from lm import terminal
from lm.commands import flags
from lm.errors import UserError

HELP = "Time a training step, reading weights, or generation."
OUT_OF_MEMORY = (
    "Use more micro-batches (--set places.PLACE.microbatches=8), remat (--set "
    "places.PLACE.remat=block), a shorter batch.length, or more devices with --mesh"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of bench."""
    parser.add_argument(
        "what",
        choices=("step", "import", "serve"),
        help="a training step, reading weights, or the generation engine",
    )
    parser.add_argument(
        "target",
        help="of step, a module (experiments.bench_llama) or a run folder; of import, a Hugging "
        "Face folder; of serve, any of them, where a module gets random weights",
    )
    flags.add_declaration(parser)
    parser.add_argument("--steps", type=flags.whole(), default=20, help="timed steps (default: 20)")
    parser.add_argument("--requests", type=flags.whole(), default=64, help="of serve (default: 64)")
    parser.add_argument(
        "--rate",
        type=flags.positive,
        default=16.0,
        help="of serve: requests per second on average (default: 16)",
    )
    parser.add_argument(
        "--seed", type=flags.whole(0, 2**32), default=0, help="of serve (default: 0)"
    )
    flags.add_exact(parser)
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
    if options.what == "serve":
        distributed.initialize()
        _serve(options, mesh)
        return
    experiment = flags.change(measure.find(options.target), options.set)
    step = measure.step(experiment, on=options.on, mesh=mesh, steps=options.steps)
    print(terminal.json_text(step) if options.json else measure.step_text(step))


def _serve(options: argparse.Namespace, mesh: Any) -> None:
    from lm.commands import measure, measure_serving

    target = options.target
    if not os.path.isdir(target) and "://" not in target:
        target = flags.change(measure.find(target), options.set)
    elif options.set:
        raise UserError("--set changes the declaration of a module; a folder has its weights.")
    measured = measure_serving.serving(
        target,
        mesh=mesh,
        requests=options.requests,
        rate=options.rate,
        seed=options.seed,
        exact=options.exact,
    )
    text = measure_serving.serving_text
    print(terminal.json_text(measured) if options.json else text(measured))
