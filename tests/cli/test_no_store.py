"""`--no-store`: a word that was typed is in no file afterwards, however it was said."""

from __future__ import annotations

import os
import shutil

import pytest
from cli_helpers import GREEDY, TINYCHAT, tinychat
from stored import add
from terminal import Terminal

from tinychat.chats.chat_store import ChatStore

WORD = "zyzzogeton"
needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")


@pytest.fixture
def places(here, tmp_path, monkeypatch):
    """TINYCHAT_HOME, the home folder and the temporary folder, all new."""
    for name, folder in (
        ("TINYCHAT_HOME", "tiny"),
        ("HOME", "home"),
        ("TMPDIR", "tmp"),
        ("SQLITE_TMPDIR", "tmp"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(tmp_path / folder))
    return tmp_path


def traces(places):
    """Files that have the word, in any folder that a program writes to."""
    return [
        str(p.relative_to(places))
        for p in places.rglob("*")
        if p.is_file() and any(w in p.read_bytes() for w in (WORD.encode(), WORD.upper().encode()))
    ]


def opened(folder, *flags):
    """`tinychat run` in a terminal of its own."""
    settings = {n: os.environ[n] for n in ("TINYCHAT_HOME", "HOME", "TMPDIR", "SQLITE_TMPDIR")}
    command = [*TINYCHAT, "run", str(folder), *flags, *GREEDY]
    return Terminal(command, height=100, PYTHONUTF8="1", **settings)


def prompts(n):
    """The nth prompt waits."""
    return lambda screen: screen.count(">>>") == n and screen.rstrip().splitlines()[-1].startswith(">>>")


def chat_folders(places):
    """What there is besides weights."""
    return sorted(p.name for p in (places / "tiny").iterdir() if p.name != "packs" and "hashes" not in p.name)


def test_one_answer(folder, places):
    out = tinychat("run", folder, WORD * 20, *GREEDY, "--no-store")
    assert out.returncode == 0
    assert traces(places) == []
    assert chat_folders(places) == []


@needs_tmux
def test_the_plain_conversation(folder, places):
    with opened(folder, "--plain", "--no-store") as t:
        t.wait(prompts(1), 60)
        lines = (f"about {WORD}", f"/system {WORD}", f"/edit {WORD} again", "/regen", "/new", f"more {WORD}")
        for i, line in enumerate(lines):
            t.type(line)
            t.press("Enter")
            t.wait(prompts(i + 2), 60)
        t.press("Up")  # it is there while the program runs
        t.wait(lambda s: s.rstrip().endswith(f">>> more {WORD}"))
        t.press("C-c")
        t.wait(prompts(len(lines) + 2))
        t.type("/exit")
        t.press("Enter")
        t.wait("ended with 0")
    assert traces(places) == []
    assert chat_folders(places) == []


@needs_tmux
def test_the_screen(folder, places):
    with opened(folder, "--no-store") as t:
        t.wait("ready ·", 60)
        t.type(f"about {WORD} " * 8)
        t.press("Enter")
        t.wait("first token", 60)
        t.type(f"/system {WORD}")
        t.press("Enter")
        t.wait("System prompt")
        t.type(f"/rename {WORD}")
        t.press("Enter")
        t.type(f"a draft about {WORD}")
        t.wait("a draft")
        assert WORD not in t.title
        t.press("C-q")
        t.wait("ended with 0")
    assert traces(places) == []
    assert chat_folders(places) == []


@needs_tmux
def test_what_an_earlier_version_kept_of_it_goes(folder, places):
    (places / "tiny" / "history").write_text(f"about {WORD}\n")
    store = ChatStore()
    add(store, store.create("demo").id, "user", "said before", None)
    store.close()
    with opened(folder, "--plain") as t:
        t.wait(prompts(1), 60)
        t.press("Up")
        t.wait(lambda s: s.rstrip().endswith(">>> said before"))
        t.press("C-c")
        t.wait(prompts(2))
        t.type("/exit")
        t.press("Enter")
        t.wait("ended with 0")
    assert traces(places) == []
