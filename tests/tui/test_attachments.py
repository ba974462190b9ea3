"""Files in the composer and in messages: sent once, shown as chips, edited without being said again."""

from __future__ import annotations

import pytest
from scripted import Script, screen_text, wait_until
from tui_helpers import answered, make_app, read_by_model, say

from tinychat.process.protocol import Loaded
from tinychat.tui.attachments import mentions, missed
from tinychat.tui.conversation import Conversation

FACTS = {"model": "demo", "backend": "cpu", "ctx": 8192, "evicts": True}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "work" / "src").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def files(app, n=-1):
    return [a["name"] for a in app.engine.requests[n].path[-1].attachments]


@pytest.mark.asyncio
async def test_the_question_is_shown_and_names_the_chat_and_an_edit_sends_the_file_once(
    store, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("first version\n" * 40)
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        app.chat.composer.paste("pasted " * 1000)
        await say(pilot, "compare @notes.md with it")
        await answered(pilot)
        text = screen_text(app)
        assert "▌ compare @notes.md with it" in text
        assert "▌ + notes.md  560 B" in text
        assert "▌ + paste 1  7.0 kB" in text
        assert "first version" not in text
        assert files(app) == ["notes.md", "paste 1"]
        assert store.chats()[0].title == "compare @notes.md with it"

        (tmp_path / "notes.md").write_text("second version")
        await say(pilot, "/edit")
        assert app.chat.composer.text == "compare @notes.md with it"
        assert [a.name for a in app.chat.composer.attachments] == ["notes.md", "paste 1"]
        await pilot.press("end", *" please", "enter")
        await answered(pilot)
        assert files(app) == ["notes.md", "paste 1"]
        assert read_by_model(app.engine.requests[-1]).count("first version") == 40  # as it was sent
        await say(pilot, "/edit shorter")
        await wait_until(pilot, lambda: len(app.engine.requests) == 3)
        assert files(app) == ["notes.md", "paste 1"]

        app.chat.conversation.close()
    conversation = Conversation.open(store, store.chats()[0].id)
    again = make_app(store, conversation=conversation)
    async with again.run_test(size=(100, 30)) as pilot:
        assert "+ notes.md" in screen_text(again)
        await say(pilot, "more")
        await wait_until(pilot, lambda: again.engine.requests)
    first = again.engine.requests[0].path[0]
    assert [a["name"] for a in first.attachments] == ["notes.md", "paste 1"]


@pytest.mark.asyncio
async def test_a_file_can_be_taken_out_while_editing(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        app.chat.composer.paste("x" * 5000)
        await say(pilot, "see @a.txt")
        await answered(pilot)
        await say(pilot, "/edit")
        await pilot.press("ctrl+u", "backspace")
        assert app.chat.composer.attachments == []
        await say(pilot, "see nothing")
        await answered(pilot)
        assert files(app) == []


@pytest.mark.asyncio
async def test_a_message_of_files_alone_is_one(store):
    app = make_app(store)
    async with app.run_test(size=(60, 20)) as pilot:
        app.chat.composer.paste("\u202enot\x1b[31m " * 1000)
        await pilot.press("enter")
        await answered(pilot)
        assert "▌ + paste 1" in screen_text(app)
    assert store.chats()[0].title == "paste 1"


def test_what_names_a_file_what_means_one_and_what_is_a_word(folder):
    (folder / "notes.md").write_text("x")
    (folder / "with space.txt").write_text("x")
    (folder / "odd name").write_text("x")

    def names(text, found=mentions):
        return [written for written, _ in found(text)]

    assert names('see @notes.md, @"with space.txt" and (@notes.md)') == ["@notes.md", '@"with space.txt"']
    assert names("is it in @notes.md?") == ["@notes.md"]
    assert names("@src @gone.py, @./gone and @gone", missed) == ["@src", "@gone.py", "@./gone"]
    for word in ("@bob", "@pytest.fixture", "@types/node", "me@example.org", "@click.command()"):
        assert names(word, missed) == []
    assert missed("@gone.py", at=8) == []  # it is being written
    assert names("@gone.py", missed) == ["@gone.py"]


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [(60, 20), (120, 36)])
async def test_what_cannot_be_sent_is_refused_before_enter_with_the_reason(store, folder, size):
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    app = make_app(store)
    async with app.run_test(size=size) as pilot:
        await pilot.press(*"compare @gone.md")
        await pilot.pause()
        assert "✗" not in screen_text(app)  # it may become another name
        await pilot.press(*" with @src and @picture.png now")
        await wait_until(pilot, lambda: "✗ picture.png  binary, not a text file" in screen_text(app))
        assert "✗ gone.md  there is no such file" in screen_text(app)
        assert "✗ src  a folder: name a file in it" in screen_text(app)
        await pilot.press("enter")
        await wait_until(pilot, lambda: "gone.md cannot be sent: there is no such file." in screen_text(app))
        assert not app.engine.requests
        assert app.chat.composer.text == "compare @gone.md with @src and @picture.png now"
        (folder / "gone.md").write_text("here now")
        await pilot.press("enter")
        await answered(pilot)
        assert files(app) == ["gone.md"]
        assert app.engine.requests[0].path[-1].content.endswith("@picture.png now")


@pytest.mark.asyncio
async def test_chips_tell_the_tokens_of_what_is_free(store, folder):
    (folder / "notes.md").write_text("word " * 1204)
    app = make_app(store, Script(stats={"prompt_tokens": 1200, "generated_tokens": 28}), loads=False)
    async with app.run_test(size=(80, 24)) as pilot:
        app.engine.on_event(Loaded(FACTS))
        await wait_until(pilot, lambda: app.chat.ready)
        await say(pilot, "begin")
        await answered(pilot)
        await pilot.press(*"see @notes.md ")
        await wait_until(pilot, lambda: "+ notes.md  6.0 kB, 1,204 of 6,900 tokens" in screen_text(app))
        app.chat.composer.paste("word " * 6000)
        await wait_until(
            pilot, lambda: "more than is free: what matters least is given up" in screen_text(app)
        )
        assert "paste 1  30.0 kB, 6,000 of 6,900 tokens" in screen_text(app)
        app.engine.on_event(Loaded(FACTS | {"evicts": False}))
        await wait_until(pilot, lambda: "more than is free: no answer has room" in screen_text(app))
        await say(pilot, "/edit")  # in the place of the first message everything is free
        await pilot.press(*" @notes.md ")
        await wait_until(pilot, lambda: "1,204 of 8,128 tokens" in screen_text(app))


@pytest.mark.asyncio
async def test_a_context_that_is_nearly_full_says_once_what_comes_then(store):
    used = [{"prompt_tokens": n, "generated_tokens": 0} for n in (6000, 6500, 7500, 7600)]
    app = make_app(store, *[Script(stats=s) for s in used], loads=False)
    async with app.run_test(size=(80, 24)) as pilot:
        app.engine.on_event(Loaded(FACTS))
        await wait_until(pilot, lambda: app.chat.ready)
        for n, meter in enumerate(
            ("6000/8192", "6500/8192 · then it forgets", "7500/8192 · then it forgets"), 1
        ):
            await say(pilot, f"question {n}")
            await answered(pilot, n)
            await wait_until(pilot, lambda meter=meter: meter in screen_text(app))
            assert ("The context is 92% full" in screen_text(app)) == (n == 3)
        said = " ".join(screen_text(app).split())
        assert "what matters least is given up then. /compact makes room." in said
        await say(pilot, "question 4")
        await answered(pilot, 4)
        assert "The context is" not in screen_text(app)
