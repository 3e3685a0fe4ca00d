"""Generation.

sampling      draws the next token
decode        tokens, with a KV cache
text          stop strings, streaming
conversation  chat
engine        many requests at once: request, scheduler, pages, rows, programs
speculative   drafts of the next tokens, which a step of the engine checks
guide         structured output: JSON schemas, regular expressions, grammars
"""

from lm.generate.conversation import Conversation
from lm.generate.decode import Result, generate, stream
from lm.generate.engine import Engine
from lm.generate.guide import Guide, Guides
from lm.generate.request import Output, Request
from lm.generate.sampling import Sampling
from lm.generate.speculative import DraftModel, NGram, Speculation
from lm.generate.text import Begin, Reader, Text, begin, check_prompts, generate_text, write

__all__ = [
    "Begin",
    "Conversation",
    "DraftModel",
    "Engine",
    "Guide",
    "Guides",
    "NGram",
    "Output",
    "Reader",
    "Request",
    "Result",
    "Sampling",
    "Speculation",
    "Text",
    "begin",
    "check_prompts",
    "generate",
    "generate_text",
    "stream",
    "write",
]
