"""Pages of the KV cache and the sequences that own them: allocation, prefix caching, eviction.

A page is identified by a digest of all tokens up to its end. A full page keeps its digest when its
last owner leaves, and the next sequence that begins with the same tokens takes it over, until the
page is needed for other tokens (least recently used first).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def digests(tokens: Sequence[int], size: int, known: list[bytes]) -> list[bytes]:
    """Digests of the full pages of `tokens`; `known` are those of the first pages."""
    found = known[: len(tokens) // size]
    for i in range(len(found), len(tokens) // size):
        page = np.asarray(tokens[i * size : (i + 1) * size], np.int32).tobytes()
        before = found[-1] if found else b""
        found.append(hashlib.blake2b(before + page, digest_size=16).digest())
    return found


def needed(
    reach: tuple[int, int] | None, tokens: int, *, page: int, context: int, rows: int
) -> int:
    """Pages that the layers with a reach, (window, sink tokens), need for `tokens` of sequences of
    up to `context` tokens, in steps of `rows`."""
    all_tokens = -(-tokens // page)
    if reach is None:
        return all_tokens
    # Of each sequence: a window, the sinks, the tokens of a step, and the parts at both ends.
    seen = sum(-(-part // page) + 1 for part in (*reach, rows))
    sequences = max(1, tokens // context)
    return max(min(all_tokens, sequences * seen), seen, -(-context // page))


class Pool:
    """The pages 0 .. count - 1 of all layers with one reach.

    users    how many sequences own each page
    """

    def __init__(self, count: int):
        self.count = count
        self.users = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._kept: OrderedDict[int, bytes] = OrderedDict()  # without users, oldest first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `take` can return."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        """Pages that sequences own."""
        return self.count - self.available

    def take(self) -> int:
        """A page for new tokens."""
        if self._free:
            page = self._free.pop()
        else:
            page, digest = self._kept.popitem(last=False)
            del self._page_of[digest], self._digest_of[page]
        self.users[page] = 1
        return page

    def find(self, digest: bytes) -> int | None:
        """The page with these tokens, if there is one."""
        return self._page_of.get(digest)

    def share(self, page: int) -> None:
        """Adds a user to a page from `find`."""
        self._kept.pop(page, None)
        self.users[page] += 1

    def keep(self, page: int, digest: bytes) -> None:
        """Makes a full page known; of two with the same tokens, the first is."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def drop(self, page: int) -> None:
        """Removes a user."""
        self.users[page] -= 1
        if self.users[page]:
            return
        if page in self._digest_of:
            self._kept[page] = self._digest_of[page]
        else:
            self._free.append(page)
