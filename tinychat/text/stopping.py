"""Stop strings in a stream of text: what may be shown now, what must wait, and where the answer ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tinychat.base.events import ToolCall, ToolCallDelta
from tinychat.text.calls.caller import Caller, Part
from tinychat.text.reasoning import Piece, Splitter
from tinychat.text.tokenizer import SOME_TEXT, Tokenizer


class StopMatcher:
    """Feed it text as it arrives; it gives back what can no longer be part of a stop string.

    The earliest match in the text wins; of two that begin at the same place it does not matter which.

    recalls  what arrives was said before, when other stop strings held: none ends in it
    """

    def __init__(self, stop: tuple[str, ...] = ()):
        self.stop = stop
        self.held = ""
        self.matched: str | None = None
        self.recalls = False
        self._recalled = 0  # characters of `held` that came so

    def push(self, text: str) -> str:
        """Text that is certain now. After a match `matched` is set and everything from the match on is
        swallowed.
        """
        if self.matched is not None:
            return ""
        if not self.stop:
            return text
        self.held += text
        if self.recalls:
            self._recalled = len(self.held)
        hits, waiting = self._hits(), self._first_partial()
        if hits and waiting >= min(hits)[0]:  # else a longer one that began earlier may still complete
            at, self.matched = min(hits)
            out, self.held = self.held[:at], ""
            return out
        out, self.held = self.held[:waiting], self.held[waiting:]
        self._recalled = max(0, self._recalled - waiting)
        return out

    def flush(self) -> str:
        """The stream has ended: what was held back is text, up to a stop string that is complete in it."""
        if self.matched is not None:
            return ""
        hits = self._hits()
        out, self.held, self._recalled = self.held, "", 0
        if hits:
            at, self.matched = min(hits)
            return out[:at]
        return out

    def _hits(self) -> list[tuple[int, str]]:
        """Where the stop strings are in `held`."""
        n = self._recalled
        return [(at, s) for s in self.stop if (at := self.held.find(s, max(0, n - len(s) + 1))) >= 0]

    def _first_partial(self) -> int:
        """Index in `held` of an unfinished stop string at its end; its length if there is none."""
        n = len(self.held)
        longest = max(map(len, self.stop))
        for at in range(max(0, n - longest + 1), n):
            if any(len(s) > n - at and s.startswith(self.held[at:]) for s in self.stop):
                return at
        return n


class Said(NamedTuple):
    """Text that became certain: of the answer, of the reasoning, and as it was written; and of calls.

    `called`: (index in `written`, length) of each call in it.
    """

    text: str
    reasoning: str
    written: str
    calls: Sequence[ToolCallDelta] = ()
    called: Sequence[tuple[int, int]] = ()

    @property
    def uncalled(self) -> str | None:
        """What was written without the calls in it; None where there are none."""
        if not self.called:
            return None
        out = self.written
        for at, length in reversed(self.called):
            out = out[:at] + out[at + length :]
        return out


class Outlet:
    """Filter of a stream of text: the answer up to the first stop string in it, the reasoning before it, and
    the calls in both.
    """

    def __init__(
        self, stop: tuple[str, ...] = (), splitter: Splitter | None = None, caller: Caller | None = None
    ):
        """splitter: None takes everything for the answer. caller: None knows no calls."""
        self.splitter, self.matcher, self.caller = splitter, StopMatcher(stop), caller
        if caller is not None:
            caller.begins = self._begins
        self._answered = False
        self._waiting: deque[Piece] = deque()  # pieces of the answer that the matcher has, and what is behind

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.matcher.matched is not None

    @property
    def thinking(self) -> bool:
        """Whether reasoning is being written."""
        return self.splitter is not None and self.splitter.thinking

    @property
    def calls(self) -> list[ToolCall]:
        """The whole calls so far."""
        return self.caller.calls if self.caller else []

    @property
    def called(self) -> bool:
        """Whether all the calls have come that there may be."""
        return self.caller is not None and self.caller.enough

    def answers(self) -> None:
        """What comes from here on is the answer, whatever it looks like."""
        if self.splitter is not None:
            self.splitter.answers()

    def push(self, written: str) -> Said:
        """More of the stream."""
        if self.caller is not None:
            return self._without_calls(self.caller.push(written))
        return self._text(written)

    def recall(self, written: str) -> Said:
        """More of it that was said before, when other stop strings held: it is not stopped."""
        self.matcher.recalls = True
        said = self.push(written)
        self.matcher.recalls = False
        return said

    def flush(self) -> Said:
        """Its end."""
        said = self._without_calls(self.caller.flush()) if self.caller else Said("", "", "")
        if self.splitter is None:
            text = self.matcher.flush()
            return _joined(said, Said(text, "", text))
        first = self._pass(self.splitter.flush())
        text = self.matcher.flush()
        return _joined(said, _joined(first, self._said(text, "")))

    def _text(self, written: str) -> Said:
        if self.splitter is None:
            text = self.matcher.push(written)
            return Said(text, "", text)
        return self._pass(self.splitter.push(written))

    def _without_calls(self, parts: Iterable[Part]) -> Said:
        assert self.caller is not None
        out = Said("", "", "")
        for part in parts:
            if self.stopped or (self.called and not part.called):
                break
            said = self._call(part.text) if part.called else self._text(part.text)
            out = _joined(out, said)
            self._answered = self._answered or bool(said.text.strip())
        return out._replace(calls=self.caller.take())

    def _call(self, written: str) -> Said:
        """A call: what may have begun a stop string before it has not."""
        text = self.matcher.flush()
        if self.splitter is None:
            return Said(text, "", text + written, called=[(len(text), len(written))])
        self._waiting.append(Piece("call", "", "" if self.stopped else written))
        return self._said(text, "")

    def _begins(self) -> bool:
        """Whether nothing of the answer has come yet."""
        if self.splitter is not None and not self.splitter.fresh:
            return False
        return not self._answered and not self.matcher.held

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
        return self._said(text, reasoning)

    def _said(self, text: str, reasoning: str) -> Said:
        """Text of the answer that is certain, with what was written for it."""
        n, out = len(text), ""
        called: list[tuple[int, int]] = []
        while self._waiting:
            piece = self._waiting[0]
            if piece.kind == "answer":
                if len(piece.text) > n:
                    out += piece.written[:n]
                    self._waiting[0] = Piece("answer", piece.text[n:], piece.written[n:])
                    break
                n -= len(piece.text)
            elif piece.kind == "call":
                called.append((len(out), len(piece.written)))
            out += piece.written
            self._waiting.popleft()
        return Said(text, reasoning, out, called=called)


def _joined(a: Said, b: Said) -> Said:
    """One behind the other."""
    called = [*a.called, *((len(a.written) + at, n) for at, n in b.called)] if b.called else a.called
    return Said(a.text + b.text, a.reasoning + b.reasoning, a.written + b.written, a.calls or b.calls, called)


def cut_ids(
    tokenizer: Tokenizer, ids: list[int], text: str, shown: frozenset[int] = frozenset()
) -> list[int]:
    """The ids of an answer that a stop string cut to `text`: kept as generated up to the cut, re-encoded
    across it. shown: as for `StreamDecoder`.
    """
    for n in range(len(ids), -1, -1):
        head = tokenizer.decode(ids[:n], continued=True, shown=shown)
        if text.startswith(head):
            break
    return ids[:n] + tokenizer.encode(text[len(head) :], after=SOME_TEXT)  # it goes on from a prompt
