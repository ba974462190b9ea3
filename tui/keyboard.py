"""Input of a terminal, as Textual's events: keys, pastes, the mouse, a new size.

Textual's parser wants text and believes it. Bytes that are no UTF-8, numbers that are no characters, sizes
that no terminal has and pastes without an end are dealt with here: nothing that arrives can end the program.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator

from textual import events
from textual._xterm_parser import XTermParser
from textual.message import Message

from tinychat.base.characters import ERRORS, whole

MOST_PASTE = 32_000_000  # bytes; what a paste has beyond is dropped
LONGEST_REPLY = 8192  # bytes of a terminal's answer (its colours, its clipboard), which nobody asked for here
LARGEST = (1000, 500)  # cells that are painted, whatever a terminal claims to have
BEGIN, END = b"\x1b[200~", b"\x1b[201~"

# A paste's beginning; a mouse report of the old kind, whose three bytes are numbers and no characters; enter
# with alt as tmux and most terminals send it, and with others as xterm does (modifyOtherKeys); a string that
# ends with BEL or ESC \.
_SPECIAL = re.compile(
    rb"(\x1b\[200~)|\x1b\[M([ -\xff]{3})|\x1b([\r\n]|\[27;[2-8];13~)"
    rb"|\x1b[\]P_^X][^\x07\x18\x1a\x1b]{0,%d}(?:\x07|\x1b\\)" % LONGEST_REPLY
)
_BEGUN = re.compile(
    rb"\x1b(?:\[(?:20{0,2}|2(?:7(?:;(?:[2-8](?:;(?:13?)?)?)?)?)?|M[ -\xff]{0,2})?"
    rb"|[\]P_^X][^\x07\x18\x1a\x1b]{0,%d}\x1b?)?\Z" % LONGEST_REPLY
)
_ENTERS = {b"2": "shift+enter", b"5": "ctrl+enter", b"6": "ctrl+shift+enter"}  # xterm's numbers of modifiers


class Keyboard:
    """Give it bytes as they come (`feed`), and tell it when none came for a while (`rest`)."""

    def __init__(self) -> None:
        self._parser = XTermParser()
        self._decode = codecs.getincrementaldecoder("utf-8")(ERRORS).decode
        self._held = b""
        self._paste: bytearray | None = None  # while one arrives

    @property
    def pasting(self) -> bool:
        """Whether a paste has begun and not ended."""
        return self._paste is not None

    @property
    def waits(self) -> bool:
        """Whether the beginning of something is here that may end with the next bytes."""
        return bool(self._held) or self._parser._timeout_time is not None

    def feed(self, data: bytes) -> Iterator[Message]:
        """The events of these bytes."""
        data, self._held = self._held + data, b""
        while data:
            if self._paste is not None:
                at = data.find(END)
                if at < 0:
                    keep = _overlap(data, END)
                    self._keep(data[: len(data) - keep])
                    self._held = data[len(data) - keep :]
                    return
                self._keep(data[:at])
                data = data[at + len(END) :]
                yield from self.end_paste()
            elif match := _SPECIAL.search(data):
                yield from self._text(data[: match.start()])
                data = data[match.end() :]
                if match[1]:
                    self._paste = bytearray()
                elif match[2]:
                    yield from self._old_mouse(match[2])
                elif match[3]:
                    yield events.Key(_ENTERS.get(match[3][4:5], "alt+enter"), None)
            else:
                begun = _BEGUN.search(data)
                at = begun.start() if begun else len(data)
                self._held = data[at:]
                yield from self._text(data[:at])
                return

    def rest(self) -> Iterator[Message]:
        """Nothing came for a moment: what has begun is all that comes."""
        held, self._held = self._held, b""
        yield from self._text(held)
        if self._parser._timeout_time is not None:
            self._parser._timeout_time = 0.0
            yield from self._guarded(self._parser.tick())

    def end_paste(self) -> Iterator[Message]:
        """Paste of what came, although its end may never have come."""
        if self._paste is not None:
            self._keep(self._held)
            data, self._paste, self._held = bytes(self._paste), None, b""
            yield events.Paste(data.decode("utf-8", ERRORS).replace("\0", ""))

    def _keep(self, pasted: bytes) -> None:
        if self._paste is not None:
            self._paste += pasted[: max(0, MOST_PASTE - len(self._paste))]

    def _old_mouse(self, numbers: bytes) -> Iterator[Message]:
        """The report in the form that Textual asked for and reads."""
        buttons, x, y = (n - 32 for n in numbers)
        if x > 0 and y > 0:
            yield from self._parsed(f"\x1b[<{buttons};{x};{y}M")

    def _text(self, data: bytes) -> Iterator[Message]:
        yield from self._parsed(self._decode(data))

    def _parsed(self, text: str) -> Iterator[Message]:
        # A character at a time: a sequence that the parser chokes on takes nothing else along.
        for char in text:
            yield from self._guarded(self._parser.feed(char))

    def _guarded(self, found: Iterable[Message]) -> Iterator[Message]:
        try:
            yield from self._checked(found)
        except Exception:  # numbers that are no characters, divisions by a size of zero
            self._renew()

    def _renew(self) -> None:
        old, self._parser = self._parser, XTermParser()
        self._parser.mouse_pixels = old.mouse_pixels
        self._parser.terminal_size, self._parser.terminal_pixel_size = (
            old.terminal_size,
            old.terminal_pixel_size,
        )

    def _checked(self, found: Iterable[Message]) -> Iterator[Message]:
        for event in found:
            if isinstance(event, events.Key):
                if event.character is not None:
                    event.character = whole(event.character)
                event.key = whole(event.key)
            elif isinstance(event, events.MouseEvent):
                if max(event.x, event.y) > max(LARGEST):
                    continue
            elif isinstance(event, events.Resize):
                size, pixels = event.size, event.pixel_size
                if not (size.area and pixels and pixels.area):
                    self._parser.terminal_size = self._parser.terminal_pixel_size = None
                if not size.area:
                    continue
                event = events.Resize.from_dimensions(bounded(*size), pixels)
            yield event


def _overlap(data: bytes, end: bytes) -> int:
    """Bytes at the end of `data` that `end` may begin with."""
    return next((n for n in range(min(len(end) - 1, len(data)), 0, -1) if data.endswith(end[:n])), 0)


def bounded(width: int, height: int) -> tuple[int, int]:
    """A size that can be painted."""
    return max(1, min(width, LARGEST[0])), max(1, min(height, LARGEST[1]))
