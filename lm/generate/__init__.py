"""Generation.

sampling      draws the next token
decode        tokens, with a KV cache
text          stop strings and streaming
session       a sequence that is continued, with its KV cache kept
conversation  chat
engine        many requests at once: request, scheduler, pages, programs
"""

from lm.generate.conversation import Conversation
from lm.generate.decode import Result, generate, stream
from lm.generate.engine import Engine
from lm.generate.request import Output, Request
from lm.generate.sampling import Sampling
from lm.generate.session import Session
from lm.generate.text import Text, check_prompts, generate_text

__all__ = [
    "Conversation",
    "Engine",
    "Output",
    "Request",
    "Result",
    "Sampling",
    "Session",
    "Text",
    "check_prompts",
    "generate",
    "generate_text",
    "stream",
]
