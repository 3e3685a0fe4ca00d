"""Options that several verbs share: their words, and the values that they stand for."""

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lm.errors import UserError

# Names that other frameworks use, and the paths of the same settings here.
SYNONYMS = {
    ("lr", "learning_rate"): "schedule.peak",
    ("steps", "max_steps", "num_steps", "max_iters"): "schedule.steps",
    ("warmup_steps", "warmup_iters"): "schedule.warmup",
    ("batch_size", "per_device_train_batch_size"): "batch.sequences",
    ("seq_len", "sequence_length", "max_seq_length", "block_size"): "batch.length",
    ("accumulation_steps", "gradient_accumulation_steps"): "places.PLACE.microbatches",
    ("gradient_checkpointing", "activation_checkpointing"): "places.PLACE.remat",
    ("grad_clip", "max_grad_norm"): "optimizer.clip_norm",
    ("vocab_size",): "model.vocab",
    ("hidden_size", "d_model", "n_embd"): "model.dim",
    ("num_layers", "num_hidden_layers", "n_layer"): "model.layers",
}


def add_declaration(parser: argparse.ArgumentParser) -> None:
    """--set, --on and --mesh."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a setting, as in model.layers=2; may be repeated",
    )
    parser.add_argument("--on", metavar="PLACE", help="one of the experiment's places")
    parser.add_argument("--mesh", help="devices per axis instead of the place's: data=2,fsdp=4")


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """--mesh, for a model that is read."""
    parser.add_argument("--mesh", help="devices to shard the model over, as in fsdp=2,tensor=4")


def add_run(parser: argparse.ArgumentParser) -> None:
    """The run folder to open, and how to open it."""
    parser.add_argument("run", help="a run folder or a Hugging Face folder")
    parser.add_argument(
        "--step", type=whole(0), help="step of the checkpoint (default: the newest)"
    )
    parser.add_argument(
        "--compute", metavar="DTYPE", help="float32 or bfloat16 arithmetic (default: as declared)"
    )
    add_mesh(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How the next token is drawn."""
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="divides the logits; 0 takes the likeliest token (default: 0.8)",
    )
    parser.add_argument("--top-k", type=whole(), help="sample from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, help="sample from the likeliest tokens of total probability P"
    )
    parser.add_argument(
        "--min-p", type=float, help="sample from tokens of at least P times the top probability"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1 makes tokens that occurred less likely (default: 1.0)",
    )
    parser.add_argument(
        "--seed", type=whole(0, 2**32), default=0, help="of the random choices (default: 0)"
    )


def sampling(options: argparse.Namespace) -> Any:
    """The Sampling of the options of `add_sampling`."""
    from lm.generate import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return Sampling(**{name: getattr(options, name) for name in names})


def add_context(parser: argparse.ArgumentParser, words: str) -> None:
    """--context."""
    parser.add_argument("--context", type=whole(), help=words)


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")


def whole(smallest: int = 1, below: float = math.inf) -> Callable[[str], int]:
    """`type=` of an option that is a whole number from `smallest` on."""

    def read(given: str) -> int:
        with contextlib.suppress(ValueError):
            if smallest <= int(given) < below:
                return int(given)
        upto = f"and below {below}" if below < math.inf else "or above"
        raise argparse.ArgumentTypeError(f"{given!r} must be a whole number, {smallest} {upto}")

    return read


def positive(given: str) -> float:
    """`type=` of an option that is a finite number above zero."""
    with contextlib.suppress(ValueError):
        if 0 < float(given) < math.inf:
            return float(given)
    raise argparse.ArgumentTypeError(f"{given!r} must be a number above zero")


def mesh(options: argparse.Namespace) -> Any:
    """The Mesh of --mesh; None without it."""
    from lm.parallel.mesh import Mesh

    return Mesh.parse(options.mesh) if options.mesh else None


def declared(declare: Callable[[], Any], options: argparse.Namespace) -> Any:
    """The experiment or recipe of `declare()` with the changes of --set."""
    return change(declare(), options.set)


def change(declaration: Any, changes: Sequence[str]) -> Any:
    """`recipe.override`, whose error for an unknown path also names the setting that is called so
    in other frameworks."""
    from lm import recipe

    try:
        return recipe.override(declaration, changes)
    except UserError as error:
        raise UserError(_with_synonym(str(error), changes)) from None


def _with_synonym(message: str, changes: Sequence[str]) -> str:
    for path, _, value in (each.partition("=") for each in changes):
        last = path.rpartition(".")[2].lower()
        known = next((to for names, to in SYNONYMS.items() if last in names), None)
        # Errors in a stage of a recipe name the path without the stage.
        stage, dot, below = path.partition(".")
        for prefix, shown in (("", path), (stage + dot, below)):
            named = known not in (None, path)
            if named and shown and re.match(rf"(--set )?{re.escape(shown)} ", message):
                fix = f"--set {prefix}{known}={value}"
                return f"{path} is not known; that setting is {prefix}{known}, as in {fix}."
    return message


def open_run(options: argparse.Namespace) -> Any:
    """The Run of the options of `add_run`."""
    from lm import runs
    from lm.parallel import distributed

    distributed.initialize()
    return runs.load(options.run, step=options.step, mesh=mesh(options), compute=options.compute)


def under_headings(texts: Iterable[tuple[Any, str]]) -> str:
    """The text of each stage of a recipe under its name."""
    return "\n\n".join(f"==== stage {stage.name} ====\n{text}" for stage, text in texts)


def add_exact(parser: argparse.ArgumentParser) -> None:
    """--exact, --no-exact"""
    parser.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        help="whether results must not depend on what else is computed, bit for bit; without it "
        "the engine is faster (default: in float32)",
    )
