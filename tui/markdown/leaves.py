"""Leaves: pieces of a document without structure inside. Each lays itself out at a width."""

from __future__ import annotations

from tinychat.tui.markdown.highlight import highlight
from tinychat.tui.text import Line, fold, line_width, pad, width_of, wrap


class Leaf:
    """`first` and `rest` go before its lines; `gap`: a blank line comes before it."""

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
        """The code, highlighted once, folded to a width."""
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
        """The rows, their columns narrowed to a width."""
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
            wrapped = [wrap(cell, w) for cell, w in zip(row, widths, strict=True)]
            for y in range(max(map(len, wrapped))):
                line: Line = []
                for x, (lines, w) in enumerate(zip(wrapped, widths, strict=True)):
                    part = lines[y] if y < len(lines) else []
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
