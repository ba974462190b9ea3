"""Composer, transcript, sidebar, panels and commands, with a scripted engine."""

from __future__ import annotations

import pytest
from scripted import Script, screen_text, wait_until
from stored import add
from tui_helpers import answered, make_app, say

from tinychat.chats.chat_store import ChatStore
from tinychat.text.reasoning import split_thought
from tinychat.tui import clipboard
from tinychat.tui.conversation import Conversation
from tinychat.tui.theme import THEMES

pytestmark = pytest.mark.asyncio


# Branches


async def test_regenerate_and_edit_make_branches_that_share_their_beginning(store):
    app = make_app(store, "answer one", "second", "third")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: "second" in screen_text(app) and "‹ 2/2 ›" in screen_text(app))
        await answered(pilot)
        assert "answer one" not in screen_text(app)
        await pilot.press("ctrl+up", "left")
        await wait_until(pilot, lambda: "answer one" in screen_text(app) and "‹ 1/2 ›" in screen_text(app))
        await say(pilot, "/branch 2")
        await wait_until(pilot, lambda: "second" in screen_text(app))

        await say(pilot, "/edit")
        assert app.chat.composer.text == "question"
        await say(pilot, "other question")
        await wait_until(pilot, lambda: "third" in screen_text(app))
        await answered(pilot)
        assert "▌ other question" in screen_text(app)
        assert "‹ 2/2 ›" in screen_text(app)
    roots = [m for m in store.messages(1) if m.parent is None]
    assert [m.content for m in roots] == ["question", "other question"]
    assert [m.content for m in app.engine.requests[2].path] == ["other question"]


async def test_escape_leaves_editing_as_it_was(store):
    app = make_app(store)
    async with app.run_test() as pilot:
        await say(pilot, "question")
        await answered(pilot)
        await say(pilot, "/edit")
        await pilot.press("escape")
        assert app.chat.composer.text == ""
        assert app.chat.editing is None


async def test_another_seed_for_another_branch(store):
    app = make_app(store)
    async with app.run_test() as pilot:
        await say(pilot, "/set seed 7")
        await say(pilot, "question")
        await answered(pilot)
        await pilot.press("ctrl+r")
        await wait_until(pilot, lambda: len(app.engine.requests) == 2)
        assert [r.params["seed"] for r in app.engine.requests] == [7, 8]


# Reasoning


@pytest.mark.parametrize(
    ("content", "prompt", "expected"),
    [
        ("<think>a</think>b", "", ("a", "b", True)),
        ("<think>\na\n</think>\n\nb", "", ("a", "b", True)),
        ("a</think>b", "<|assistant|><think>\n", ("a", "b", True)),
        ("a</think>b", "", ("a", "b", True)),
        ("<think>still", "", ("still", "", False)),
        ("still", "<think>\n", ("still", "", False)),
        ("<th", "", ("", "", False)),
        ("plain", "", (None, "plain", True)),
        ("use <b> tags", "", (None, "use <b> tags", True)),
    ],
)
async def test_reasoning_is_told_from_the_answer(content, prompt, expected):
    assert split_thought(content, prompt) == expected


async def test_reasoning_is_folded_until_opened(store):
    app = make_app(store, Script("so many hidden words</think>\n\nThe answer.", 20, prompt_text="<think>\n"))
    async with app.run_test() as pilot:
        await say(pilot, "why")
        await answered(pilot)
        text = screen_text(app)
        assert "▸ thought for 4 tokens" in text
        assert "hidden" not in text
        assert "The answer." in text
        await say(pilot, "/think")
        await wait_until(pilot, lambda: "so many hidden words" in screen_text(app))


# Composer


async def test_sidebar_searches_opens_renames_deletes_and_undoes(store):
    app = make_app(store, "about foxes", "about rivers")
    async with app.run_test(size=(120, 30)) as pilot:
        await say(pilot, "first chat")
        await answered(pilot)
        await pilot.press("ctrl+n")
        await say(pilot, "second chat")
        await answered(pilot)
        assert "about foxes" not in screen_text(app)
        await pilot.press("ctrl+b")
        await wait_until(pilot, lambda: "2 messages" in screen_text(app))
        await pilot.press(*"foxes")
        await wait_until(pilot, lambda: screen_text(app).count("second chat") == 1)
        await pilot.press("enter")
        await wait_until(pilot, lambda: "▌ first chat" in screen_text(app))
        await say(pilot, "/rename A better name")
        assert store.chat(1).title == "A better name"
        await say(pilot, "/delete")
        await wait_until(pilot, lambda: "Deleted “A better name”" in screen_text(app))
        assert [c.id for c in store.chats()] == [2]
        await say(pilot, "/undo")
        await wait_until(pilot, lambda: "▌ first chat" in screen_text(app))
        assert len(store.chats()) == 2


async def test_a_chat_goes_on_where_it_was_left(store, tmp_path):
    app = make_app(store, "one two three")
    async with app.run_test() as pilot:
        await say(pilot, "question")
        await answered(pilot)
    other = ChatStore(store.path)
    app.conversation.close()
    app = make_app(other, "more", conversation=Conversation.open(other, 1))
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: "one two three" in screen_text(app))
        await say(pilot, "go on")
        await answered(pilot, 2)
    assert app.engine.requests[0].path[1].ids == [0, 1, 2]
    other.close()


async def test_a_long_chat_mounts_its_end_and_the_rest_on_the_way_up(store):
    chat = store.create("demo")
    parent = None
    for i in range(200):
        parent = add(store, chat.id, "assistant" if i % 2 else "user", f"message {i}", parent, "demo")
    app = make_app(store, conversation=Conversation.open(store, chat.id))
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_until(pilot, lambda: "message 199" in screen_text(app))
        assert len(app.chat.transcript.turns) < 40
        mounted = len(app.chat.transcript.turns)
        for _ in range(12):
            await pilot.press("pageup")
        await wait_until(pilot, lambda: len(app.chat.transcript.turns) > mounted)
        await pilot.press("ctrl+end")
        await wait_until(pilot, lambda: "message 199" in screen_text(app))


async def test_the_reader_is_not_dragged_to_the_end(store):
    app = make_app(
        store, "\n\n".join(f"paragraph {i}" for i in range(60)), Script("more\n\n" * 40, 40, hang=True)
    )
    async with app.run_test(size=(80, 24)) as pilot:
        await say(pilot, "one")
        await answered(pilot)
        assert app.chat.transcript.following
        await say(pilot, "two")
        await pilot.press("pageup", "pageup", "pageup", "pageup", "pageup", "pageup")
        await pilot.pause(0.3)
        assert "paragraph" in screen_text(app)
        assert not app.chat.transcript.following
        await pilot.press("ctrl+end")
        await wait_until(pilot, lambda: app.chat.transcript.following)


# Panels


@pytest.mark.parametrize("theme", THEMES, ids=lambda t: t.name)
async def test_the_composers_frame_is_seen_in_every_theme(store, theme):
    app = make_app(store)
    app.theme = theme.name
    async with app.run_test(size=(80, 24)) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        for keys in ((), ("ctrl+up",)):  # with the focus, and without
            await pilot.press(*keys)
            frame, ground = app.chat.composer.input.styles.border_top[1], app.screen.styles.background
            assert abs((ground + frame).brightness - ground.brightness) > 0.15


async def test_a_theme_is_kept_for_the_next_time(store):
    app = make_app(store)
    async with app.run_test() as pilot:
        await say(pilot, "/theme light")
        await wait_until(pilot, lambda: app.theme == "tinychat-light")
    again = make_app(store)
    assert again.theme == "tinychat-light"


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (200, 60), (20, 8)])
async def test_every_size_shows_composer_and_status(store, size):
    app = make_app(store, "# Title\n\n" + "words " * 100 + "\n\n```python\n" + "x = 1\n" * 5 + "```")
    async with app.run_test(size=size) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        await wait_until(pilot, lambda: "ready" in screen_text(app))
        assert "╭" in screen_text(app)
        await pilot.press("ctrl+b")
        await pilot.press("ctrl+b")
        await pilot.resize_terminal(100, 30)
        await wait_until(pilot, lambda: "20.0 tok/s · first token" in screen_text(app))


async def test_no_color_is_respected(store, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    app = make_app(store, "# Title\n\n**bold** `code`")
    async with app.run_test() as pilot:
        await say(pilot, "question")
        await answered(pilot)
        for strip in app.screen._compositor.render_strips():
            for segment in strip.apply_filter(app._filters[-1], app.screen.background_colors[1]):
                for colour in (segment.style.color, segment.style.bgcolor) if segment.style else ():
                    if colour is not None and colour.triplet is not None:
                        assert len(set(colour.triplet)) == 1  # grey


async def test_control_c_copies_stops_and_leaves(store, monkeypatch):
    copied = []
    monkeypatch.setattr(clipboard, "copy", lambda app, text: copied.append(text))
    app = make_app(store, Script("words words", hang=True))
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "question")
        await wait_until(pilot, lambda: "words words" in screen_text(app))
        app.chat.composer.text = "typed"
        app.chat.composer.input.select_all()
        await pilot.press("ctrl+c")
        assert copied == ["typed"]
        app.chat.composer.text = ""
        await pilot.press("ctrl+c")
        await answered(pilot)
        await wait_until(pilot, lambda: "ctrl+c again to leave" in screen_text(app))
        await pilot.press("ctrl+c")
    assert app.return_code == 130


async def test_text_is_selected_with_the_mouse(store, monkeypatch):
    copied = []
    monkeypatch.setattr(clipboard, "copy", lambda app, text: copied.append(text))
    app = make_app(store, "Some **bold** words.\n\nAnd more.")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        await pilot.mouse_down("Turn.assistant", offset=(2, 0))
        await pilot.hover("Turn.assistant", offset=(11, 0))
        await pilot.mouse_up("Turn.assistant", offset=(11, 0))
        await pilot.press("ctrl+c")
        assert len(copied) == 1
        assert "bold" in copied[0] or "Some" in copied[0]


async def test_a_model_chosen_while_another_loads_is_the_one_that_is_ready(store):
    app = make_app(store, loads=False)
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "/model other")
        await wait_until(pilot, lambda: app.engine.loaded == ["demo", "other"])
        app.engine.loads = True
        app.engine.load("demo", {})
        await pilot.pause(0.1)
        assert not app.chat.ready
        app.engine.load("other", {})
        await wait_until(pilot, lambda: app.chat.ready)


async def test_title_and_system_prompt_are_seen_and_changed(store):
    app = make_app(store)
    async with app.run_test(size=(80, 24)) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        assert not app.chat.query("#heading").first().display
        await say(pilot, "/rename")
        await wait_until(pilot, lambda: "New title" in screen_text(app))
        await pilot.press("ctrl+u", *"About foxes", "enter")
        await wait_until(pilot, lambda: screen_text(app).lstrip().startswith("About foxes"))
        await say(pilot, "/system")
        await wait_until(pilot, lambda: "System prompt of this chat" in screen_text(app))
        await pilot.press(*"Be kind.", "ctrl+j", *"Be brief.", "enter")
        await wait_until(pilot, lambda: "System: Be kind. Be brief." in screen_text(app))
        await pilot.click("#heading", offset=(12, 1))
        await wait_until(pilot, lambda: "System prompt of this chat" in screen_text(app))
        await pilot.press("!", "enter")
        await wait_until(pilot, lambda: "System: Be kind. Be brief.!" in screen_text(app))
        await say(pilot, "more")
        await answered(pilot, 2)
        assert app.engine.requests[-1].system == "Be kind.\nBe brief.!"
        await say(pilot, "/system -")
        await wait_until(pilot, lambda: "System: " not in screen_text(app))
    assert (store.chat(1).title, store.chat(1).system) == ("About foxes", None)


async def test_a_saved_conversation_is_loaded_and_a_chat_is_opened_by_its_number(store, tmp_path):
    app = make_app(store, "first answer", "second answer")
    async with app.run_test(size=(80, 24)) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        await say(pilot, f"/save {tmp_path}/chat.json")
        await wait_until(pilot, lambda: (tmp_path / "chat.json").exists())
        await say(pilot, "/new")
        await wait_until(pilot, lambda: "Ask something" in screen_text(app))
        await say(pilot, f"/load {tmp_path}/chat.json")
        await wait_until(pilot, lambda: "first answer" in screen_text(app))
        await say(pilot, "and more")
        await answered(pilot, 2)
        assert [m.ids for m in app.engine.requests[-1].path] == [[], [0, 1], []]
        await say(pilot, "/resume 1")
        await wait_until(pilot, lambda: "and more" not in screen_text(app))
        await say(pilot, "/resume 99")
        await wait_until(pilot, lambda: "There is no chat 99" in screen_text(app))
        (tmp_path / "none.json").write_text("{}")
        await say(pilot, f"/load {tmp_path}/none.json")
        await wait_until(pilot, lambda: "is not a conversation" in screen_text(app))
    assert [len(store.messages(i)) for i in (1, 2)] == [2, 4]
