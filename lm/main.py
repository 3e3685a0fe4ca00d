"""The two doors. `main(experiment)` serves `python -m experiments.NAME [train|show|plan]`;
`lm_main` serves `python -m lm VERB`.

A user's mistake ends in one sentence on stderr and exit code 2, an interruption in 130 (Ctrl-C) or
143 (SIGTERM).
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from lm.errors import UserError, nearest
from lm.experiment import Experiment, override
from lm.parallel import distributed, peers
from lm.parallel.mesh import Mesh


class Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are one sentence with the nearest known option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Looks for unknown options first: argparse would take their values for the verb."""
        args = sys.argv[1:] if args is None else list(args)
        for argument in args if self._subparsers is None else ():
            option = argument.partition("=")[0]
            # What holds a space is a value to argparse too, as in --prompt "-- select".
            if option.startswith("--") and " " not in option and option != "--":
                self._check_option(option)
        return super().parse_known_args(args, namespace)

    def _check_option(self, option: str) -> None:
        known = self._option_string_actions
        if option not in known:
            self.error(f"unknown option {option!r}.{nearest(option, known)}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists what there is)\n")


@contextlib.contextmanager
def _sentences(program: str) -> Iterator[None]:
    """Turns what a user can mend into one sentence and an exit code; bugs keep their traceback."""
    try:
        yield
    except UserError as refusal:
        sys.exit(_say(program, str(refusal), 2))
    except KeyboardInterrupt:
        sys.exit(
            _say(
                program, "interrupted; the same command goes on from what is already on disk.", 130
            )
        )
    except BrokenPipeError:
        peers.end(f"{program}: nobody reads what is written.", 141)
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fix = "the disk is full; free some space and give the same command again: it resumes."
            sys.exit(_say(program, fix, 2))
        if error.filename is None or error.strerror is None:
            raise
        sys.exit(_say(program, f"{error.filename}: {error.strerror.lower()}.", 2))


def _say(program: str, sentence: str, code: int) -> int:
    """Where there are several processes, all of them end here."""
    peers.end(f"{program}: {sentence}", code)
    print(f"{program}: {sentence}", file=sys.stderr)
    return code


def main(declare: Callable[[], Experiment], arguments: Sequence[str] | None = None) -> None:
    """The door of an experiment file: trains what `declare()` returns, or shows it."""
    program = f"python -m {_module_name(declare)}"
    parser = Parser(prog=program, description=declare.__doc__, allow_abbrev=False)
    parser.add_argument("verb", nargs="?", default="train", choices=("train", "show", "plan"))
    parser.add_argument("--workdir", default="runs", help="where runs lie (default: runs)")
    parser.add_argument("--on", metavar="PLACE", help="one of the experiment's places")
    parser.add_argument("--mesh", help="a mesh of your own, as in data=2,fsdp=4")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="as in model.layers=2"
    )
    parser.add_argument("--json", action="store_true", help="show, plan: one JSON object on stdout")
    parser.add_argument("--search", action="store_true", help="plan: find a place on the slice")
    parser.add_argument("--weak", metavar="SLICES", help="plan: as much work per chip on each")
    parser.add_argument("--estimate", action="store_true", help="plan: do not compile")
    parser.add_argument("--price", type=float, help="plan: of a chip for an hour")
    options = parser.parse_args(arguments)
    with _sentences(program):
        if options.verb == "plan":
            _plan(declare, options)
            return
        distributed.initialize()
        experiment = override(declare(), options.set)
        mesh = Mesh.parse(options.mesh) if options.mesh else None
        if options.verb == "show":
            from lm.planning import show

            shown = show.facts(experiment, on=options.on, mesh=mesh)
            print(json.dumps(shown) if options.json else show.text(shown))
            return
        from lm import run

        trained = run.train(experiment, on=options.on, mesh=mesh, workdir=options.workdir)
        if trained.stopped is not None:
            sys.exit(128 + signal.Signals[trained.stopped])


def _plan(declare: Callable[[], Experiment], options: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # the slice is described, not used
    from lm import planning

    experiment = override(declare(), options.set)
    mesh = Mesh.parse(options.mesh) if options.mesh else None
    compile = not options.estimate
    if options.weak and (options.on or options.search):
        raise UserError("--weak names its slices itself; leave out --on and --search, or --weak.")
    if options.weak:
        rows = planning.scaling(experiment, options.weak.split(","), mesh, compile=compile)
        plans = [{**row.plan, "efficiency": row.efficiency} for row in rows]
        print(json.dumps(plans) if options.json else planning.scaling_text(rows))
        return
    if not options.search:
        told = planning.plan(
            experiment, options.on, mesh=mesh, price=options.price, compile=compile
        )
        print(json.dumps(told) if options.json else planning.text(told))
        return
    if mesh is not None:
        raise UserError("--search chooses the mesh; leave out --mesh, or --search.")
    found = planning.search(experiment, options.on, compile=compile)
    if options.json:
        print(json.dumps([{**each.plan, "code": each.code} for each in found]))
    else:
        print(planning.search_text(found))


def _module_name(declare: Callable[[], Experiment]) -> str:
    module = sys.modules["__main__"]
    spec = getattr(module, "__spec__", None)
    return spec.name if spec and declare.__module__ == "__main__" else declare.__module__


def lm_main(arguments: Sequence[str] | None = None) -> None:
    """The door of a result: `python -m lm generate|eval|import|export|bench ...`."""
    parser = Parser(prog="python -m lm", description="What can be done with a run.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    _add_generate(verbs.add_parser("generate", help="continue a prompt", allow_abbrev=False))
    _add_eval(verbs.add_parser("eval", help="perplexity, bits per byte", allow_abbrev=False))
    _add_import(verbs.add_parser("import", help="a Hugging Face folder in", allow_abbrev=False))
    _add_export(verbs.add_parser("export", help="a Hugging Face folder out", allow_abbrev=False))
    _add_bench(verbs.add_parser("bench", help="measure a step or an import", allow_abbrev=False))
    options = parser.parse_args(arguments)
    with _sentences(f"python -m lm {options.verb}"):
        options.do(options)


def _add_generate(parser: Parser) -> None:
    parser.add_argument("run", help="a run or Hugging Face folder")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], help="text to stop at; repeatable")
    parser.add_argument("--context", type=int, help="tokens of prompt and text (default: trained)")
    parser.add_argument("--seed", type=int, default=0)
    _add_opening(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(do=_generate)


def _add_opening(parser: Parser) -> None:
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the last)")
    parser.add_argument("--mesh", help="devices to spread the model over, as in fsdp=2,tensor=4")
    parser.add_argument("--compute", help="float32 or bfloat16 (default: as declared)")


def _open(options: argparse.Namespace) -> Any:
    from lm import run

    distributed.initialize()
    mesh = Mesh.parse(options.mesh) if options.mesh else None
    return run.load(options.run, step=options.step, mesh=mesh, compute=options.compute)


def _generate(options: argparse.Namespace) -> None:
    from lm import generate

    sampling = generate.Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )
    prompts = options.prompt or [""]
    loaded = _open(options)
    stream = None if options.json or len(prompts) > 1 else _Typed(prompts[0])
    texts = loaded.generate(
        prompts,
        max_tokens=options.max_tokens,
        context=options.context,
        sampling=sampling,
        stop=tuple(options.stop),
        seed=options.seed,
        stream=stream,
    )
    if options.json:
        samples = [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
        print(json.dumps({"run": str(options.run), "step": loaded.step, "samples": samples}))
    elif stream:
        stream.end()
    else:
        print("\n---\n".join(p + t for p, t in zip(prompts, texts, strict=True)))


class _Typed:
    """Prints the prompt and what follows as it comes; nothing where the prompt is refused."""

    def __init__(self, prompt: str) -> None:
        self._waiting = prompt

    def __call__(self, row: int, piece: str) -> None:
        print(self._waiting + piece, end="", flush=True)
        self._waiting = ""

    def end(self) -> None:
        """The line is over, and the prompt printed even if nothing followed it."""
        print(self._waiting)


def _add_eval(parser: Parser) -> None:
    parser.add_argument("run", help="a run or Hugging Face folder")
    parser.add_argument("--data", help="a text file or glob (default: the run's held-out text)")
    parser.add_argument("--context", type=int, help="tokens of a sequence (default: trained)")
    _add_opening(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(do=_eval)


def _eval(options: argparse.Namespace) -> None:
    from lm import terminal

    loaded = _open(options)
    results = loaded.evaluate(options.data, context=options.context)
    if options.json:
        records = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"run": str(options.run), "step": loaded.step, "results": records}))
        return
    rows = [
        (r.name, f"{r.value:.4f}", "" if r.stderr is None else f"{r.stderr:.4f}", f"{r.count:,}")
        for r in results
    ]
    print(terminal.table(("measure", "value", "standard error", "tokens"), rows))


def _add_import(parser: Parser) -> None:
    parser.add_argument("source", help="a folder with config.json and safetensors")
    parser.add_argument("run", help="the run folder to write, as in runs/llama")
    parser.add_argument("--mesh", help="devices to spread the model over, as in fsdp=2,tensor=4")
    parser.set_defaults(do=_import)


def _import(options: argparse.Namespace) -> None:
    from lm import exchange

    distributed.initialize()
    mesh = Mesh.parse(options.mesh) if options.mesh else None
    made = exchange.import_run(options.source, options.run, mesh=mesh)
    if not distributed.is_main():
        return
    print(f"Imported {options.source} as {made.folder}.", end=" ")
    if made.tokenizer is None:
        print("It came without a tokenizer: copy tokenizer.json into it to generate and evaluate.")
        return
    print("What can be done with it:")
    print(f'  python -m lm generate {made.folder} --prompt "The"')
    print(f"  python -m lm eval {made.folder} --data FILE")


def _add_export(parser: Parser) -> None:
    parser.add_argument("run", help="a run folder, as in runs/stdlib")
    parser.add_argument("target", help="the folder to write")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the last)")
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: as the run stores it)")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="of a file, at most")
    parser.add_argument("--mesh", help="devices to spread the model over, as in fsdp=2,tensor=4")
    parser.set_defaults(do=_export)


def _export(options: argparse.Namespace) -> None:
    from lm import exchange

    distributed.initialize()
    made = exchange.export_run(
        options.run,
        options.target,
        step=options.step,
        dtype=options.dtype,
        shard_bytes=round(options.shard_gb * 1e9),
        mesh=Mesh.parse(options.mesh) if options.mesh else None,
    )
    if distributed.is_main():
        print(f"Exported {options.run} to {made}, and read it back: same weights, same logits.")


def _add_bench(parser: Parser) -> None:
    parser.add_argument("what", choices=("step", "import"), help="a training step, or weights")
    parser.add_argument("target", help="a module or a run; of import, a Hugging Face folder")
    parser.add_argument("--on", metavar="PLACE", help="one of the experiment's places")
    parser.add_argument("--mesh", help="a mesh of your own, as in data=2,fsdp=4")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(do=_bench)


def _bench(options: argparse.Namespace) -> None:
    from lm.commands import bench

    mesh = Mesh.parse(options.mesh) if options.mesh else None
    if options.what == "import":
        distributed.initialize()
        read = bench.reading(options.target, mesh=mesh)
        print(json.dumps(read) if options.json else bench.reading_text(read))
        return
    experiment = override(bench.find(options.target), options.set)
    measured: dict[str, Any] = bench.step(experiment, on=options.on, mesh=mesh, steps=options.steps)
    print(json.dumps(measured) if options.json else bench.text(measured))
