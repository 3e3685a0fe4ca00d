"""A conversation with a model: messages in, the assistant's answers out as they are written."""

from collections.abc import Callable

from lm.data import chat_template, encode_prompt, end_of_turn
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError, check_positive
from lm.generate.engine import Engine
from lm.generate.request import Request
from lm.generate.sampling import Sampling
from lm.generate.text import Reader, write


class Conversation:
    """A conversation, rendered by the model's chat template. The engine's cache keeps the earlier
    turns (prefix caching).

        conversation = run.chat(system="Answer briefly.")
        print(conversation.say("What is the capital of France?"))

    messages  so far, {"role": ..., "content": ...}
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ):
        self._engine, self._tokenizer, self._seed = engine, tokenizer, seed
        self._template = chat_template(tokenizer)
        self._sampling = sampling or Sampling()
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def say(
        self,
        content: str,
        *,
        max_tokens: int = 512,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """The assistant's answer to a message of the user. Both join the conversation.

        Args:
          stream: called with pieces of the answer as they are written.

        Raises UserError, and leaves the conversation as it was, if it is longer than the context.
        """
        check_positive(max_tokens=max_tokens)
        messages = [*self.messages, {"role": "user", "content": content}]
        prompt = self._template.render(messages, add_generation_prompt=True)
        ids = encode_prompt(prompt, self._tokenizer)
        context = self._engine.context
        if len(ids) >= context:
            raise UserError(
                f"The conversation has {len(ids)} tokens, and the context ends at {context}; "
                "begin a new one, or give a larger context."
            )
        tokens, texts = end_of_turn(self._tokenizer)
        request = Request(
            prompt=ids,
            max_tokens=max_tokens,
            sampling=self._sampling,
            seed=self._seed,
            stop_tokens=tokens,
        )
        reader = Reader(self._tokenizer, texts)
        emit = None if stream is None else lambda _, piece: stream(piece)
        (text,) = write(self._engine, [request], [reader], emit)
        answer = text.text
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer
