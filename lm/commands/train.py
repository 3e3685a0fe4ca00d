"""`python -m experiments.NAME [train]`"""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any

from lm.commands import flags, memory
from lm.errors import UserError

HELP = "Train, or resume where training stopped."
OUT_OF_MEMORY = (
    "Use more micro-batches (gradient accumulation: --set places.PLACE.microbatches=8), remat "
    "(activation checkpointing: --set places.PLACE.remat=block), a shorter batch.length, or more "
    "devices"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of train."""
    flags.add_declaration(parser)
    parser.add_argument(
        "--workdir", default="runs", help="folder or bucket of the run folders (default: runs)"
    )


def run(declare: Callable[[], Any], options: argparse.Namespace) -> None:
    """Trains. Exits with 128 + signal if a signal stopped the run after saving."""
    from lm.parallel import distributed
    from lm.run import train

    distributed.initialize()
    declared = flags.declared(declare, options)
    mesh = flags.mesh(options)
    _check_workdir(options.workdir)
    new = [folder for folder in _folders(declared, options.workdir) if not folder.exists()]
    try:
        trained = train(declared, on=options.on, mesh=mesh, workdir=options.workdir)
    except Exception as error:
        if distributed.is_main():
            _remove_untrained(new)
        if words := memory.sentence(error):
            advice = OUT_OF_MEMORY.replace("places.PLACE", _place(declared, options.on, mesh))
            raise UserError(f"{words} {advice}.") from None
        raise
    if trained.stopped is not None:
        sys.exit(128 + signal.Signals[trained.stopped])


def _place(declared: Any, on: str | None, mesh: Any) -> str:
    """The path of the place that is trained at, as --set takes it."""
    from lm.parallel.mesh import choose
    from lm.recipe import Recipe

    if isinstance(declared, Recipe):
        return f"STAGE.places.{on or 'PLACE'}"
    return f"places.{choose(declared.places, on, mesh)[0]}"


def _check_workdir(workdir: str) -> None:
    """Raises UserError if run folders cannot be made in `workdir`."""
    if "://" in workdir:
        return
    from lm.data import check_can_be_made

    try:
        check_can_be_made(workdir)
    except UserError as error:
        raise UserError(f"--workdir={workdir}: {error}") from None


def _folders(declared: Any, workdir: str) -> list[Any]:
    """The run folders of an experiment, or of the stages of a recipe; none in a bucket."""
    from etils import epath

    from lm.recipe import Recipe

    if "://" in workdir:
        return []
    folder = epath.Path(workdir) / declared.name
    if isinstance(declared, Recipe):
        return [folder / stage.name for stage in declared.stages]
    return [folder]


def _remove_untrained(folders: list[Any]) -> None:
    """Removes run folders in which no step was done: their declaration would bar a changed one of
    the same name."""
    from lm import checkpoint, training

    for folder in folders:
        if not folder.exists() or training.read_lines(folder / "metrics.jsonl"):
            continue
        if checkpoint.Store(folder / "checkpoints").latest() is None:
            folder.rmtree()
