"""Generation: sampling, decode (tokens, with a KV cache), text (stop strings and streaming)."""

from lm.generate.decode import Result, generate, stream
from lm.generate.sampling import Sampling
from lm.generate.text import Text, generate_text

__all__ = ["Result", "Sampling", "Text", "generate", "generate_text", "stream"]
