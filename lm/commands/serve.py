"""`python -m lm serve`"""

import argparse
import importlib.util
import os
from typing import Any

from lm.commands import flags
from lm.errors import UserError

HELP = "Serve models with OpenAI's API."
OUT_OF_MEMORY = (
    "Use a smaller --cache-tokens or a shorter --context, or shard the model over more devices "
    "with --mesh"
)
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of serve."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run folder or a Hugging Face folder; NAME=RUN names the model, and A=RUN1:0.9 "
        "B=RUN2:0.1 splits requests by weight",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="an adapter of RUN, a run folder or a PEFT folder; may be repeated",
    )
    parser.add_argument(
        "--split-name",
        default="split",
        metavar="NAME",
        help="the model that splits requests by weight (default: split)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0: all (default: 127.0.0.1, this machine only)",
    )
    parser.add_argument(
        "--port", type=flags.whole(0, 2**16), default=8000, help="0: any (default: 8000)"
    )
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="key that clients must send; may be repeated (default: $LM_API_KEY, or none)",
    )
    _add_limits(parser)
    flags.add_context(parser, "most tokens of prompt and continuation (default: as trained)")
    parser.add_argument(
        "--cache-tokens",
        type=flags.whole(),
        help="tokens that the KV cache of each model holds (default: as many as fit in 1 GiB, at "
        "most 64 contexts)",
    )
    parser.add_argument(
        "--cache-dtype",
        metavar="DTYPE",
        help="float32, bfloat16 or int8 keys and values (default: as the weights)",
    )
    flags.add_exact(parser)
    drafts = parser.add_mutually_exclusive_group()
    drafts.add_argument(
        "--ngrams",
        type=flags.whole(),
        metavar="N",
        help="speculative decoding: propose the N tokens that followed the last time",
    )
    drafts.add_argument(
        "--draft", metavar="FOLDER", help="speculative decoding with a smaller model as draft"
    )
    parser.add_argument(
        "--step", type=flags.whole(0), help="step of the checkpoint (default: the newest)"
    )
    parser.add_argument(
        "--compute", metavar="DTYPE", help="float32 or bfloat16 arithmetic (default: as declared)"
    )
    flags.add_mesh(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-body",
        type=flags.whole(),
        default=4_000_000,
        metavar="BYTES",
        help="most bytes of a request (default: 4000000)",
    )
    parser.add_argument(
        "--max-queue",
        type=flags.whole(),
        default=1_000,
        metavar="N",
        help="most sequences that wait for their first token (default: 1000)",
    )
    parser.add_argument(
        "--timeout",
        type=flags.positive,
        default=600.0,
        metavar="SECONDS",
        help="longest time of a request (default: 600)",
    )
    parser.add_argument(
        "--grace",
        type=flags.positive,
        default=30.0,
        metavar="SECONDS",
        help="time that running requests have to end at a shutdown (default: 30)",
    )


def run(options: argparse.Namespace) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'serve needs {", ".join(missing)}: pip install -e ".[serve]"')
    import jax

    from lm.parallel import distributed
    from lm.serve import server

    settings = _settings(options)
    distributed.initialize()
    if jax.process_count() > 1:
        raise UserError("serve runs in one process; start it on one host, with its devices.")
    server.serve(settings, say=lambda line: print(line, flush=True))


def _settings(options: argparse.Namespace) -> Any:
    from lm.serve import server
    from lm.serve.app import Limits
    from lm.serve.router import parse
    from lm.serve.variants import Reading

    keys = options.api_key or [key for key in [os.environ.get("LM_API_KEY")] if key]
    return server.Settings(
        sources=[parse(text) for text in options.runs],
        adapters=[parse(text) for text in options.adapter],
        split=options.split_name,
        host=options.host,
        port=options.port,
        grace=options.grace,
        reading=Reading(
            step=options.step,
            compute=options.compute,
            mesh=flags.mesh(options),
            context=options.context,
            cache_tokens=options.cache_tokens,
            cache_dtype=options.cache_dtype,
            exact=options.exact,
            ngrams=options.ngrams,
            draft=options.draft,
        ),
        limits=Limits(
            max_body=options.max_body,
            max_queue=options.max_queue,
            timeout=options.timeout,
            keys=keys,
        ),
    )
