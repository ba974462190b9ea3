"""Composer, transcript, sidebar, panels and commands, with a scripted engine."""

from __future__ import annotations

import pytest
from scripted import Script, screen_text, wait_until
from textual.widgets import OptionList
from tui_helpers import answered, make_app, read_by_model, say

from tinychat.chats.chat_store import ChatStore
from tinychat.text.attachments import as_read
from tinychat.text.reasoning import split_thought
from tinychat.tui import clipboard, commands
from tinychat.tui.app import ChatApp
from tinychat.tui.conversation import Conversation
from tinychat.tui.screens.stats import plot
from tinychat.tui.text import plain
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
    assert [m["content"] for m in app.engine.requests[2]["path"]] == ["other question"]


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
        assert [r["params"]["seed"] for r in app.engine.requests] == [7, 8]


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


async def test_lines_history_and_completion(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press(*"one", "ctrl+j", *"two", "enter")
        await answered(pilot)
        assert app.engine.requests[0]["path"][0]["content"] == "one\ntwo"
        await pilot.press("up")
        assert app.chat.composer.text == "one\ntwo"
        await pilot.press("down")
        await pilot.press("down")
        assert app.chat.composer.text == ""
        await pilot.press(*"/sta")
        await wait_until(pilot, lambda: "speed over this chat" in screen_text(app))
        await pilot.press("tab")
        assert app.chat.composer.text == "/stats "
        await pilot.press("ctrl+u", *"/the", "enter")
        await wait_until(pilot, lambda: app.theme != THEMES[0].name)


async def test_enter_means_what_was_typed_though_the_list_lags_behind(store):
    """Keys in one burst: enter comes before the list has heard of them."""
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("/")
        await wait_until(pilot, lambda: "keys and commands" in screen_text(app))  # /help is the first
        composer = app.chat.composer
        composer.input.insert("stats")
        composer.input.action_submit()
        await wait_until(pilot, lambda: "Stats" in type(app.screen).__name__)
        await pilot.press("escape")
        composer.input.insert("/se")  # and no list at all yet
        composer.input.action_down()
        composer.input.action_complete()
        assert composer.text == "/set "
        await pilot.press("backspace", *"tings", "enter")  # no command
        await wait_until(pilot, lambda: "/settings" in screen_text(app))


async def test_a_long_paste_is_attached_and_shown_folded(store):
    from textual import events

    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        app.chat.composer.input.post_message(events.Paste("line of text\n" * 8000))
        await wait_until(pilot, lambda: "paste 1  104 kB, 24000 tokens" in screen_text(app))
        assert app.chat.composer.text == ""
        await pilot.press("backspace")
        await wait_until(pilot, lambda: "paste 1" not in screen_text(app))
        app.chat.composer.input.post_message(events.Paste("line of text\n" * 8000))
        await wait_until(pilot, lambda: "paste 1" in screen_text(app))
        await pilot.press(*"what", "enter")
        await wait_until(pilot, lambda: "Send all of it" in screen_text(app))
        await pilot.press("down", "enter")
        await answered(pilot)
        assert "▌ + paste 1  104 kB" in screen_text(app)
    sent = read_by_model(app.engine.requests[0])
    assert sent.count("line of text") == 8000
    assert sent.endswith("\n\nwhat")


async def test_files_are_attached_with_their_size_and_tokens(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("alpha beta gamma")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press(*"see @no")
        await wait_until(pilot, lambda: bool(pilot.app.screen.query(OptionList)))
        await pilot.press("tab")
        assert app.chat.composer.text == "see @notes.txt "
        await wait_until(pilot, lambda: "notes.txt  16 B, 3 tokens" in screen_text(app))
        await pilot.press(*"and @picture.png")
        await wait_until(pilot, lambda: "not a UTF-8 text file" in screen_text(app))
        await pilot.press("escape", "enter")
        await answered(pilot)
    sent = read_by_model(app.engine.requests[0])
    assert sent == "notes.txt:\n```\nalpha beta gamma\n```\n\nsee @notes.txt and @picture.png"


async def test_a_fence_in_a_file_does_not_end_its_fence():
    message = as_read("x", [{"name": "a.md", "text": "```\ncode\n```"}])
    assert message.startswith("a.md:\n````\n```\ncode\n```\n````")


async def test_commands_are_told_from_paths():
    assert commands.split("/set top_k 3") == ("set", "top_k 3")
    assert commands.split("/usr/bin/env is a path") is None
    assert commands.split("/help\nmore") is None
    assert commands.split("text") is None


async def test_wrong_commands_say_what_to_do(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        for command, expected in (
            ("/nonsense", "/nonsense is not a command"),
            ("/set top_p 7", "It must lie between 0 and 1"),
            ("/set colour 7", "colour is not a sampling parameter"),
            ("/save", "/save needs FILE"),
            ("/regen", "Say something first"),
            ("/copy", "There is no answer yet"),
            ("/branch 3", "There is no answer yet"),
            ("/theme purple", "There is no theme purple"),
            ("/undo", "Nothing was deleted within a week"),
            ("/delete", "This chat is still empty"),
        ):
            await say(pilot, command)
            await wait_until(pilot, lambda expected=expected: expected in screen_text(app))


# Copying, saving


async def test_nothing_is_copied_or_written_unasked(store, monkeypatch, tmp_path):
    copied = []
    monkeypatch.setattr(ChatApp, "copy_to_clipboard", lambda self, text: copied.append(text))
    monkeypatch.setattr(clipboard.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    app = make_app(store, "Text.\n\n```sh\nrm \x1b[31m-rf\n```\n\x1b]52;c;aGk=\x07")
    async with app.run_test(size=(100, 30)) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        assert copied == []
        await say(pilot, "/copy code")
        await say(pilot, "/copy")
        await say(pilot, "/copy chat")
        await wait_until(pilot, lambda: len(copied) == 3)
        assert copied[0] == "rm ␛[31m-rf\n"
        assert "\x1b" not in "".join(copied)
        assert copied[2].count("**") == 4
        await pilot.click("Turn.assistant", offset=(0, 0))
        await pilot.press("s")
        await wait_until(pilot, lambda: "Save the code block as" in screen_text(app))
        await pilot.press(*"x.sh", "enter")
        await wait_until(pilot, lambda: (tmp_path / "x.sh").exists())
        await pilot.press("s", *"x.sh", "enter")
        await wait_until(pilot, lambda: "exists" in screen_text(app))
        await say(pilot, f"/save {tmp_path}/chat.json")
        await wait_until(pilot, lambda: (tmp_path / "chat.json").exists())
        await say(pilot, f"/save {tmp_path}/chat.md")
        await wait_until(pilot, lambda: (tmp_path / "chat.md").exists())
    assert {p.name for p in tmp_path.iterdir() if p.suffix in (".sh", ".json", ".md")} == {
        "x.sh", "chat.json", "chat.md", *(["settings.json"] if (tmp_path / "settings.json").exists() else []),
    }  # fmt: skip


# Chats


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
    assert app.engine.requests[0]["path"][1]["ids"] == [0, 1, 2]
    other.close()


async def test_a_long_chat_mounts_its_end_and_the_rest_on_the_way_up(store):
    chat = store.create("demo")
    parent = None
    for i in range(200):
        parent = store.add(chat.id, "assistant" if i % 2 else "user", f"message {i}", parent, "demo").id
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


async def test_help_lists_every_binding_and_command(store):
    app = make_app(store)
    async with app.run_test(size=(100, 60)) as pilot:
        await pilot.press("f1")
        await wait_until(pilot, lambda: "keys and commands" in screen_text(app))
        from tinychat.tui.screens.help import groups

        names = [row for _, rows in groups() for row, _ in rows]
        assert "ctrl+j, shift+enter, alt+enter" in names
        assert all(any(name.startswith(f"/{c.name}") for name in names) for c in commands.COMMANDS)
        await pilot.press("escape")
        assert app.screen is app.chat


async def test_models_show_size_and_fit_and_can_be_chosen(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("ctrl+o")
        await wait_until(pilot, lambda: "does not fit" in screen_text(app))
        text = screen_text(app)
        assert "● demo" in text
        assert "94.0 MB" in text
        assert "download" in text
        await pilot.press("down", "down", "enter")
        await wait_until(pilot, lambda: app.engine.loaded == ["demo", "other"])
        assert "ready · other" in screen_text(app)


async def test_sampling_is_set_checked_and_sent(store):
    app = make_app(store)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("ctrl+t")
        await wait_until(pilot, lambda: "0.7 (the model's)" in screen_text(app))
        await pilot.press(*"9999", "enter")
        await wait_until(pilot, lambda: "It must lie between" in screen_text(app))
        await pilot.press(*(["backspace"] * 4), *"0.2", "enter")
        await wait_until(pilot, lambda: "Sampling: temperature 0.2" in screen_text(app))
        await say(pilot, "question")
        await answered(pilot)
    assert app.engine.requests[0]["params"] == {"temperature": 0.2}
    assert store.chat(1).params == {"temperature": 0.2}


async def test_the_bandwidth_counts_the_weights_once_a_step_whatever_it_decides(store):
    app = make_app(store, Script("a b", stats={"decode_tps": 160.0, "tokens_per_step": 4.0}))
    async with app.run_test(size=(100, 40)) as pilot:
        await say(pilot, "question")
        await answered(pilot)
        await pilot.press("f2")
        await wait_until(pilot, lambda: "4.0 GB/s, 50% of the 8.0 GB/s" in screen_text(app))


async def test_stats_plot_the_speed_over_the_chat(store):
    app = make_app(store, *[Script("a b", stats={"decode_tps": float(r)}) for r in (10, 20, 40)])
    async with app.run_test(size=(100, 40)) as pilot:
        for i in range(3):
            await say(pilot, f"question {i}")
            await answered(pilot, i + 1)
        await pilot.press("f2")
        await wait_until(pilot, lambda: "Speed of this chat" in screen_text(app))
        assert "best 40.0" in screen_text(app)
        await wait_until(pilot, lambda: "4.0 GB/s, 50% of the 8.0 GB/s" in screen_text(app))


async def test_the_plot_is_to_scale():
    rows = [plain(line)[7:] for line in plot([0, 50, 100], 20, 4)]
    assert rows == ["  █", "  █", " ██", " ██"]


async def test_the_palette_runs_commands(store):
    app = make_app(store)
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.press("ctrl+p")
        await pilot.press(*"stats")
        await wait_until(pilot, lambda: "speed over this chat" in screen_text(app))
        await pilot.press("enter")
        await wait_until(pilot, lambda: "Speed of this chat" in screen_text(app))


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
