"""The screen, cell by cell, at three sizes and in three themes, against what was approved.

`tests/support/pictures.py` says how they are made anew.
"""

from __future__ import annotations

import pytest
import textual
from branchy import held, small
from pictures import compare
from scripted import Script, listed, screen_text, wait_until
from tui_helpers import answered, make_app, say

from tinychat.tui.theme import THEMES

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(textual.__version__ != "8.2.8", reason="snapshots are of Textual 8.2.8"),
]
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
        await compare(f"{theme}-{size[0]}x{size[1]}", app, pilot)


@pytest.mark.parametrize("key", ["f1", "f2", "ctrl+o", "ctrl+t", "ctrl+b"])
async def test_what_opens_over_it(store, key, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    app = make_app(store, Script(ANSWER, 30))
    async with app.run_test(size=(100, 36)) as pilot:
        await talk(pilot)
        await pilot.press(key)
        await compare(f"over-{key.replace('+', '-')}", app, pilot)


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 36)])
async def test_the_tree_of_a_chat(store, size, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    app = make_app(store, conversation=held(store, small()))
    async with app.run_test(size=size) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        await pilot.press("f3")
        await wait_until(pilot, lambda: "● └" in screen_text(app) or "● ├" in screen_text(app))
        await compare(f"tree-{size[0]}x{size[1]}", app, pilot)


SIZES = [(60, 20), (80, 24), (120, 36)]
LOOKS = [(size, "tinychat-dark") for size in SIZES] + [
    ((80, 24), "tinychat-light"),
    ((80, 24), "tinychat-contrast"),
]


@pytest.mark.parametrize(("size", "theme"), LOOKS)
async def test_the_first_minute_and_the_choice_of_models(store, size, theme, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    app = make_app(store)
    app.theme, app.model, app.conversation.chat.model = theme, "", ""
    app.engine.listed = listed(installed=False)
    name = f"{theme}-{size[0]}x{size[1]}"
    async with app.run_test(size=size) as pilot:
        await wait_until(pilot, lambda: "enter downloads it" in screen_text(app))
        await compare(f"first-{name}", app, pilot)
        app.engine.listed = listed()
        await pilot.press("up", "enter")
        await wait_until(pilot, lambda: "enter loads" in screen_text(app))
        await compare(f"models-{name}", app, pilot)


@pytest.mark.parametrize(("size", "theme"), LOOKS)
async def test_a_context_that_is_nearly_full_with_files_and_marks(store, size, theme, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("word " * 300)
    used = {"prompt_tokens": 3800, "generated_tokens": 8, "given_up": [[12, 30], [0, 8]]}
    app = make_app(store, Script("It is short.", stats=used))
    app.theme, app.engine.facts = theme, {"evicts": True}
    async with app.run_test(size=size) as pilot:
        await say(pilot, "Is it short?")
        await answered(pilot)
        await pilot.press(*"see @notes.md and @gone.md please")
        await wait_until(pilot, lambda: "300 of 224 tokens" in screen_text(app))
        await compare(f"room-{theme}-{size[0]}x{size[1]}", app, pilot)
