"""Lines are painted by a short way of our own: against Textual's way, and for what it costs."""

from __future__ import annotations

import random

import pytest
from scripted import Script, wait_until
from textual.widget import Widget
from tui_helpers import answered, make_app, say

from tinychat.tui.widgets import lines as lines_module
from tinychat.tui.widgets.status import StatusLine

pytestmark = pytest.mark.asyncio
ANSWER = """# A *heading*

Some `code`, **bold** 漢字 👩‍👩‍👧 text.

```python
x = 1
```

- one
- two

| a | b |
|---|---|
| 1 | 2 |
"""


def cells(strips):
    """What is seen of each cell; the colour of a blank is not."""
    seen = []
    for strip in strips:
        row = []
        for text, style, _ in strip:
            row += [
                (c, style and style.bgcolor, None if c == " " else style and style.without_color)
                for c in text
            ]
            row += [style.color for c in text if style and c != " "]
        seen.append(row)
    return seen


@pytest.mark.parametrize("no_color", [False, True])
async def test_lines_are_painted_as_textual_would(store, monkeypatch, no_color):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    app = make_app(store, Script(ANSWER, 12))
    async with app.run_test(size=(70, 30)) as pilot:
        await say(pilot, "a question\nof two lines")
        await answered(pilot)
        shown = [*app.chat.transcript.turns, app.chat.query_one(StatusLine)]
        rng = random.Random(1)
        for widget in shown:
            region = widget.outer_size.region
            for _ in range(20):
                y = rng.randrange(region.height)
                x = rng.choice([0, 0, 3])
                crop = type(region)(x, y, region.width - x, rng.randint(1, region.height - y))
                widget._styles_cache.clear()
                assert cells(widget.render_lines(crop)) == cells(Widget.render_lines(widget, crop))


@pytest.mark.parametrize("height", [20, 45])  # so that it scrolls, or not
async def test_a_line_that_stays_is_painted_once(store, monkeypatch, height):
    app = make_app(store, Script("\n\n".join(f"paragraph {i}" for i in range(12)), 20))
    async with app.run_test(size=(80, height)) as pilot:
        await say(pilot, "one")
        await answered(pilot)
        turn = app.chat.transcript.turns[-1]
        painted, laid_out = [], []
        to_strip = lines_module.to_strip
        monkeypatch.setattr(
            lines_module, "to_strip", lambda line, *a: painted.append(line) or to_strip(line, *a)
        )
        app.screen.screen_layout_refresh_signal.subscribe(turn, lambda screen: laid_out.append(1))
        turn.message.finish_reason, turn.document._ended = None, False
        for part in (" and\n\n", "one more", " word"):
            before = turn.size.height
            turn.message.content += part
            turn.update()
            await wait_until(pilot, lambda: not app.screen._layout_required)
            await pilot.pause(0.05)
            grown = turn.size.height - before
            assert len(laid_out) == (grown > 0), "a new line is one layout, more words of it are none"
            assert 0 < len(painted) <= 6, "what came and the lines below it, not the 24 above"
            painted.clear()
            laid_out.clear()
