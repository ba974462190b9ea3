"""Keys by name, as config.toml has them, and vi's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripted import screen_text, wait_until
from terminal import Terminal
from tui_helpers import answered, say

from tinychat.base.errors import UsageError
from tinychat.base.preferences import Preferences
from tinychat.tui.app import ChatApp, keys_of
from tinychat.tui.conversation import Conversation
from tinychat.tui.hints import hint_lines
from tinychat.tui.vi import Edit, Vi, last_place, line_start

pytestmark = pytest.mark.asyncio


def preferences(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return Preferences.read(path)


def make_app(store, tmp_path, text, *scripts):
    from scripted import ScriptedEngine

    return ChatApp(
        "demo",
        Conversation(store, "demo"),
        engine=ScriptedEngine(scripts),
        settings=tmp_path / "settings.json",
        preferences=preferences(tmp_path, text),
    )


async def test_keys_do_what_config_toml_says_and_the_help_shows_them(store, tmp_path):
    text = '[keys]\nsend = "ctrl+s"\nnewline = ["enter", "ctrl+j"]\nchats = "f9"\n'
    text += 'edit_message = "E"\nrename_chat = "R"\n'
    app = make_app(store, tmp_path, text)
    async with app.run_test(size=(100, 60)) as pilot:
        await wait_until(pilot, lambda: app.chat.ready)
        assert "ctrl+s send" in screen_text(app)
        assert "f9 chats" in screen_text(app)
        await pilot.press(*"one", "enter", *"two")
        assert app.chat.composer.text == "one\ntwo"
        await pilot.press("ctrl+s")
        await answered(pilot)
        assert app.engine.requests[0].path[0].content == "one\ntwo"
        await pilot.press("ctrl+b")
        assert app.chat.sidebar is None
        await pilot.press("f9")
        await wait_until(pilot, lambda: app.chat.sidebar is not None)
        await pilot.press("down")
        await wait_until(pilot, lambda: "R rename" in screen_text(app))
        await pilot.press("escape", "ctrl+up", "e")
        assert app.chat.editing is None
        await pilot.press("E")
        await wait_until(pilot, lambda: app.chat.composer.text == "one\ntwo")
        await pilot.press("f1")
        await wait_until(pilot, lambda: "enter, ctrl+j" in screen_text(app))
        shown = screen_text(app)
        assert "f9" in shown
        assert "ctrl+b" not in shown


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('[keys]\nsned = "f9"', 2, "sned is the name of no key. Did you mean send"),
        ('[keys]\nsend = "f9"\nchats = "f2"', 3, "f2 is the key of stats already"),
        ('[keys]\nchats = "ctrl+g"', 2, "ctrl+g is the key of editor already"),
        ('[keys]\nchats = "f9"\ntree = "f9"', 2, "f9 is the key of tree already"),
        ('[keys]\nedit_message = "r"', 2, "r is the key of answer_again_here already"),
        ('[keys]\nedit_message = "f1"', 2, "f1 is the key of help already"),
        ('[keys]\nchats = "ctrl+k"', 2, "ctrl+k is needed for writing"),
        ('[keys]\nchats = "x"', 2, "x is for writing there"),
        ('[keys]\nchats = "enter"', 2, "enter is for writing there"),
        ('[keys]\nsend = "space"', 2, "space is for writing there"),
        ('[keys]\nsend = "hyper+s"', 2, "'hyper+s' is no key"),
        ('[keys]\nsend = "ctrl+m"', 2, "A terminal sends the same for ctrl+m and enter"),
        ("[keys]\nsend = 3", 2, "send is 3"),
        ("[keys]\nsend = []", 2, "send is []"),
        ("keys = 3", 1, "keys is not a section"),
        ("\nvi = 1", 2, "vi is 1. Use true or false"),
        ('vi = true\n[keys]\nunfold = "g"', 3, "g is the key of first_message already"),
    ],
)
async def test_what_makes_no_sense_is_an_error_that_names_the_line(tmp_path, text, line, said):
    with pytest.raises(UsageError) as e:
        keys_of(preferences(tmp_path, text))
    assert f"config.toml, line {line}: " in e.value.what
    assert said in e.value.what


async def test_every_key_has_a_name_of_its_own(tmp_path):
    names = keys_of(preferences(tmp_path, "")).names()
    assert len(names) == len(set(names)) > 40
    assert set(keys_of(preferences(tmp_path, "vi = true")).changed) <= set(names)


async def test_two_keys_can_change_places(tmp_path):
    keys = keys_of(preferences(tmp_path, '[keys]\nhelp = "f2"\nstats = "f1"'))
    assert (keys.named("help"), keys.named("stats")) == ("f2", "f1")


@pytest.mark.parametrize("width", [20, 30, 54, 60, 100])
async def test_hints_are_whole_words_on_lines_that_fit(width):
    hints = ["enter send", "ctrl+j new line", "/ commands", "@file attach", "esc stop", "f1 keys"]
    lines = hint_lines(hints, width)
    assert " · ".join(lines).split(" · ") == hints
    assert all(len(line) <= width for line in lines)


async def test_the_first_screen_has_whole_hints_at_60_columns(store, tmp_path):
    app = make_app(store, tmp_path, "")
    async with app.run_test(size=(60, 20)) as pilot:
        await wait_until(pilot, lambda: "ctrl+q leave" in screen_text(app))
        lines = [line.strip() for line in screen_text(app).splitlines() if " · " in line][:-1]
        assert " · ".join(lines).split(" · ")[-4:] == [
            "ctrl+b chats", "ctrl+p everything else", "f1 keys", "ctrl+q leave",
        ]  # fmt: skip


# Vi


def pressed(text, at, keys):
    """The text and the cursor after keys in normal mode; ^ is escape, and what is typed is typed."""
    vi = Vi()
    vi.insert = False
    for key in keys:
        if vi.insert and key == "^":
            vi.insert = False
            at = max(line_start(text, at), at - 1)
        elif vi.insert:
            text, at = text[:at] + key + text[at:], at + 1
        elif isinstance(done := vi.press(key, text, at), Edit):
            text, at, vi.insert = done.text, done.at, done.insert
    return text, at


TEXT = "foo bar_1, (x)\n  second line\n\nlast é"
VI = [  # as Vim 9 does it
    ("w", 0, TEXT, 4), ("3w", 0, TEXT, 11), ("b", 4, TEXT, 0), ("e", 0, TEXT, 2), ("$", 0, TEXT, 13),
    ("j0", 4, TEXT, 15), ("jk", 4, TEXT, 4), ("G", 0, TEXT, 30), ("2G", 0, TEXT, 17), ("gg", 30, TEXT, 0),
    ("x", 0, TEXT[1:], 0), ("3x", 0, TEXT[3:], 0), ("X", 4, "foobar_1, (x)" + TEXT[14:], 3),
    ("dw", 0, TEXT[4:], 0), ("d2w", 0, TEXT[9:], 0), ("dw", 11, "foo bar_1, x)" + TEXT[14:], 11),
    ("D", 3, "foo" + TEXT[14:], 2), ("dd", 3, TEXT[15:], 2), ("2dd", 3, TEXT[29:], 0), ("dG", 0, "", 0),
    ("d$", 7, "foo bar" + TEXT[14:], 6), ("d0", 4, TEXT[4:], 0), ("db", 4, TEXT[4:], 0),
    ("de", 0, TEXT[3:], 0), ("cwnew^", 0, "new" + TEXT[3:], 2), ("ccnew^", 3, "new" + TEXT[14:], 2),
    ("CZ^", 4, "foo Z" + TEXT[14:], 4),
    ("yyp", 0, "foo bar_1, (x)\n" + TEXT, 15), ("ddp", 0, "  second line\n" + TEXT[:15] + TEXT[29:], 14),
    ("ywP", 0, "foo " + TEXT, 3), ("A!^", 0, TEXT[:14] + "!" + TEXT[14:], 14),
    ("I-^", 20, TEXT[:17] + "-" + TEXT[17:], 17),
    ("oZ^", 0, TEXT[:14] + "\nZ" + TEXT[14:], 15), ("OZ^", 0, "Z\n" + TEXT, 0),
    ("aZ^", 0, "fZ" + TEXT[1:], 1),
    ("dj", 0, TEXT[29:], 0), ("xp", 0, "of" + TEXT[2:], 1),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "at", "text", "cursor"), VI, ids=[v[0] for v in VI])
async def test_vi_keys_do_what_they_do_in_vi(keys, at, text, cursor):
    assert pressed(TEXT, at, keys) == (text, cursor)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("vim") is None, reason="needs vim")
async def test_the_table_is_what_vim_does(tmp_path):
    script = ["set nocompatible encoding=utf-8 noautoindent startofline backspace=2"]
    for keys, at, _, _ in VI:
        row, before = TEXT.count("\n", 0, at) + 1, TEXT[line_start(TEXT, at) : at]
        typed = keys.replace("^", "\\<Esc>")
        script += [
            "enew!",
            f"call setline(1, {json.dumps(TEXT.split(chr(10)), ensure_ascii=False)})",
            f"call cursor({row}, {len(before.encode()) + 1})",
            f'execute "normal! {typed}"',
            "let out = json_encode([getline(1, '$'), line('.'), charcol('.')])",
            f"call writefile([out], '{tmp_path}/out', 'a')",
        ]
    (tmp_path / "run.vim").write_text("\n".join([*script, "qa!"]), encoding="utf-8")
    subprocess.run(
        ["vim", "-u", "NONE", "-N", "-es", "-S", str(tmp_path / "run.vim")], timeout=60, check=False
    )
    for (keys, _, text, at), line in zip(VI, (tmp_path / "out").read_text().splitlines(), strict=True):
        lines, row, column = json.loads(line)
        assert ("\n".join(lines), row, column) == (
            text, text.count("\n", 0, at) + 1, at - line_start(text, at) + 1,
        ), keys  # fmt: skip


async def test_the_cursor_never_stands_behind_a_line_in_normal_mode():
    text, at = pressed(TEXT, 13, "x")
    assert at == last_place(text, at) == 12


async def test_vi_in_the_composer_and_in_the_messages(store, tmp_path):
    app = make_app(store, tmp_path, "vi = true", "one", "two")
    async with app.run_test(size=(80, 24)) as pilot:
        composer = app.chat.composer
        for i, text in enumerate(("first question", "second one")):
            await say(pilot, text)
            await answered(pilot, i + 1)
        await pilot.press(*"hello wrld", "escape")
        await wait_until(pilot, lambda: "NORMAL" in screen_text(app))
        await pilot.press(*"bli", "o", "escape", *"0cw", *"bye", "escape")
        assert composer.text == "bye world"
        await pilot.press("u")
        assert composer.text != "bye world"
        await pilot.press("d", "d", "k")
        assert composer.text == "second one"
        await pilot.press("k", "d", "w")
        assert composer.text == "question"
        await pilot.press("enter")
        await answered(pilot, 3)
        assert app.engine.requests[-1].path[-1].content == "question"
        assert "NORMAL" not in screen_text(app)
        await pilot.press("ctrl+up", "g")
        await wait_until(pilot, lambda: getattr(app.focused, "node", None) == 0)
        await pilot.press("j", "j")
        await wait_until(pilot, lambda: app.focused.node == 2)
        await pilot.press("G")
        await wait_until(pilot, lambda: app.focused.node == 5)
        await pilot.press("i", *"typed")
        assert composer.text == "typed"


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
async def test_keys_in_a_real_terminal(tmp_path):
    screen = [sys.executable, str(Path(__file__).parent / "open_screen.py")]
    (tmp_path / "config.toml").write_text('[keys]\nclear = "f8"\n')
    with Terminal(screen, 60, 20, TINYCHAT_HOME=str(tmp_path)) as t:
        t.wait("ready ·")
        t.type("one")
        t.press("M-Enter")
        t.type("two")
        t.wait(lambda s: "│ one " in s and "│ two " in s)
        t.press("F8")
        t.wait(lambda s: "two" not in s)
        t.type("/hlep")
        t.press("Enter")
        t.wait(lambda s: "Did you mean /help?" in s and "│ /hlep" in s)
        t.press("F8")
        t.type("slow 60")
        t.press("Enter")
        t.wait("word59")
        t.press("PageUp")
        t.wait(lambda s: "more below" in s or "word0 " in s)
        t.press("C-q")
        t.wait("ended with 0")
