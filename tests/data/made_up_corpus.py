"""A small, deterministic synthetic corpus."""

import random

WORDS = (
    "def",
    "return",
    "self",
    "import",
    "value",
    "the",
    "of",
    "and",
    "light",
    "tree",
    "é",
    "中",
    "😀",
)


def documents(count: int, seed: int = 0, longest: int = 60) -> tuple[str, ...]:
    """Returns `count` distinct texts of up to `longest` lines, some indented."""
    draw = random.Random(seed)
    texts = []
    for index in range(count):
        lines = [f"# {seed}-{index}"]
        for _ in range(draw.randint(1, longest)):
            words = draw.choices(WORDS, k=draw.randint(0, 9))
            lines.append(" " * draw.choice((0, 4, 8)) + " ".join(words))
        texts.append("\n".join(lines) + "\n")
    return tuple(texts)
