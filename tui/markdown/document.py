"""A document that grows at its end.

It keeps *leaves*. Only the last block is parsed again when more text comes; a block that grows long is sealed
in pieces (items of a list, lines of a fence, rows of a table), so that the work for a token does not depend
on the length of the answer. Every step is bounded, so that a caller can spread a long text over many frames.
"""

from __future__ import annotations

import time

from tinychat.tui.markdown.blocks import Builder, ListState, language_of, parse
from tinychat.tui.markdown.leaves import Code, Leaf, Table
from tinychat.tui.text import clean

WINDOW = 3072  # an unfinished block of more characters is cut
BITE = 1536  # characters taken in one step
LONG_LINES = 16  # lines of an unfinished block from which on it is sealed in pieces


class Document:
    """Markdown that grows at its end. `append` text, then `advance` until it says that nothing is left to
    do.
    """

    def __init__(self) -> None:
        self.sealed: list[Leaf] = []
        self.live: list[Leaf] = []
        self.codes: list[str] = []
        self.table: Table | None = None  # the table that the tail continues
        self._table_head = ""
        self._list: ListState | None = None  # the list that the tail continues
        self._fence: tuple[str, int, str, int, int] | None = None  # mark, indent, language, block, pieces
        self._joined = False  # the tail goes on in the middle of a paragraph
        self._tail = ""
        self._waiting: list[str] = []
        self._ended = False
        self._live_codes = 0  # of `codes`, those that `live` has
        self._sealed_codes = 0  # of `codes`, those that the last step has sealed
        self._dirty = False

    def append(self, text: str) -> None:
        """More text."""
        if text:
            self._waiting.append(clean(text))
            self._dirty = True

    def end(self) -> None:
        """Nothing more will come."""
        self._ended = self._dirty = True

    def advance(self, seconds: float = 1e9) -> bool:
        """Work for about that long; True when everything appended is in `sealed` and `live`."""
        until = time.perf_counter() + seconds
        while self._dirty:
            self._step()
            if time.perf_counter() >= until:
                break
        return not self._dirty

    def new_code(self, text: str) -> int:
        """Register a code block; its number."""
        self.codes.append(text)
        return len(self.codes) - 1

    def _step(self) -> None:
        if self._waiting:
            text = "".join(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
            take = BITE
            if len(text) > BITE:
                newline = text.rfind("\n", 0, BITE)
                take = newline + 1 if newline > 0 else BITE
            self._tail += text[:take]
            self._waiting = [text[take:]] if text[take:] else []
        del self.codes[len(self.codes) - self._live_codes :]
        self._live_codes = 0
        final = self._ended and not self._waiting
        before = len(self._tail)
        known = len(self.codes)
        if self._fence is not None:
            self._advance_fence(final)
        else:
            self._advance_blocks(final)
        self._live_codes = 0 if final and not self._tail else len(self.codes) - known - self._sealed_codes
        # Go on while text waits, or while sealing something may let more be sealed.
        self._dirty = bool(self._waiting) or (bool(self._tail) and (final or len(self._tail) != before))

    def _advance_fence(self, final: bool) -> None:
        if self._fence is None:
            return
        mark, indent, language, block, pieces = self._fence
        lines = self._tail.split("\n")
        close = None
        for i, line in enumerate(lines[: None if final else -1]):
            stripped = line.strip()
            if (
                len(stripped) >= len(mark)
                and set(stripped) == {mark[0]}
                and len(line) - len(line.lstrip(" ")) <= 3
            ):
                close = i
                break
        body = lines[:close] if close is not None else lines

        def piece(part: list[str]) -> Code:
            text = "".join(_dedent(line, indent) + "\n" for line in part)
            return Code(text, language, block, pieces == 0, [], [], pieces == 0)

        self._sealed_codes = 0
        if close is not None or final:
            while body and close is None and not body[-1]:
                body.pop()
            if body or pieces == 0:
                self.sealed.append(piece(body))
            self.codes[block] += "".join(_dedent(line, indent) + "\n" for line in body)
            self._tail = "\n".join(lines[close + 1 :]) if close is not None else ""
            self._fence, self.live = None, []
            return
        long_line = len(body) == 1 and len(body[0]) > WINDOW
        if len(body) > 2 * LONG_LINES or long_line:
            n = 1 if long_line else _good_cut(body)
            if long_line:
                self.sealed.append(piece([body[0][:WINDOW]]))
                self.codes[block] += body[0][:WINDOW]
                self._tail = body[0][WINDOW:]
            else:
                self.sealed.append(piece(body[:n]))
                self.codes[block] += "".join(_dedent(line, indent) + "\n" for line in body[:n])
                self._tail = "\n".join(lines[n:])
            self._fence = (mark, indent, language, block, pieces + 1)
            body, pieces = body[n:], pieces + 1
        self.live = [piece(body)]

    def _advance_blocks(self, final: bool) -> None:
        self._sealed_codes = 0
        tokens = parse(self._table_head + self._tail, not final)
        if self.table is not None and (not tokens or tokens[0].type != "table_open"):
            self._forget()
            tokens = parse(self._tail, not final)
        lines = (self._table_head + self._tail).split("\n")
        if final or not tokens:
            self._seal(tokens)
            if final or len(self._tail) > WINDOW:
                self._tail = ""
            self.live = []
            return
        tops = [i for i, t in enumerate(tokens) if t.level == 0 and t.map and t.nesting >= 0]
        first, start = tokens[0], tokens[0].map[0]
        n_lines = len(lines) - start
        is_list = first.type in ("bullet_list_open", "ordered_list_open")
        items = (
            [i for i, t in enumerate(tokens) if t.type == "list_item_open" and t.level == 1]
            if is_list
            else []
        )
        if len(tops) > 1:
            self._seal(tokens[: tops[-1]])
            self._tail = "\n".join(lines[tokens[tops[-1]].map[0] :])
            self._show(tokens[tops[-1] :])
        elif first.type == "fence" and max(n_lines / LONG_LINES, len(self._tail) / WINDOW) > 1:
            self._forget()
            indent = len(lines[start]) - len(lines[start].lstrip(" "))
            self._fence = (first.markup, indent, language_of(first.info), self.new_code(""), 0)
            self._sealed_codes, self.live = 1, []
            self._tail = "\n".join(lines[start + 1 :])
        elif n_lines > LONG_LINES and len(items) > 1:
            self._seal_items(tokens, items, lines)
        elif first.type == "table_open" and n_lines > LONG_LINES + 4:
            self._seal_rows(lines[start:])
        elif len(self._tail) > WINDOW:
            newline = self._tail.rfind("\n", 0, WINDOW)
            space = self._tail.rfind(" ", WINDOW // 2, WINDOW)
            at = newline + 1 if newline > 0 else space + 1 if space > 0 else WINDOW
            self._seal(parse(self._tail[:at]))
            self._tail, self._joined = self._tail[at:], True
            self._show(parse(self._tail, True))
        else:
            self._show(tokens)

    def _seal_items(self, tokens: list, items: list[int], lines: list[str]) -> None:
        """All items of a list but the last, which may grow."""
        made = self._list or Builder(self).list_at(tokens, 0, None)
        sealed = tokens[: items[-1]]
        self._seal(sealed)
        self._list = ListState(made.ordered, made.number + len(items) - 1, made.loose, True)
        self._tail = "\n".join(lines[tokens[items[-1]].map[0] :])
        self._show([tokens[0], *tokens[items[-1] :]])

    def _seal_rows(self, lines: list[str]) -> None:
        """All rows of a table but the last few; its header is kept for the parser."""
        keep = LONG_LINES // 2
        leaves = self._seal(parse("\n".join(lines[:-keep])), forget=False)
        if self.table is None:
            self.table = next(leaf for leaf in leaves if isinstance(leaf, Table))
            self.table.open_ended = True
            self._table_head = "\n".join(lines[:2]) + "\n"
        self._tail = "\n".join(lines[-keep:])
        self._show(parse(self._table_head + self._tail, True))

    def _forget(self) -> None:
        self._list = self.table = None
        self._table_head, self._joined = "", False

    def _seal(self, tokens: list, forget: bool = True) -> list[Leaf]:
        known = len(self.codes)
        leaves = Builder(self).build(tokens, self._list)
        self._sealed_codes += len(self.codes) - known
        if leaves:
            if self._joined or not self.sealed:
                leaves[0].gap = False
            self.sealed += leaves
            if forget:
                self._forget()
        return leaves

    def _show(self, tokens: list) -> None:
        self.live = Builder(self).build(tokens, self._list)
        if self.live and (self._joined or not self.sealed):
            self.live[0].gap = False


def _dedent(line: str, indent: int) -> str:
    return line[min(indent, len(line) - len(line.lstrip(" "))) :]


def _good_cut(lines: list[str]) -> int:
    """Line at which code is best cut: before a line that is not indented and after an empty one, if there is
    such a place.
    """
    for i in range(len(lines) - 2, LONG_LINES, -1):
        if not lines[i - 1].strip() and lines[i][:1].strip():
            return i
    return len(lines) - 2
