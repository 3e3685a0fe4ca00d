"""`python -m experiments.NAME plan`"""

import argparse
from collections.abc import Callable
from typing import Any

from lm import terminal
from lm.commands import flags
from lm.errors import UserError

HELP = "Plan for a TPU slice without having it: memory, FLOPs, collectives, time, cost."
OUT_OF_MEMORY = "Compiling for a slice takes host memory; use --estimate, which does not compile"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of plan."""
    flags.add_declaration(parser)
    flags.add_json(parser)
    parser.add_argument(
        "--search", action="store_true", help="search meshes, micro-batches and remat for the slice"
    )
    parser.add_argument(
        "--weak", metavar="SLICES", help="weak scaling: constant work per chip on v5p-16,v5p-128"
    )
    parser.add_argument(
        "--estimate", action="store_true", help="from the declaration alone, without compiling"
    )
    parser.add_argument(
        "--serve", action="store_true", help="plan the generation engine instead of training"
    )
    flags.add_context(parser, "with --serve: tokens of each request (default: batch.length)")
    parser.add_argument(
        "--rows",
        metavar="N,N",
        type=_sizes,
        help="with --serve: numbers of requests in a step (default: 8,64,256)",
    )
    parser.add_argument(
        "--price", type=flags.positive, help="of a chip-hour, for the cost of the run"
    )


def run(declare: Callable[[], Any], options: argparse.Namespace) -> None:
    """Prints one plan, or one for each stage of a recipe."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine is not needed
    from lm.recipe import Recipe, stages_of

    declared = flags.declared(declare, options)
    plans = [_plan(stage, options) for stage in stages_of(declared)]
    if not isinstance(declared, Recipe):
        print(terminal.json_text(plans[0][0]) if options.json else plans[0][1])
    elif options.json:
        print(terminal.json_text([facts for facts, _ in plans]))
    else:
        texts = (text for _, text in plans)
        print(flags.under_headings(zip(stages_of(declared), texts, strict=True)))


def _plan(experiment: Any, options: argparse.Namespace) -> tuple[Any, str]:
    """(facts for JSON, text) of one experiment."""
    from lm import planning

    if options.serve:
        return _serving(experiment, options)
    mesh, compile = flags.mesh(options), not options.estimate
    for name in ("context", "rows"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is an option of --serve; add --serve, or leave it out.")
    if options.weak and (options.on or options.search):
        raise UserError("--weak names its slices itself; leave out --on and --search, or --weak.")
    if options.weak:
        rows = planning.scaling(experiment, options.weak.split(","), mesh, compile=compile)
        facts = [{**row.plan, "efficiency": row.efficiency} for row in rows]
        return facts, planning.scaling_text(rows)
    if not options.search:
        plan = planning.plan(
            experiment, options.on, mesh=mesh, price=options.price, compile=compile
        )
        return plan, planning.text(plan)
    if mesh is not None:
        raise UserError("--search chooses the mesh; leave out --mesh, or --search.")
    candidates = planning.search(experiment, options.on, compile=compile)
    facts = [{**each.plan, "code": each.code} for each in candidates]
    return facts, planning.search_text(candidates)


def _serving(experiment: Any, options: argparse.Namespace) -> tuple[Any, str]:
    """(facts for JSON, text) of the generation engine."""
    from lm import planning

    for name in ("search", "weak", "price"):
        if getattr(options, name):
            raise UserError(f"--{name} is not an option of --serve; leave out one of them.")
    plan = planning.serving(
        experiment,
        options.on,
        mesh=flags.mesh(options),
        context=options.context,
        **({"rows": options.rows} if options.rows else {}),
        compile=not options.estimate,
    )
    return plan, planning.serving_text(plan)


def _sizes(given: str) -> tuple[int, ...]:
    """'8,64' -> (8, 64)."""
    return tuple(map(flags.whole(), given.split(",")))
