"""`python -m lm generate`"""

import argparse
import json
from pathlib import Path
from typing import Any

from lm import terminal
from lm.commands import flags
from lm.errors import UserError

HELP = "Continue a prompt with a trained model."
OUT_OF_MEMORY = "Use a shorter --context, or shard the model over more devices with --mesh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of generate."""
    flags.add_run(parser)
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument(
        "--max-tokens",
        type=flags.whole(),
        default=128,
        help="most tokens to generate (default: 128)",
    )
    flags.add_sampling(parser)
    parser.add_argument(
        "--stop", action="append", default=[], help="text to stop at; may be repeated"
    )
    guides = parser.add_mutually_exclusive_group()
    guides.add_argument(
        "--json-schema", metavar="FILE", help="write JSON that is valid under the schema in FILE"
    )
    guides.add_argument(
        "--regex", metavar="PATTERN", help="write text that matches a regular expression as a whole"
    )
    flags.add_context(parser, "most tokens of prompt and continuation (default: as trained)")
    flags.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Prints prompt and continuation: as it is generated if there is one prompt."""
    from lm.data.unicode import replace_surrogates

    sampling = flags.sampling(options)
    prompts = [replace_surrogates(prompt) for prompt in options.prompt or [""]]
    schema = _schema(options.json_schema)
    loaded = flags.open_run(options)
    stream = None if options.json or len(prompts) > 1 else _Stream(prompts[0])
    texts = loaded.generate(
        prompts,
        max_tokens=options.max_tokens,
        context=options.context,
        sampling=sampling,
        stop=tuple(options.stop),
        seed=options.seed,
        stream=stream,
        guide=_guide(schema, options.regex, loaded.tokenizer),
    )
    if options.json:
        samples = [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
        print(
            terminal.json_text({"run": str(options.run), "step": loaded.step, "samples": samples})
        )
    elif stream:
        stream.end()
    else:
        print("\n---\n".join(p + t for p, t in zip(prompts, texts, strict=True)))


def _schema(path: str | None) -> dict[str, Any] | None:
    """The JSON schema in a file."""
    if path is None:
        return None
    try:
        schema = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"--json-schema {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"--json-schema {path} is not valid JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise UserError(f"--json-schema {path} must be a JSON object, as in {{'type': 'object'}}.")
    return schema


def _guide(schema: dict[str, Any] | None, pattern: str | None, tokenizer: Any) -> Any:
    """What the text must be like; None: anything."""
    from lm.generate import Guides

    if tokenizer is None or (schema is None and pattern is None):
        return None
    guides = Guides(tokenizer)
    return guides.regex(pattern) if schema is None else guides.json_schema(schema)


class _Stream:
    """Prints text as it is generated. The prompt comes with the first piece, so that nothing is
    printed if the prompt is refused."""

    def __init__(self, prompt: str) -> None:
        self._unprinted = prompt

    def __call__(self, row: int, piece: str) -> None:
        print(self._unprinted + piece, end="", flush=True)
        self._unprinted = ""

    def end(self) -> None:
        """Ends the line. Prints the prompt if no text followed it."""
        print(self._unprinted)
