"""Stop strings in a stream of text: what may be shown now, what must wait, and where the answer ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from tinychat.text.reasoning import Piece, Splitter
from tinychat.text.tokenizer import SOME_TEXT, Tokenizer


class StopMatcher:
    """Feed it text as it arrives; it gives back what can no longer be part of a stop string.

    The earliest match in the text wins; of two that begin at the same place it does not matter which.
    """

    def __init__(self, stop: tuple[str, ...] = ()):
        self.stop = stop
        self.held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is certain now. After a match `matched` is set and everything from the match on is
        swallowed.
        """
        if self.matched is not None:
            return ""
        if not self.stop:
            return text
        self.held += text
        hits = [(at, s) for s in self.stop if (at := self.held.find(s)) >= 0]
        waiting = self._first_partial()
        if hits:
            at, s = min(hits)
            if waiting < at:
                # A longer stop string that began earlier may still complete: it would win.
                out, self.held = self.held[:waiting], self.held[waiting:]
                return out
            self.matched = s
            out, self.held = self.held[:at], ""
            return out
        out, self.held = self.held[:waiting], self.held[waiting:]
        return out

    def flush(self) -> str:
        """The stream has ended: what was held back is text, up to a stop string that is complete in it."""
        if self.matched is not None:
            return ""
        hits = [(at, s) for s in self.stop if (at := self.held.find(s)) >= 0]
        out, self.held = self.held, ""
        if hits:
            at, self.matched = min(hits)
            return out[:at]
        return out

    def _first_partial(self) -> int:
        """Index in `held` of an unfinished stop string at its end; its length if there is none."""
        n = len(self.held)
        longest = max(map(len, self.stop))
        for at in range(max(0, n - longest + 1), n):
            if any(len(s) > n - at and s.startswith(self.held[at:]) for s in self.stop):
                return at
        return n


class Said(NamedTuple):
    """Text that became certain: of the answer, of the reasoning, and as it was written."""

    text: str
    reasoning: str
    written: str


class Outlet:
    """Filter of a stream of text: the answer up to the first stop string in it, and the
    reasoning before it.
    """

    def __init__(self, stop: tuple[str, ...] = (), splitter: Splitter | None = None):
        """splitter: None takes everything for the answer."""
        self.splitter, self.matcher = splitter, StopMatcher(stop)
        self._waiting: deque[Piece] = deque()  # pieces of the answer that the matcher has, and what is behind

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.matcher.matched is not None

    @property
    def thinking(self) -> bool:
        """Whether reasoning is being written."""
        return self.splitter is not None and self.splitter.thinking

    def push(self, written: str) -> Said:
        """More of the stream."""
        if self.splitter is None:
            text = self.matcher.push(written)
            return Said(text, "", text)
        return self._pass(self.splitter.push(written))

    def flush(self) -> Said:
        """Its end."""
        if self.splitter is None:
            text = self.matcher.flush()
            return Said(text, "", text)
        first = self._pass(self.splitter.flush())
        text = self.matcher.flush()
        return Said(first.text + text, first.reasoning, first.written + self._written(len(text)))

    def _pass(self, pieces: Iterable[Piece]) -> Said:
        text = reasoning = ""
        for piece in pieces:
            if self.stopped:
                break
            self._waiting.append(piece)
            if piece.kind == "reasoning":
                reasoning += piece.text
            elif piece.kind == "answer":
                text += self.matcher.push(piece.text)
        return Said(text, reasoning, self._written(len(text)))

    def _written(self, n: int) -> str:
        """Text that was written for the next n characters of the answer."""
        out = ""
        while self._waiting:
            piece = self._waiting[0]
            if piece.kind == "answer":
                if len(piece.text) > n:
                    out += piece.written[:n]
                    self._waiting[0] = Piece("answer", piece.text[n:], piece.written[n:])
                    break
                n -= len(piece.text)
            out += piece.written
            self._waiting.popleft()
        return out


def cut_ids(tokenizer: Tokenizer, ids: list[int], text: str) -> list[int]:
    """The ids of an answer that a stop string cut to `text`: kept as generated up to the cut, re-encoded
    across it.
    """
    for n in range(len(ids), -1, -1):
        head = tokenizer.decode(ids[:n], continued=True)
        if text.startswith(head):
            break
    return ids[:n] + tokenizer.encode(text[len(head) :], after=SOME_TEXT)  # it goes on from a prompt
