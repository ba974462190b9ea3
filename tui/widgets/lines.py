"""A widget that shows lines of styled spans: nothing is rendered but what is visible, and no line twice."""

from __future__ import annotations

from typing import Any

from rich.segment import Segment
from rich.style import Style
from textual.dom import NoScreen
from textual.geometry import Region, Size
from textual.reactive import var
from textual.selection import Selection
from textual.strip import Strip
from textual.widget import Widget

from tinychat.tui.text import Line, clean, plain, width_of
from tinychat.tui.theme import palette_of, resolve


def to_strip(line: Line, base: Style, palette: str, width: int) -> Strip:
    """A line as Textual paints it, cut and filled to `width`; harmless, whatever is in it."""
    segments, cells = [], 0
    for text, atoms in line:
        text = clean(text)
        segments.append(Segment(text, base + resolve(atoms, palette) if atoms else base))
        cells += width_of(text)
    return Strip(segments, cells).adjust_cell_length(width, base)


KEPT = 500  # strips of a widget


class Lines(Widget):
    """Subclasses give `layout_lines`. Text can be selected with the mouse."""

    # It never scrolls by itself; Widget's own would have the whole screen laid out again after each new line.
    virtual_size = var(Size(0, 0))

    def layout_lines(self, width: int) -> list[Line]:
        """All lines at that width. Called often: keep what does not change."""
        raise NotImplementedError

    @property
    def allow_select(self) -> bool:
        return True

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self.layout_lines(width)) if width else 0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._strips: dict[int, tuple[Line | None, Strip]] = {}  # what was painted at y, and of which line
        self._look: tuple[Any, ...] = ()  # all else that it depends on

    def render_lines(self, crop: Region) -> list[Strip]:
        """Render as Textual would, but a line that is still the same costs nothing, wherever it has scrolled
        to.

        A running answer grows by a line some times a second, and Textual forgets all lines of a widget whose
        size changes.
        """
        try:
            selected = self.text_selection is not None
        except NoScreen:  # it has just been removed, and is painted once more
            return [Strip.blank(crop.width)] * crop.height
        styles, gutter = self.styles, self.gutter
        plain = {styles.border_left[0], styles.border_right[0]} <= {"", "blank"}
        if selected or not plain or gutter.top or gutter.bottom or self.opacity != 1:
            return super().render_lines(crop)
        width, base, palette = self.outer_size.width, self.visual_style.rich_style, palette_of(self.app)
        content, filters = self.content_size.width or width, self.get_line_filters()
        look = (width, content, gutter, base, palette, self.background_colors, *filters)
        if look != self._look or len(self._strips) > KEPT:
            self._strips, self._look = {}, look
        lines, out = self.layout_lines(content), []
        for y in crop.line_range:
            line = lines[y] if y < len(lines) else None
            held = self._strips.get(y)
            if held is None or held[0] is not line:
                edge = Style(bgcolor=base.bgcolor)
                left, right = (Segment(" " * n, edge) for n in (gutter.left, gutter.right))
                inner = to_strip(line or [], base, palette, content).apply_offsets(0, y)
                strip = Strip([left, *inner, right], width)
                for line_filter in filters:
                    strip = strip.apply_filter(line_filter, self.background_colors[1])
                held = self._strips[y] = line, strip
            out.append(held[1])
        if crop.column_span != (0, width):
            out = [strip.crop(*crop.column_span) for strip in out]
        return out

    def repaint(self, before: list[Line], after: list[Line]) -> None:
        """Paint what differs between two layouts of the same height."""
        for y, (a, b) in enumerate(zip(before, after, strict=True)):
            if a is not b and a != b:
                self.refresh(Region(0, y, self.content_size.width, len(after) - y))
                return

    def render_line(self, y: int) -> Strip:
        """One line of those that are visible: only they are rendered."""
        width = self.content_size.width or self.size.width
        lines = self.layout_lines(width)
        base = self.visual_style.rich_style
        if y >= len(lines):
            return Strip.blank(width, base)
        line = lines[y]
        selection = self.text_selection
        strip = to_strip(line, base, palette_of(self.app), width)
        if selection is not None and (span := selection.get_span(y)) is not None:
            start, end = span
            style = self.screen.get_component_rich_style("screen--selection")
            text = plain(line)
            end = len(text) if end == -1 else min(end, len(text))
            cells = [width_of(text[:start]), width_of(text[:end])]
            before, chosen, after = strip.divide([*cells, strip.cell_length])
            chosen = Strip([Segment(t, (s or base) + style) for t, s, _ in chosen])
            strip = Strip.join([before, chosen, after])
        return strip.apply_offsets(0, y)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        lines = self.layout_lines(self.content_size.width or self.size.width)
        text = "\n".join(plain(line).rstrip() for line in lines)
        return selection.extract(text), "\n"

    def selection_updated(self, selection: Selection | None) -> None:
        self.refresh()
