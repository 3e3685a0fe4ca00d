"""`python -m experiments.NAME show`"""

import argparse
from collections.abc import Callable
from typing import Any

from lm import terminal
from lm.commands import flags

HELP = "Print the resolved declaration, parameters, shardings and memory; compute nothing."
OUT_OF_MEMORY = "Choose a smaller model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of show."""
    flags.add_declaration(parser)
    flags.add_json(parser)


def run(declare: Callable[[], Any], options: argparse.Namespace) -> None:
    """Prints one summary, or one for each stage of a recipe."""
    from lm.parallel import distributed
    from lm.planning import show
    from lm.recipe import Recipe, stages_of

    distributed.initialize()
    declared = flags.declared(declare, options)
    mesh = flags.mesh(options)
    shown = [show.facts(stage, on=options.on, mesh=mesh) for stage in stages_of(declared)]
    if not isinstance(declared, Recipe):
        print(terminal.json_text(shown[0]) if options.json else show.text(shown[0]))
    elif options.json:
        print(terminal.json_text(shown))
    else:
        texts = map(show.text, shown)
        print(flags.under_headings(zip(stages_of(declared), texts, strict=True)))
