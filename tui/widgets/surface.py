"""A background that others lie on: cheap to paint again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

# Not a Widget where it runs: Textual finds default styles and bindings through the first base that is one.
if TYPE_CHECKING:
    Mixin = Widget
else:
    Mixin = object


class Surface(Mixin):
    """Mix into a container without a border. Textual renders every line of each container below whatever has
    changed; here a line is rendered once for all.
    """

    def render_lines(self, crop: Region) -> list[Strip]:
        """The same blank line, `crop.height` times."""
        strip = Strip.blank(crop.width, Style(bgcolor=self.visual_style.rich_style.bgcolor))
        for line_filter in self.get_line_filters():
            strip = strip.apply_filter(line_filter, self.background_colors[1])
        return [strip] * crop.height


class Row(Surface, Widget):
    """Children side by side, over all the room there is."""

    DEFAULT_CSS = "Row { layout: horizontal; width: 1fr; height: 1fr; overflow: hidden hidden; }"


class Column(Surface, Widget):
    """Children below each other, over all the room there is."""

    DEFAULT_CSS = "Column { layout: vertical; width: 1fr; height: 1fr; overflow: hidden hidden; }"
