"""Token ids of texts that a model has read or written: what a conversation says again is not tokenized anew.

An answer's ids are what its model wrote, and not always those that a tokenizer makes of its text. A
conversation that comes back as text alone would differ from what is in the cache at the first such place.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

IDS = 8 << 20  # that are remembered, of all texts together: 4 bytes each
TEXTS = 2048


class Known(NamedTuple):
    """A text by its digest and its number of characters, and its ids."""

    digest: bytes
    characters: int
    ids: array


class KnownText:
    """The texts used last, within bounds. Calls may come from any thread."""

    def __init__(self, most_ids: int = IDS, most_texts: int = TEXTS):
        self._most_ids, self._most_texts = most_ids, most_texts
        self._texts: OrderedDict[bytes, Known] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self._ids = 0
        self._lock = threading.Lock()

    def add(self, text: str, ids: Sequence[int]) -> Known:
        """Remember the ids of a text, rendered by a template up to its last character."""
        known = Known(_digest(text), len(text), array("i", ids))
        self.restore(known)
        return known

    def restore(self, known: Known) -> None:
        """Remember what was told by `add`, in another process perhaps."""
        with self._lock:
            self._drop(known.digest)
            if len(known.ids) > self._most_ids:
                return
            self._texts[known.digest] = known
            self._lengths[known.characters] += 1
            self._ids += len(known.ids)
            while self._ids > self._most_ids or len(self._texts) > self._most_texts:
                self._drop(next(iter(self._texts)))

    def find(self, text: str) -> Known | None:
        """The longest known text that this one begins with."""
        best, at, running = None, 0, hashlib.blake2b(digest_size=16)
        with self._lock:
            for length in sorted(n for n in self._lengths if n <= len(text)):
                running.update(text[at:length].encode("utf-8", "surrogatepass"))
                at = length
                best = self._texts.get(running.digest(), best)
            if best is not None:
                self._texts.move_to_end(best.digest)
        return best

    def _drop(self, digest: bytes) -> None:
        known = self._texts.pop(digest, None)
        if known is not None:
            self._ids -= len(known.ids)
            self._lengths[known.characters] -= 1
            if not self._lengths[known.characters]:
                del self._lengths[known.characters]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
