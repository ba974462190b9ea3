"""The status line: what it says, and what it leaves out first when room is short."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from scripted import Script, screen_text, wait_until
from tui_helpers import answered, make_app, say

from tinychat.process.protocol import Loaded, Loading
from tinychat.tui.conversation import Conversation
from tinychat.tui.text import plain
from tinychat.tui.widgets.status import StatusLine

EVERYTHING = dict(
    state="ready", model="/models/a-model.gguf", backend="cpu", isa="avx2", rate=12.34, ttft=0.25, used=900,
    ctx=1000, kv_bytes=6_300_000, accepted=0.5, memory=190_000_000, cpu=97.0,
)  # fmt: skip


def shown(width, **facts):
    line = StatusLine()
    line.facts = facts
    return plain(line.layout_lines(width)[0])


def words(app):
    """What is on the screen, whatever its lines are."""
    return " ".join(screen_text(app).split())


def test_everything_is_said_where_there_is_room():
    assert shown(200, **EVERYTHING) == (
        "ready · a-model · cpu avx2 · 12.3 tok/s · first token 250 ms · context ███████░ 900/1000 · KV 6.3 MB"
        " · drafts 50% · memory 190 MB · CPU 97 %"
    )


def test_a_chat_that_gives_tokens_up_says_so_and_has_no_end_to_warn_of():
    assert "context 900, 64 evicted" in shown(80, **EVERYTHING, evicted=64)
    assert "900/1000" not in shown(200, **EVERYTHING, evicted=64)


@pytest.mark.parametrize("width", [1, 5, 20, 40, 60, 80, 100, 140])
def test_it_fits_and_speed_and_context_stay_longest(width):
    text = shown(width, **EVERYTHING)
    assert len(text) <= width
    assert text.startswith("ready"[: width - 1])
    if width >= 40:
        assert "12.3 tok/s" in text
        assert "900/1000" in text


@pytest.mark.parametrize(
    ("used", "evicts", "style", "said"),
    [
        (7500, True, "faint", ""),
        (7501, True, "notice", "then it forgets"),
        (7501, False, "notice", "then it is full"),
        (9001, False, "bad", "then it is full"),
        (9001, None, "bad", ""),
    ],
)
@pytest.mark.parametrize("width", [54, 74, 114])
def test_the_meter_turns_colour_and_says_what_comes_at_the_end(used, evicts, style, said, width):
    line = StatusLine()
    line.facts = {**EVERYTHING, "used": used, "ctx": 10_000, "evicts": evicts}
    styles = dict(line.layout_lines(width)[0])
    text = next(t for t in styles if t.startswith("context"))
    assert text.endswith(f"{used}/10000")
    assert styles[text] == style
    words = [t for t in styles if t.startswith("then")]
    assert words == ([said] if said and (width > 54 or style == "bad") else [])
    assert all(styles[t] == style for t in words)


@pytest.mark.asyncio
async def test_a_download_tells_size_speed_and_what_is_left(store, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tinychat.tui.app.time", SimpleNamespace(monotonic=lambda: now[0]))
    app = make_app(store, loads=False)
    async with app.run_test(size=(120, 30)) as pilot:
        for done in (10_000_000, 20_000_000, 30_000_000):
            app.engine.on_event(Loading("Downloading smol", done, 94_000_000))
            await pilot.pause()
            now[0] += 1.0
        await wait_until(pilot, lambda: "Downloading smol 30.0 MB of 94.0 MB" in screen_text(app))
        assert "10.0 MB/s, 6.4 s left" in screen_text(app)


@pytest.mark.asyncio
async def test_memory_is_that_of_the_loaded_model(store):
    app = make_app(store, loads=False)
    async with app.run_test(size=(120, 30)) as pilot:
        await wait_until(pilot, lambda: app.engine.starts == 1)
        app.engine.pid = os.getpid()
        app._look_at_machine()
        app.chat.status.facts["memory"] = 1  # as it was before the weights were there
        app.engine.on_event(Loaded({"ctx": 4096}))
        await wait_until(pilot, lambda: app.chat.ready)
        app._look_at_machine()
        assert app.chat.status.facts["memory"] > 10_000_000
        assert app.chat.status.facts["cpu"] is None  # nothing runs
        app.chat.status.facts["memory"] = 1
        app._look_at_machine()
        assert app.chat.status.facts["memory"] == 1  # and nothing is looked at for ever


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("reason", "expected"),
    [("length", "cut: length limit"), ("context_full", "cut: context full"), ("stop", "2 tokens")],
)
async def test_an_answer_says_how_it_ended(store, reason, expected):
    stats = {"evicted_tokens": 12, "drafted_tokens": 8, "accepted_tokens": 6, "kv_bytes": 5_000_000}
    app = make_app(store, Script("some words", reason=reason, stats=stats))
    async with app.run_test(size=(140, 30)) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        await wait_until(pilot, lambda: expected in screen_text(app))
        assert screen_text(app).count("drafts 75%") == 2  # under the answer, and at the bottom
        assert ("is full: /compact makes room" in screen_text(app)) == (reason == "context_full")
        last = screen_text(app).splitlines()[-1]
        for part in ("KV 5.0 MB", "context 12, 12 evicted", "drafts 75%"):
            assert part in last


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 36)])
async def test_what_was_given_up_is_marked_at_the_messages_that_it_came_from(store, size):
    losses = [[12, 30], [1204, 2000], [0, 15], [0, 8]]
    app = make_app(
        store, "First.", Script("Second.", stats={"evicted_tokens": 1216, "given_up": losses}), "x"
    )
    async with app.run_test(size=size) as pilot:
        await say(pilot, "one")
        await answered(pilot)
        assert "given up" not in screen_text(app)
        await say(pilot, "two")
        await answered(pilot, 2)
        await wait_until(pilot, lambda: "1,204 of 2,000 tokens given up" in words(app))
        lines = [line for line in screen_text(app).splitlines() if "given up" in line]
        assert lines[0].strip() == "▌ 12 of 30 tokens given up"
        assert len(lines) == 2  # not of what is whole
        first, *_ = app.chat.transcript.turns
        marked = [line for line in first.layout_lines(50) if "given up" in plain(line)]
        assert [style for text, style in marked[0] if "given up" in text] == ["faint"]
        app.chat.conversation.close()
    again = make_app(store, conversation=Conversation.open(store, 1))
    async with again.run_test(size=size) as pilot:  # it was stored with the answer
        await wait_until(pilot, lambda: "1,204 of 2,000 tokens given up" in words(again))
        await say(pilot, "/regen")  # read anew, and nothing is gone
        await wait_until(pilot, lambda: "given up" not in screen_text(again))


@pytest.mark.asyncio
async def test_marks_that_make_no_sense_are_none(store):
    losses = [["x", 3], None, [1, 2, 3], [10**30, -5], 7]
    app = make_app(
        store, Script("First.", stats={"given_up": losses}), Script("B.", stats={"given_up": "no"})
    )
    async with app.run_test(size=(80, 24)) as pilot:
        for n in (1, 2):
            await say(pilot, "one")
            await answered(pilot, n)
        assert "given up" not in screen_text(app)
