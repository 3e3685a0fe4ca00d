"""Generation.

sampling      draws the next token
decode        tokens, with a KV cache
text          stop strings and streaming
session       a sequence that is continued, with its KV cache kept
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
from lm.generate.session import Session
from lm.generate.speculative import DraftModel, NGram, Speculation
from lm.generate.text import Text, check_prompts, generate_text

__all__ = [
    "Conversation",
    "DraftModel",
    "Engine",
    "Guide",
    "Guides",
    "NGram",
    "Output",
    "Request",
    "Result",
    "Sampling",
    "Session",
    "Speculation",
    "Text",
    "check_prompts",
    "generate",
    "generate_text",
    "stream",
]
