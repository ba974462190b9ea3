"""The line at the bottom: what runs, how fast, how full. What does not fit is left out, the least
important first.
"""

from __future__ import annotations

from typing import Any

from tinychat.tui.text import Line, line_width, short_name, shorten
from tinychat.tui.widgets.lines import Lines
from tinychat.tui.widgets.turn import human_size, seconds

MUCH, NEARLY = 0.75, 0.9  # of the context: it is seen, and what comes then is said
METER = 8  # cells of the bar
WIDE = 70  # cells of a line that has room for it


class StatusLine(Lines):
    """Give it facts with `tell`."""

    def __init__(self) -> None:
        super().__init__(id="status")
        self.facts: dict[str, Any] = {}
        self._shown: tuple[int, list[Line]] | None = None

    def tell(self, **facts: Any) -> None:
        """Facts that are new; None removes one. Paints only if something changed."""
        changed = {k: v for k, v in facts.items() if self.facts.get(k) != v}
        if changed:
            self.facts.update(changed)
            before = self._shown
            self._shown = None
            if before is None or self.layout_lines(before[0]) != before[1]:
                self.refresh()

    @property
    def allow_select(self) -> bool:
        return False

    def layout_lines(self, width: int) -> list[Line]:
        if self._shown is None or self._shown[0] != width:
            self._shown = (width, [self._line(width)])
        return self._shown[1]

    def _line(self, width: int) -> Line:
        parts = self._parts(width >= WIDE)
        while True:
            line: Line = []
            for _, span in sorted(parts, key=lambda p: p[0][1]):
                if line:
                    line.append((" · ", "faint"))
                line.append(span)
            if line_width(line) <= width or len(parts) == 1:
                break
            parts.remove(max(parts, key=lambda p: p[0][0]))
        if line and line_width(line) > width:
            line = [(shorten(line[0][0], width), line[0][1])]
        return line

    def _parts(self, wide: bool) -> list[tuple[tuple[int, int], tuple[str, str]]]:
        """((importance, place), span): the highest importance number goes first when room is short."""
        f = self.facts
        out = [((0, 0), (f.get("state") or "ready", "strong"))]

        def add(importance: int, text: str, style: str = "") -> None:
            out.append(((importance, len(out)), (text, style)))

        if f.get("unsaved"):
            add(1, "not stored", "bad")
        if f.get("model"):
            add(4, short_name(str(f["model"])), "strong")
        if f.get("backend"):
            add(5, f["backend"] + (f" {f['isa']}" if f.get("isa") else ""), "faint")
        if f.get("rate"):
            add(2, f"{f['rate']:.1f} tok/s", "marker")
        if f.get("ttft"):
            add(6, f"first token {seconds(f['ttft'])}", "faint")
        if f.get("evicted"):  # such a chat never gets full
            add(2, f"context {f.get('used', 0)}, {f['evicted']} evicted", "faint")
        elif f.get("ctx"):
            used, total = f.get("used", 0), f["ctx"]
            style = "bad" if used > NEARLY * total else "notice" if used > MUCH * total else "faint"
            add(1, f"context {meter(used / total) if wide else ''}{used}/{total}", style)
            if style != "faint" and f.get("evicts") is not None:
                add(
                    1 if style == "bad" else 3, "then it forgets" if f["evicts"] else "then it is full", style
                )
        if f.get("kv_bytes"):
            add(9, f"KV {human_size(f['kv_bytes'])}", "faint")
        if f.get("accepted") is not None:
            add(8, f"drafts {f['accepted']:.0%}", "faint")
        if f.get("memory"):
            add(10, f"memory {human_size(f['memory'])}", "faint")
        if f.get("cpu") is not None:
            add(11, f"CPU {f['cpu']:.0f} %", "faint")
        return out


def meter(share: float) -> str:
    """A share as a bar, and a space behind it."""
    n = min(METER, round(share * METER))
    return "█" * n + "░" * (METER - n) + " "
