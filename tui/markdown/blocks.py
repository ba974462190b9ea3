"""Blocks: the parser's tokens, with their nesting, turned into leaves."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Protocol

from tinychat.tui.markdown.formulas import add_math
from tinychat.tui.markdown.leaves import Code, Leaf, Paragraph, Rule, Table
from tinychat.tui.text import Line, width_of

SPECIALS = 300  # of these characters in one block, emphasis and links are no longer looked for (quadratic)
DEEPEST = 8  # levels of nesting that are still indented
_TASK = re.compile(r"^\[([ xX])\] ")
_LANGUAGE = re.compile(r"^[\w+#.-]{1,24}")


@lru_cache(2)
def _parser(inline: bool = True) -> Any:
    from markdown_it import MarkdownIt

    # No raw HTML (it is shown as it is written); no link definitions (they would vanish from the text); no
    # indented code (what follows a cut inside a list is indented too).
    options = {"html": False, "linkify": False, "typographer": False, "maxNesting": 20}
    parser = (
        MarkdownIt("commonmark", options).enable(["table", "strikethrough"]).disable(["code", "reference"])
    )
    add_math(parser)
    return parser if inline else parser.disable(["emphasis", "link", "image", "strikethrough", "backticks"])


def parse(source: str, live: bool = False) -> list:
    """markdown-it's tokens of a text. live: more of it may come."""
    return _parser(sum(map(source.count, "[*_`")) <= SPECIALS).parse(source, {"live": live})


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
        elif kind == "math_inline":
            out.append((t.content, f"{style} math"))
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


class ListState:
    """Place in a list: the number of its next item, whether its items stand apart, whether any was shown."""

    def __init__(self, ordered: bool, number: int, loose: bool, continued: bool):
        self.ordered, self.number, self.loose, self.empty = ordered, number, loose, not continued
        self.continued = continued


class Owner(Protocol):
    """Whom leaves are built for."""

    table: Table | None  # the table that the next rows continue

    def new_code(self, text: str) -> int:
        """Register a code block; its number."""


class Builder:
    """Turns markdown-it's tokens into leaves."""

    def __init__(self, owner: Owner):
        self.owner = owner
        self.leaves: list[Leaf] = []
        # ("quote", None), ("list", ListState), ("item", [marker, shown])
        self.frames: list[tuple[str, Any]] = []

    def prefixes(self) -> tuple[Line, Line]:
        """Prefixes of a leaf's first line and of its others: bars of quotes, an item's marker."""
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
        """Whether a blank line comes before the next leaf."""
        lists = [what for kind, what in self.frames if kind == "list"]
        if not lists:
            return True
        if lists[-1].empty:
            lists[-1].empty = False
            return len(lists) == 1 or lists[-2].loose
        return lists[-1].loose

    def build(self, tokens: list, continued: ListState | None) -> list[Leaf]:
        """The leaves of these tokens. A list at their beginning goes on with `continued`."""
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
                style = "math" if kind == "math_block" else ""
                self.leaves.append(Paragraph([(t.content.rstrip("\n"), style)], *self.prefixes(), gap))
            i += 1
        return self.leaves

    def list_at(self, tokens: list, i: int, continued: ListState | None) -> ListState:
        """The list that opens there; counting on where the one that it continues left off."""
        t = tokens[i]
        ordered = t.type == "ordered_list_open"
        if continued is not None and continued.ordered == ordered:
            return ListState(ordered, continued.number, continued.loose, True)
        loose = any(
            p.type == "paragraph_open" and p.level == t.level + 2 and not p.hidden
            for p in tokens[i : _closing(tokens, i)]
        )
        start = t.attrs.get("start", 1)
        return ListState(ordered, int(start), loose, False)

    def _paragraph(self, t: Any, heading: str) -> None:
        spans = inline_spans(t.children, heading)
        if any(kind == "item" for kind, _ in self.frames) and spans and (m := _TASK.match(spans[0][0])):
            spans[0] = (("☐ " if m[1] == " " else "☑ ") + spans[0][0][4:], spans[0][1])
        gap = self.gap()
        self.leaves.append(Paragraph(spans, *self.prefixes(), gap))

    def _code(self, t: Any) -> None:
        gap = self.gap()
        block = self.owner.new_code(t.content)
        self.leaves.append(Code(t.content, language_of(t.info), block, True, *self.prefixes(), gap))

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
        start = self.owner.table if i == 0 else None
        self.leaves.append(Table(rows, aligns, start, *self.prefixes(), gap and start is None))
        return end


def _closing(tokens: list, i: int) -> int:
    level, kind = tokens[i].level, tokens[i].type.replace("_open", "_close")
    for j in range(i + 1, len(tokens)):
        if tokens[j].level == level and tokens[j].type == kind:
            return j
    return len(tokens)


def language_of(info: str) -> str:
    match = _LANGUAGE.match(info.strip())
    return match[0] if match else ""
