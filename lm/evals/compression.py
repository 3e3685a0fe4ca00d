"""A general-purpose compressor on the same text, as a baseline for bits per byte."""

import lzma
from collections.abc import Iterable


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits that `xz -9` needs per byte of the documents, joined into one file."""
    joined = "".join(texts).encode()
    return 8 * len(lzma.compress(joined, preset=9)) / len(joined)
