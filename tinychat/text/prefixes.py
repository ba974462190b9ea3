"""The space that SentencePiece and some other tokenizers put before a text, switched on and off."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers


class Before(enum.Enum):
    """Text or tokens that go before a text that is encoded."""

    NOTHING = enum.auto()
    MARKER = enum.auto()  # an added token: most tokenizers begin anew behind it
    TEXT = enum.auto()


class Prefixes:
    """The parts of a backend that put a space before a text; `each`: some do so behind every marker too."""

    def __init__(self, backend: tokenizers.Tokenizer):
        # (part, attribute, its value, its value where no space is wanted, behind markers too)
        self._switches: list[tuple[Any, str, Any, Any, bool]] = []
        normalizers = list(_parts(backend.normalizer))
        others = [part for part, state in normalizers if state.get("type") != "Prepend"]
        if len(others) < len(normalizers):
            from tokenizers.normalizers import Sequence

            self._switches.append((backend, "normalizer", backend.normalizer, Sequence(others), True))
        for part, state in _parts(backend.pre_tokenizer):
            kind = state.get("type")
            if kind == "Metaspace" and (scheme := state["prepend_scheme"]) != "never":
                self._switches.append((part, "prepend_scheme", scheme, "never", scheme == "always"))
            elif kind == "ByteLevel" and state.get("add_prefix_space"):
                self._switches.append((part, "add_prefix_space", True, False, True))
        self.each = any(each for *_, each in self._switches)

    @contextmanager
    def set(self, before: Before) -> Iterator[None]:
        """Inside, the backend encodes what stands behind `before`."""
        off = []
        if before is not Before.NOTHING:
            off = [s for s in self._switches if before is Before.TEXT or not s[-1]]
        for part, name, _, without, _ in off:
            setattr(part, name, without)
        try:
            yield
        finally:
            for part, name, value, _, _ in off:
                setattr(part, name, value)


def _parts(whole: Any) -> Iterator[tuple[Any, dict]]:
    """A normalizer's or a pre-tokenizer's parts, each with its settings.

    A sequence within a sequence is left whole: the library gives no way to its parts. Honest files have none.
    """
    if whole is None:
        return
    state = json.loads(whole.__getstate__())
    if state.get("type") != "Sequence":
        yield whole, state
        return
    inner = state.get("normalizers") or state.get("pretokenizers") or ()
    if all(part.get("type") != "Sequence" for part in inner):
        for i, part in enumerate(inner):
            yield whole[i], part
