"""Pictures of the screen as text, compared with those that were approved (`tests/tui/snapshots`).

TINYCHAT_UPDATE_SNAPSHOTS=1 writes the files anew; look at the difference before committing it. A file holds
the text of the screen, then for each line its runs of equal style.
"""

from __future__ import annotations

import os
import time
from itertools import groupby
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "tui" / "snapshots"


def picture(app) -> str:
    """Text and styles of every cell."""
    strips = app.screen._compositor.render_strips()
    texts = ["".join(s.text for s in strip).rstrip() for strip in strips]
    styles = []
    for y, strip in enumerate(strips):
        runs = []
        for style, segments in groupby(strip, key=lambda s: look(s.style)):
            width = sum(s.cell_length for s in segments)
            runs.append(f"{width}×{style}")
        styles.append(f"{y}: " + " ".join(runs))
    return "\n".join([*texts, "", *styles]) + "\n"


def look(style) -> str:
    """Colours and attributes of a cell."""
    if style is None:
        return "-"
    parts = [c.triplet.hex if c is not None and c.triplet else "-" for c in (style.color, style.bgcolor)]
    flags = "".join(
        letter
        for letter, on in (
            ("b", style.bold),
            ("d", style.dim),
            ("i", style.italic),
            ("u", style.underline),
            ("s", style.strike),
            ("r", style.reverse),
        )
        if on
    )
    return "/".join(parts) + (f"+{flags}" if flags else "")


async def compare(name: str, app, pilot, seconds: float = 20.0) -> None:
    """The screen comes to look as it was approved."""
    path, until = FOLDER / f"{name}.txt", time.monotonic() + seconds
    if os.environ.get("TINYCHAT_UPDATE_SNAPSHOTS"):
        await pilot.pause(0.3)
        FOLDER.mkdir(exist_ok=True)
        path.write_text(picture(app), encoding="utf-8")
    approved = path.read_text(encoding="utf-8")
    while (shown := picture(app)) != approved and time.monotonic() < until:
        await pilot.pause(0.02)
    assert shown == approved, f"{name} looks different; see this file's docstring"
