"""Filter of a stream of text that takes the calls out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tinychat.base.events import ToolCall, ToolCallDelta
from tinychat.text.calls.json_text import DamagedError
from tinychat.text.calls.objects import BARE
from tinychat.text.calls.source import Source, Waiting
from tinychat.text.calls.syntax import Found, Syntax


class Part(NamedTuple):
    """Text of the answer or the reasoning, or (part of) a call, of which `text` is what was written."""

    text: str
    called: bool = False


class Caller:
    """Feed it what a model writes as it comes; it gives back what is certain. What turns out to be no call is
    text, as it was written, and so is a call that never ends: nothing is lost.

    White space that stands between a call and what is not text belongs to the call.
    """

    def __init__(
        self,
        syntax: Syntax,
        tools: Mapping[str, Any],
        shown: frozenset[int] = frozenset(),
        most: int | None = None,
    ):
        """tools: parameters (JSON schema) of each tool by name. shown: control tokens that mark calls. most:
        calls in one answer.
        """
        self.syntax, self.shown = syntax, shown
        self.begins: Callable[[], bool] = lambda: True  # whether the answer begins behind what was passed
        self._source = Source()
        self._found = Found(self._source, tools, known_only=syntax.bare, most=most)
        self._reading: Waiting | None = None
        self._opens = (*syntax.opens, *BARE) if syntax.bare else syntax.opens

    @property
    def calls(self) -> list[ToolCall]:
        """The whole calls so far."""
        return self._found.whole

    @property
    def enough(self) -> bool:
        """Whether no further call may come."""
        return self._found.enough

    def take(self) -> list[ToolCallDelta]:
        """The pieces of calls that came since the last time."""
        return self._found.take()

    def push(self, written: str) -> Iterator[Part]:
        """Parts that are certain now. Each is to be used before the next one is asked for."""
        self._source.text += written
        while True:
            if self._reading is None:
                yield from self._plain()
                if self._reading is None:
                    return
            yield from self._read()
            if self._reading is not None:
                return

    def flush(self) -> Iterator[Part]:
        """The stream has ended: what was held back is what it looks like."""
        source = self._source
        if self.enough:  # what stands behind the last call was never to be written
            yield Part("".join([*source.passed, *source.raw, source.text]), called=True)
            return
        source.ended = True
        while source.text or self._reading:
            yield from self.push("")

    def _plain(self) -> Iterator[Part]:
        """Text up to where a call may begin; then `_reading` is set."""
        source = self._source
        while source.text and self._reading is None:
            text = source.text
            stop = min((at for o in self._opens if (at := text.find(o)) >= 0), default=None)
            head = text[: self._held() if stop is None else stop]
            kept = len(head.rstrip())
            if stop is None and source.ended:
                kept = len(head)
            source.text = text[kept:]
            if kept:
                yield Part(head[:kept], called=bool(self.calls) and not head.strip())
            if stop is None:
                return
            opened, source.text = text[kept:stop], text[stop:]
            if source.text.startswith(self.syntax.opens) or self.begins():
                source.raw, source.passed = [opened], []
                self._reading = self.syntax.read(source, self._found)
            else:
                opened, source.text = opened + source.text[0], source.text[1:]
                yield Part(opened)

    def _held(self) -> int:
        """Index at which what may begin a call begins."""
        text = self._source.text
        if self._source.ended:
            return len(text)
        longest = max(map(len, self._opens))
        for at in range(max(0, len(text) - longest + 1), len(text)):
            if any(o.startswith(text[at:]) for o in self._opens):
                return at
        return len(text)

    def _read(self) -> Iterator[Part]:
        """Go on with the call that is being read."""
        assert self._reading is not None
        source = self._source
        try:
            next(self._reading)
            return
        except StopIteration:
            source.sure()
        except DamagedError:
            self._found.damage()
            if not source.passed and not "".join(source.raw).strip():
                source.take(1)
        self._reading = None
        passed, raw = "".join(source.passed), "".join(source.raw)
        source.passed, source.raw = [], []
        if passed:
            yield Part(passed, called=True)
        if raw:
            yield Part(raw)
