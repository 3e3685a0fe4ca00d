"""`python -m lm generate`"""

import argparse

from lm import terminal
from lm.commands import flags

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
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="divides the logits; 0 takes the likeliest token (default: 0.8)",
    )
    parser.add_argument("--top-k", type=flags.whole(), help="sample from the K likeliest tokens")
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
        "--stop", action="append", default=[], help="text to stop at; may be repeated"
    )
    parser.add_argument(
        "--context",
        type=flags.whole(),
        help="most tokens of prompt and continuation (default: as trained)",
    )
    parser.add_argument(
        "--seed", type=flags.whole(0, 2**32), default=0, help="of the random choices (default: 0)"
    )
    flags.add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Prints prompt and continuation: as it is generated if there is one prompt."""
    from lm import generate
    from lm.data.unicode import replace_surrogates

    sampling = generate.Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )
    prompts = [replace_surrogates(prompt) for prompt in options.prompt or [""]]
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
