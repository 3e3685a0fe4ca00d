"""`python -m lm chat`"""

import argparse
import contextlib
import sys

from lm.commands import flags
from lm.errors import UserError

HELP = "Talk with a model in the terminal."
OUT_OF_MEMORY = "Use a shorter --context, or shard the model over more devices with --mesh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of chat."""
    flags.add_run(parser)
    parser.add_argument("--system", help="what the model is told before the conversation")
    flags.add_sampling(parser)
    parser.add_argument(
        "--max-tokens",
        type=flags.whole(),
        default=512,
        help="most tokens of an answer (default: 512)",
    )
    flags.add_context(parser, "most tokens of the conversation (default: as trained)")


def run(options: argparse.Namespace) -> None:
    """Reads messages from stdin, a line each, and prints the answers as they are written."""
    sampling, loaded = flags.sampling(options), flags.open_run(options)

    def new():
        return loaded.chat(
            system=options.system, context=options.context, sampling=sampling, seed=options.seed
        )

    conversation = new()
    asks = sys.stdin.isatty()
    if asks:
        print("/new begins again; Ctrl-D or an empty line ends.", file=sys.stderr)
    while True:
        message = _read(asks)
        if not message:
            return
        if message == "/new":
            conversation = new()
            continue
        try:
            conversation.say(
                message,
                max_tokens=options.max_tokens,
                stream=lambda piece: print(piece, end="", flush=True),
            )
        except UserError as error:
            if not asks:
                raise
            print(error, file=sys.stderr)
        print(flush=True)


def _read(asks: bool) -> str:
    with contextlib.suppress(EOFError):
        return input("> " if asks else "").strip()
    return ""
