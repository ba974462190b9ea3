"""The screen, cell by cell, at three sizes and in three themes, against what was approved.

TINYCHAT_UPDATE_SNAPSHOTS=1 writes the files anew; look at the difference before committing it. A file holds
the text of the screen, then for each line its runs of equal style.
"""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path

import pytest
import textual
from scripted import Script, wait_until
from tui_helpers import answered, make_app, say

from tinychat.tui.theme import THEMES

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(textual.__version__ != "8.2.8", reason="snapshots are of Textual 8.2.8"),
]
FOLDER = Path(__file__).parent / "snapshots"
ANSWER = """<think>Keep it brief.</think>

## Reversing a list

Python has **three** usual ways; the slice is the *shortest*:

```python
def reverse(items: list) -> list:
    # a new list
    return items[::-1]
```

| way | new list | in place |
|-----|:--------:|---------:|
| `items[::-1]` | yes | no |
| `items.reverse()` | no | yes |

1. Use the slice for small lists.
2. Or `reversed`.
   - [x] no copy

> Strings have no `reverse`. See [the docs](https://docs.python.org).
"""


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


def compare(name: str, shown: str) -> None:
    path = FOLDER / f"{name}.txt"
    if os.environ.get("TINYCHAT_UPDATE_SNAPSHOTS"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(shown, encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8"), f"{name} looks different; see this file's docstring"


async def talk(pilot) -> None:
    await say(pilot, "How do I reverse a list?\nBriefly.")
    await answered(pilot)
    await wait_until(pilot, lambda: not pilot.app.chat.transcript.turns[-1].running)


@pytest.mark.parametrize("theme", [t.name for t in THEMES])
@pytest.mark.parametrize("size", [(60, 20), (100, 36), (200, 60)])
async def test_a_conversation(store, theme, size, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    app = make_app(store, Script(ANSWER, 30))
    app.theme = theme
    async with app.run_test(size=size) as pilot:
        await talk(pilot)
        await pilot.pause(0.1)
        compare(f"{theme}-{size[0]}x{size[1]}", picture(app))


@pytest.mark.parametrize("key", ["f1", "f2", "ctrl+o", "ctrl+t", "ctrl+b"])
async def test_what_opens_over_it(store, key, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    app = make_app(store, Script(ANSWER, 30))
    async with app.run_test(size=(100, 36)) as pilot:
        await talk(pilot)
        await pilot.press(key)
        await pilot.pause(0.2)
        compare(f"over-{key.replace('+', '-')}", picture(app))
