"""A widget that shows lines of styled spans: nothing is rendered but what is visible."""

from __future__ import annotations

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size
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


class Lines(Widget):
    """Subclasses give `layout_lines`. Text can be selected with the mouse."""

    def layout_lines(self, width: int) -> list[Line]:
        """All lines at that width. Called often: keep what does not change."""
        raise NotImplementedError

    @property
    def allow_select(self) -> bool:
        return True

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self.layout_lines(width)) if width else 0

    def render_line(self, y: int) -> Strip:
        """One line of those that are visible: only they are rendered."""
        width = self.content_size.width or self.size.width
        lines = self.layout_lines(width)
        base = self.visual_style.rich_style
        if y >= len(lines):
            return Strip.blank(width, base)
        line = lines[y]
        selection = self.text_selection
        strip = to_strip(line, base, palette_of(self.app.current_theme), width)
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
