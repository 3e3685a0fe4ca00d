"""Generation: sampling, decode (tokens, with a KV cache), text (stop strings and streaming)."""

from lm.generate.decode import Result, generate, stream
from lm.generate.sampling import Sampling
from lm.generate.text import Text, check_prompts, generate_text

__all__ = ["Result", "Sampling", "Text", "check_prompts", "generate", "generate_text", "stream"]
