"""The two command lines: `main(experiment)` of `python -m experiments.NAME [train|show|plan]`, and
`lm_main` of `python -m lm VERB`. The verbs are in lm/commands/.

A user error ends in one sentence on stderr and exit code 2, an interruption in 130 (Ctrl-C) or 143
(SIGTERM).
"""

import argparse
import contextlib
import errno
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from lm.commands import bench, chat, eval, export, generate, import_, plan, serve, show, train
from lm.commands.memory import sentence
from lm.errors import UserError, nearest

if TYPE_CHECKING:
    from lm.experiment import Experiment
    from lm.recipe import Recipe

EXPERIMENT_VERBS = {"train": train, "show": show, "plan": plan}
RESULT_VERBS = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "eval": eval,
    "import": import_,
    "export": export,
    "bench": bench,
}


def main(
    declare: "Callable[[], Experiment | Recipe]", arguments: Sequence[str] | None = None
) -> None:
    """Command line of an experiment file: trains, shows or plans what `declare()` returns."""
    program = f"python -m {_module_name(declare)}"
    _print_any_text()
    command, options = _parse(program, EXPERIMENT_VERBS, arguments, default="train")
    with _sentences(program, command):
        command.run(declare, options)


def lm_main(arguments: Sequence[str] | None = None) -> None:
    """Command line of results: `python -m lm generate|chat|serve|eval|import|export|bench ...`."""
    _print_any_text()
    command, options = _parse("python -m lm", RESULT_VERBS, arguments)
    with _sentences(f"python -m lm {options.verb}", command):
        command.run(options)


def _print_any_text() -> None:
    """Prints characters that stdout cannot encode as escapes instead of failing: of arguments that
    are not UTF-8, and of any text on a terminal that has another encoding."""
    if hasattr(sys.stdout, "reconfigure"):  # pytest and notebooks replace it
        sys.stdout.reconfigure(errors="backslashreplace")


def _module_name(declare: Callable[[], Any]) -> str:
    module = sys.modules["__main__"]
    spec = getattr(module, "__spec__", None)
    return spec.name if spec and declare.__module__ == "__main__" else declare.__module__


# ---- Arguments


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with the nearest known option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Checks the names of options first: argparse would report their values instead."""
        known = self._option_string_actions
        for option in (each.partition("=")[0] for each in args):
            # An argument with a space is a value to argparse too, as in --prompt "-- select".
            is_option = option.startswith("--") and " " not in option and option != "--"
            if is_option and option not in known:
                self.error(f"unknown option {option!r}.{nearest(option, known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def _parse(
    program: str,
    verbs: Mapping[str, ModuleType],
    arguments: Sequence[str] | None,
    default: str | None = None,
) -> tuple[ModuleType, argparse.Namespace]:
    """(module of the verb, its options). The verb is the first argument, or else `default`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    has_verb = bool(arguments) and not arguments[0].startswith("-")
    verb = arguments.pop(0) if has_verb else default
    if verb in verbs:
        parser = Parser(
            prog=f"{program} {verb}" if has_verb else program,
            description=verbs[verb].HELP if has_verb else _overview(program, verbs, default),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verbs[verb].add_arguments(parser)
        parser.set_defaults(verb=verb)
        options, rest = parser.parse_known_args(arguments)
        if rest:
            order = "; the verb comes first" if rest[0] in verbs else ""
            parser.error(f"unexpected argument {rest[0]!r}{order}")
        return verbs[verb], options
    if verb is None and arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: {program} VERB ...\n\n{_overview(program, verbs, default)}")
        sys.exit(0)
    problem = f"unknown verb {verb!r}.{nearest(verb, verbs)}" if verb else "give a VERB first"
    Parser(prog=program).exit(2, f"{program}: {problem} (--help lists the verbs)\n")


def _overview(program: str, verbs: Mapping[str, ModuleType], default: str | None) -> str:
    """The verbs with what they do."""
    lines = ["verbs:", *(f"  {name:<10}{verb.HELP}" for name, verb in verbs.items()), ""]
    lines += [f"`{program} VERB --help` lists the options of a verb."]
    return "\n".join(lines + ([f"Without a verb: {default}, with these options:"] * bool(default)))


# ---- Errors


@contextlib.contextmanager
def _sentences(program: str, command: ModuleType) -> Iterator[None]:
    """Turns errors that the user can fix into one sentence and an exit code. Other exceptions are
    bugs and keep their traceback."""
    try:
        yield
    except UserError as error:
        _exit(program, str(error), 2)
    except KeyboardInterrupt:
        _exit(program, "interrupted; the same command resumes from what is on disk.", 130)
    except BrokenPipeError:
        _end_peers(f"{program}: output pipe closed.", 141)
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _exit(program, "the disk is full; free space and run the same command: it resumes.", 2)
        if error.filename is None or error.strerror is None:
            raise
        _exit(program, f"{error.filename}: {error.strerror.lower()}.", 2)
    except RuntimeError as error:
        out_of_memory = sentence(error)
        if out_of_memory is None:
            raise
        _exit(program, f"{out_of_memory} {command.OUT_OF_MEMORY}.", 2)


def _exit(program: str, message: str, code: int) -> NoReturn:
    """Ends this process, and all others of the run, with one sentence."""
    _end_peers(f"{program}: {message}", code)
    print(f"{program}: {message}", file=sys.stderr)
    sys.exit(code)


def _end_peers(message: str, code: int) -> None:
    from lm.parallel import peers

    peers.end(message, code)
