"""Generation.

sampling      draws the next token
decode        tokens, with a KV cache
text          stop strings and streaming
session       a sequence that is continued, with its KV cache kept
conversation  chat
"""

from lm.generate.conversation import Conversation
from lm.generate.decode import Result, generate, stream
from lm.generate.sampling import Sampling
from lm.generate.session import Session
from lm.generate.text import Text, check_prompts, generate_text

__all__ = [
    "Conversation",
    "Result",
    "Sampling",
    "Session",
    "Text",
    "check_prompts",
    "generate",
    "generate_text",
    "stream",
]
