"""Markdown as it streams in: what is complete is laid out once and never again.

A `Document` takes text in pieces and keeps *leaves* (paragraph, code, table, rule), each of which can lay
itself out at a width. Only the last block is parsed again when more text comes; a block that grows long is
sealed in pieces (items of a list, lines of a fence, rows of a table), so that the work for a token does not
depend on the length of the answer. Every step is bounded, so that a caller can spread a long text over many
frames.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from tinychat.tui.text import Line, Span, clean, fold, line_width, pad, width_of, wrap

WINDOW = 3072  # an unfinished block of more characters is cut
BITE = 1536  # characters taken in one step
SPECIALS = 300  # of these characters in one block, emphasis and links are no longer looked for (quadratic)
LONG_LINES = 16  # lines of an unfinished block from which on it is sealed in pieces
DEEPEST = 8  # levels of nesting that are still indented
_FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,})[ \t]*([^\n`]*)$")
_TASK = re.compile(r"^\[([ xX])\] ")
_LANGUAGE = re.compile(r"^[\w+#.-]{1,24}")


class Leaf:
    """A piece of a document without structure inside. `first` and `rest` go before its lines; `gap`: a blank
    line comes before it.
    """

    def __init__(self, first: Line, rest: Line, gap: bool):
        self.first, self.rest, self.gap = first, rest, gap

    def body(self, width: int) -> list[Line]:
        """Its lines, `width` cells wide at most."""
        raise NotImplementedError

    def lines(self, width: int) -> list[Line]:
        """Its lines with what goes before them."""
        inner = self.body(max(10, width - line_width(self.rest)))
        out: list[Line] = [[]] if self.gap else []
        if not self.first and not self.rest:
            return out + inner
        before = self.first
        for line in inner:
            out.append([*before, *line])
            before = self.rest
        return out


class Paragraph(Leaf):
    """Running text: a line for every newline in it, wrapped between words."""

    def __init__(self, spans: Line, first: Line, rest: Line, gap: bool):
        super().__init__(first, rest, gap)
        self.spans = spans

    def body(self, width: int) -> list[Line]:
        out: list[Line] = []
        line: Line = []
        for text, style in self.spans:
            while "\n" in text:
                head, text = text.split("\n", 1)
                out += wrap([*line, (head, style)] if head else line, width)
                line = []
            if text:
                line.append((text, style))
        return out + wrap(line, width)


class Code(Leaf):
    """Lines of a fence. `block` numbers the fence in the document; only its first piece has the heading."""

    def __init__(
        self, text: str, language: str, block: int, heading: bool, first: Line, rest: Line, gap: bool
    ):
        super().__init__(first, rest, gap)
        self.source, self.language, self.block, self.heading = text, language, block, heading
        self._highlighted: list[Line] | None = None

    def body(self, width: int) -> list[Line]:
        if self._highlighted is None:
            self._highlighted = highlight(self.source, self.language)
        out: list[Line] = []
        if self.heading:
            label = f" {self.language}" if self.language else " text"
            buttons = [
                ("copy", f"codeblock codehead @copy_code({self.block})"),
                (" ", "codeblock"),
                ("save", f"codeblock codehead @save_code({self.block})"),
                (" ", "codeblock"),
            ]
            room = width - 10 - width_of(label)
            out.append(
                [(label, "codeblock codehead"), (" " * max(1, room), "codeblock"), *buttons][
                    : 2 + 4 * (room > 0)
                ]
            )
        for line in self._highlighted:
            for piece in fold(line, width - 2):
                out.append(pad([(" ", "codeblock"), *piece], width, "codeblock"))
        return out


class Table(Leaf):
    """Rows of cells. A piece that continues another takes its column widths and shows no header."""

    def __init__(
        self, rows: list[list[Line]], aligns: list[str], start: Table | None, first, rest, gap: bool
    ):
        super().__init__(first, rest, gap)
        self.rows, self.aligns, self.start = rows, aligns, start
        self.open_ended = False  # more rows come in other pieces

    def widths(self, width: int) -> list[int] | None:
        """Cells of each column; None when they do not fit at all."""
        if self.start is not None:
            return self.start.widths(width)
        n = len(self.aligns)
        room = width - 3 * (n - 1)
        if room < 3 * n:
            return None
        natural = [max(1, *(line_width(row[i]) for row in self.rows)) for i in range(n)]
        if self.open_ended:
            natural = [w + 2 + w // 4 for w in natural]
        while sum(natural) > room:
            widest = max(natural)
            others = max((w for w in natural if w < widest), default=3)
            count = natural.count(widest)
            target = max(others, widest - -(-(sum(natural) - room) // count), 3)
            natural = [target if w == widest else w for w in natural]
        return natural

    def body(self, width: int) -> list[Line]:
        widths = self.widths(width)
        out: list[Line] = []
        for i, row in enumerate(self.rows):
            if self.start is not None and i == 0:
                continue  # the header, repeated for the parser only
            if widths is None:
                joined: Line = []
                for cell in row:
                    joined += [*cell, (" | ", "faint")]
                out += wrap(joined[:-1], width)
                continue
            cells = [wrap(cell, w) for cell, w in zip(row, widths, strict=True)]
            for y in range(max(map(len, cells))):
                line: Line = []
                for x, (cell, w) in enumerate(zip(cells, widths, strict=True)):
                    part = cell[y] if y < len(cell) else []
                    if i == 0:
                        part = [(t, f"{s} strong") for t, s in part]
                    space = w - line_width(part)
                    left = {"right": space, "center": space // 2}.get(self.aligns[x], 0)
                    line += [(" " * left, ""), *part, (" " * (space - left), "")]
                    if x < len(widths) - 1:
                        line.append((" │ ", "faint"))
                out.append(line)
            if i == 0:
                out.append([("─┼─".join("─" * w for w in widths), "faint")])
        return out


class Rule(Leaf):
    """A line across."""

    def body(self, width: int) -> list[Line]:
        return [[("─" * min(width, 60), "faint")]]


@lru_cache(2)
def _parser(inline: bool = True) -> Any:
    from markdown_it import MarkdownIt

    # No raw HTML (it is shown as it is written); no link definitions (they would vanish from the text); no
    # indented code (what follows a cut inside a list is indented too).
    options = {"html": False, "linkify": False, "typographer": False, "maxNesting": 20}
    parser = (
        MarkdownIt("commonmark", options).enable(["table", "strikethrough"]).disable(["code", "reference"])
    )
    return parser if inline else parser.disable(["emphasis", "link", "image", "strikethrough", "backticks"])


def _parse(source: str) -> list:
    return _parser(sum(map(source.count, "[*_`")) <= SPECIALS).parse(source)


def warm_up() -> None:
    """Load the parser and the highlighter, which takes a moment the first time."""
    _parse("*a*")
    highlight("a", "python")


def inline_spans(children: list | None, base: str) -> Line:
    """Spans of an inline token's children."""
    out: Line = []
    styles = [base]
    links: list[tuple[str, int]] = []
    for t in children or []:
        kind = t.type
        style = styles[-1]
        if kind == "text":
            if t.content:
                out.append((t.content, style))
        elif kind in ("softbreak", "hardbreak"):
            out.append(("\n", style))
        elif kind == "code_inline":
            out.append((t.content, f"{style} code"))
        elif kind == "image":
            out.append((f"[{t.content or 'image'}] ({t.attrs.get('src', '')})", f"{style} url"))
        elif kind == "link_open":
            links.append((str(t.attrs.get("href", "")), len(out)))
            styles.append(f"{style} link")
        elif kind == "link_close":
            styles.pop()
            href, start = links.pop()
            said = "".join(text for text, _ in out[start:])
            if href and href not in (said, f"mailto:{said}"):
                out.append((f" ({href})", f"{styles[-1]} url"))
        elif kind.endswith("_open"):
            styles.append(f"{style} {kind[:-5]}")
        elif kind.endswith("_close"):
            styles.pop()
        elif t.content:
            out.append((t.content, style))
    return out


class _List:
    def __init__(self, ordered: bool, number: int, loose: bool, continued: bool):
        self.ordered, self.number, self.loose, self.empty = ordered, number, loose, not continued
        self.continued = continued


class _Builder:
    """Turns markdown-it's tokens into leaves."""

    def __init__(self, document: Document):
        self.document = document
        self.leaves: list[Leaf] = []
        self.frames: list[tuple[str, Any]] = []  # ("quote", None), ("list", _List), ("item", [marker, shown])

    def prefixes(self) -> tuple[Line, Line]:
        first: Line = []
        rest: Line = []
        for depth, (kind, what) in enumerate(self.frames, 1):
            if kind == "quote":
                bar = [("▎ ", "quotebar")] if depth <= DEEPEST else []
                first, rest = first + bar, rest + bar
            elif kind == "item":
                marker, shown = what
                blank = [(" " * width_of(marker), "")] if depth <= DEEPEST else []
                first = first + ([(marker, "marker")] if not shown else blank)
                rest = rest + blank
                what[1] = True
        return first, rest

    def gap(self) -> bool:
        lists = [what for kind, what in self.frames if kind == "list"]
        if not lists:
            return True
        if lists[-1].empty:
            lists[-1].empty = False
            return len(lists) == 1 or lists[-2].loose
        return lists[-1].loose

    def build(self, tokens: list, continued: _List | None) -> list[Leaf]:
        heading = ""
        i = 0
        while i < len(tokens):
            t = tokens[i]
            kind = t.type
            if kind == "blockquote_open":
                self.frames.append(("quote", None))
            elif kind in ("bullet_list_open", "ordered_list_open"):
                self.frames.append(("list", self.list_at(tokens, i, continued if i == 0 else None)))
            elif kind == "list_item_open":
                owner = self.frames[-1][1]
                marker = f"{owner.number}. " if owner.ordered else "• "
                owner.number += 1
                self.frames.append(("item", [marker, False]))
            elif kind in ("blockquote_close", "bullet_list_close", "ordered_list_close"):
                self.frames.pop()
            elif kind == "list_item_close":
                _, (_, shown) = self.frames[-1]
                if not shown:  # an empty item
                    gap = self.gap()
                    self.leaves.append(Paragraph([], *self.prefixes(), gap))
                self.frames.pop()
            elif kind == "heading_open":
                heading = f"heading {t.tag}"
            elif kind == "heading_close":
                heading = ""
            elif kind == "inline":
                self._paragraph(t, heading)
            elif kind in ("fence", "code_block"):
                self._code(t)
            elif kind == "hr":
                gap = self.gap()
                self.leaves.append(Rule(*self.prefixes(), gap))
            elif kind == "table_open":
                i = self._table(tokens, i)
            elif t.content:
                gap = self.gap()
                self.leaves.append(Paragraph([(t.content.rstrip("\n"), "")], *self.prefixes(), gap))
            i += 1
        return self.leaves

    def list_at(self, tokens: list, i: int, continued: _List | None) -> _List:
        """The list that opens there; counting on where the one that it continues left off."""
        t = tokens[i]
        ordered = t.type == "ordered_list_open"
        if continued is not None and continued.ordered == ordered:
            return _List(ordered, continued.number, continued.loose, True)
        loose = any(
            p.type == "paragraph_open" and p.level == t.level + 2 and not p.hidden
            for p in tokens[i : _closing(tokens, i)]
        )
        start = t.attrs.get("start", 1)
        return _List(ordered, int(start), loose, False)

    def _paragraph(self, t: Any, heading: str) -> None:
        spans = inline_spans(t.children, heading)
        if any(kind == "item" for kind, _ in self.frames) and spans and (m := _TASK.match(spans[0][0])):
            spans[0] = (("☐ " if m[1] == " " else "☑ ") + spans[0][0][4:], spans[0][1])
        gap = self.gap()
        self.leaves.append(Paragraph(spans, *self.prefixes(), gap))

    def _code(self, t: Any) -> None:
        gap = self.gap()
        block = self.document.new_code(t.content)
        self.leaves.append(Code(t.content, _language(t.info), block, True, *self.prefixes(), gap))

    def _table(self, tokens: list, i: int) -> int:
        end = _closing(tokens, i)
        rows: list[list[Line]] = []
        aligns: list[str] = []
        for t in tokens[i:end]:
            if t.type == "tr_open":
                rows.append([])
            elif t.type in ("th_open", "td_open") and len(rows) == 1:
                aligns.append(str(t.attrs.get("style", "")).replace("text-align:", ""))
            elif t.type == "inline":
                rows[-1].append(inline_spans(t.children, ""))
        rows = [(row + [[] for _ in aligns])[: len(aligns)] for row in rows]
        gap = self.gap()
        start = self.document.table if i == 0 else None
        self.leaves.append(Table(rows, aligns, start, *self.prefixes(), gap and start is None))
        return end


def _closing(tokens: list, i: int) -> int:
    level, kind = tokens[i].level, tokens[i].type.replace("_open", "_close")
    for j in range(i + 1, len(tokens)):
        if tokens[j].level == level and tokens[j].type == kind:
            return j
    return len(tokens)


def _language(info: str) -> str:
    match = _LANGUAGE.match(info.strip())
    return match[0] if match else ""


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
        self._list: _List | None = None  # the list that the tail continues
        self._fence: tuple[str, int, str, int, int] | None = None  # mark, indent, language, block, pieces
        self._joined = False  # the tail goes on in the middle of a paragraph
        self._tail = ""
        self._waiting: list[str] = []
        self._ended = False
        self._live_codes = 0
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

    _sealed_codes = 0

    def _advance_fence(self, final: bool) -> None:
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
        tokens = _parse(self._table_head + self._tail)
        if self.table is not None and (not tokens or tokens[0].type != "table_open"):
            self._forget()
            tokens = _parse(self._tail)
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
            opening = _FENCE.match(lines[start])
            self._fence = (opening[2], len(opening[1]), _language(opening[3]), self.new_code(""), 0)
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
            self._seal(_parse(self._tail[:at]))
            self._tail, self._joined = self._tail[at:], True
            self._show(_parse(self._tail))
        else:
            self._show(tokens)

    def _seal_items(self, tokens: list, items: list[int], lines: list[str]) -> None:
        """All items of a list but the last, which may grow."""
        made = self._list or _Builder(self).list_at(tokens, 0, None)
        sealed = tokens[: items[-1]]
        self._seal(sealed)
        self._list = _List(made.ordered, made.number + len(items) - 1, made.loose, True)
        self._tail = "\n".join(lines[tokens[items[-1]].map[0] :])
        self._show([tokens[0], *tokens[items[-1] :]])

    def _seal_rows(self, lines: list[str]) -> None:
        """All rows of a table but the last few; its header is kept for the parser."""
        keep = LONG_LINES // 2
        leaves = self._seal(_parse("\n".join(lines[:-keep])), forget=False)
        if self.table is None:
            self.table = next(leaf for leaf in leaves if isinstance(leaf, Table))
            self.table.open_ended = True
            self._table_head = "\n".join(lines[:2]) + "\n"
        self._tail = "\n".join(lines[-keep:])
        self._show(_parse(self._table_head + self._tail))

    def _forget(self) -> None:
        self._list = self.table = None
        self._table_head, self._joined = "", False

    def _seal(self, tokens: list, forget: bool = True) -> list[Leaf]:
        known = len(self.codes)
        leaves = _Builder(self).build(tokens, self._list)
        self._sealed_codes += len(self.codes) - known
        if leaves:
            if self._joined or not self.sealed:
                leaves[0].gap = False
            self.sealed += leaves
            if forget:
                self._forget()
        return leaves

    def _show(self, tokens: list) -> None:
        self.live = _Builder(self).build(tokens, self._list)
        if self.live and (self._joined or not self.sealed):
            self.live[0].gap = False


def _dedent(line: str, indent: int) -> str:
    return line[min(indent, len(line) - len(line.lstrip(" "))) :]


def _good_cut(lines: list[str]) -> int:
    """Where code is best cut: before a line that is not indented and after an empty one, if there is such
    a place.
    """
    for i in range(len(lines) - 2, LONG_LINES, -1):
        if not lines[i - 1].strip() and lines[i][:1].strip():
            return i
    return len(lines) - 2


# Code

_TOKEN_STYLES = (
    ("Comment", "tok-comment"),
    ("Keyword", "tok-keyword"),
    ("Literal.String", "tok-string"),
    ("Literal.Number", "tok-number"),
    ("Name.Function", "tok-function"),
    ("Name.Class", "tok-function"),
    ("Name.Decorator", "tok-function"),
    ("Name.Builtin", "tok-builtin"),
    ("Name.Tag", "tok-keyword"),
    ("Name.Attribute", "tok-builtin"),
    ("Operator.Word", "tok-keyword"),
    ("Generic.Inserted", "tok-string"),
    ("Generic.Deleted", "tok-number"),
    ("Generic.Heading", "tok-function"),
)


@lru_cache(512)
def _token_style(kind: Any) -> str:
    name = str(kind).removeprefix("Token.")
    return next(
        (f"codeblock {style}" for prefix, style in _TOKEN_STYLES if name.startswith(prefix)), "codeblock"
    )


@lru_cache(32)
def _lexer(language: str) -> Any:
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


def highlight(text: str, language: str) -> list[Line]:
    """Code as styled lines, tabs expanded."""
    text = text.removesuffix("\n").expandtabs(4)
    lexer = _lexer(language.lower()) if language and len(text) <= 4 * WINDOW else None
    if lexer is None or max(map(len, text.split("\n"))) > 1000:
        return [[(line, "codeblock")] for line in text.split("\n")]
    lines: list[Line] = [[]]
    for style, value in _tokens(lexer, text):
        parts = value.split("\n")
        for i, part in enumerate(parts):
            if i:
                lines.append([])
            if part:
                lines[-1].append((part, style))
    return lines


def _tokens(lexer: Any, text: str) -> Iterator[Span]:
    for kind, value in lexer.get_tokens(text):
        yield _token_style(kind), value
