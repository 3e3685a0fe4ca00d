"""One sequence that is continued again and again, with its KV cache kept: a conversation."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import jax

from lm.errors import check_size
from lm.generate import decode
from lm.generate.sampling import Sampling
from lm.model import Model, Window


class Session:
    """Continues token sequences that mostly begin alike: only what is new is prefilled.

    Args:
      model: with weights in the dtype of arithmetic (see `Model.cast`).
      context: most tokens of the sequence; the cache has room for them from the start.

    `tokens` are those whose keys and values are in the cache.
    """

    def __init__(self, model: Model, *, context: int, cache_dtype: str | None = None):
        check_size(context=context)
        self.tokens: list[int] = []
        self._model, self._context, self._dtype = model, context, cache_dtype
        self._cache: Any = None

    def stream(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        key: jax.Array | int = 0,
        stop_tokens: Sequence[int] = (),
        chunk: int = 16,
        ended: AbstractSet[int] = frozenset(),
    ) -> Iterator[decode.Result]:
        """The continuation of `ids` so far, after every `chunk` tokens; see `decode.stream`. The
        tokens are those of `decode.generate`.

        Raises UserError for ids that leave no room in the context.
        """
        decode.check_request(self._model.config, [ids], self._context, max_tokens, chunk, key)
        sampling, max_tokens = sampling or Sampling(), min(max_tokens, self._context)
        begin = 0 if sampling.repetition_penalty != 1 else self._known(ids)
        request = decode.make_request(
            [ids[begin:]],
            self._context,
            max_tokens,
            sampling,
            key,
            stop_tokens,
            self._model.mesh,
            begin=begin,
        )
        cache, self._cache, self.tokens = self._cache, None, []
        if cache is None:
            rows = len(request.length_b)
            cache = decode.empty_cache(self._model, rows, self._context, self._dtype)
        states = decode.run(self._model, request, cache, 1, max_tokens, chunk, ended)
        for (result,), self._cache in states:
            # The last token has been sampled, but not yet been read.
            self.tokens = [*ids, *result.tokens[:-1]]
            yield result

    def _known(self, ids: Sequence[int]) -> int:
        """How many of `ids` the cache can be used for; at least the last one is read again."""
        pairs = enumerate(zip(self.tokens, ids[:-1], strict=False))
        shorter = min(len(self.tokens), len(ids) - 1)
        known = next((i for i, (a, b) in pairs if a != b), shorter)
        leaves = jax.tree.leaves(self._cache, is_leaf=lambda x: isinstance(x, Window))
        if known < len(self.tokens) and any(isinstance(leaf, Window) for leaf in leaves):
            return 0  # in a ring buffer, later positions have overwritten earlier ones
        return known
