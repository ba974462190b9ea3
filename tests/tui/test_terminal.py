"""The screen in a real terminal: with the demo model, and with an engine that only plays one."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from terminal import Terminal

from tinychat.chats.chat_store import ChatStore

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
SCREEN = [sys.executable, str(Path(__file__).parent / "open_screen.py")]
TINYCHAT = [sys.executable, "-m", "tinychat"]


def opened(home, *arguments, command=SCREEN, **kw):
    return Terminal([*command, *arguments], TINYCHAT_HOME=str(home), **kw)


def descendants(terminal, needle):
    """Processes under the terminal whose command line contains `needle`."""
    return [
        p for p in psutil.Process(terminal.pid).children(recursive=True) if needle in " ".join(p.cmdline())
    ]


def ready(screen):
    return re.search(r"ready · \S", screen) is not None


def test_the_installed_command_with_the_demo_model(tmp_path, demo_gguf):
    """Type, stream, stop, regenerate, switch branch, edit, kill the engine, kill the screen, resume."""
    with opened(tmp_path, "run", str(demo_gguf), "--ctx", "2048", "--temp", "0", command=TINYCHAT) as t:
        t.type("Tell me a long story about a fox.")  # the model is still loading
        t.press("Enter")
        t.wait(lambda s: re.search(r"● \d+ tokens", s) is not None, 120)
        assert t.title == "● Tell me a long story about a fox. · tinychat"
        t.press("Escape")
        stopped = t.wait("stopped", 30)
        t.wait(lambda s: t.title == "Tell me a long story about a fox. · tinychat")
        assert "▌ Tell me a long story about a fox." in stopped
        assert re.search(r"tok/s · first token \d+ ms|first token [\d.]+ s", stopped)
        assert re.search(r"context \S+ \d+/2048", stopped)

        t.press("C-r")
        t.wait(lambda s: re.search(r"● \d+ tokens", s) is not None, 60)
        t.press("Escape")
        t.wait("2/2", 30)
        t.press("C-Up", "Left")
        t.wait("1/2")

        t.press("Up", "e")
        t.wait("Editing")
        t.press("C-a", "C-k")
        t.type("Name a colour.")
        t.press("Enter")
        t.wait(lambda s: re.search(r"▌ Name a colour\.(?s:.*) · first token \d+ ms · \d+ tokens", s), 60)
        t.wait(ready, 60)

        engine = descendants(t, "tinychat.process.worker")[0]
        t.type("Another long story, about rivers.")
        t.press("Enter")
        t.wait(lambda s: re.search(r"● \d+ tokens", s) is not None, 60)
        engine.kill()
        t.wait("The engine failed: it was killed")
        t.wait("cut: the engine failed")
        t.wait(ready, 120)
        t.type("/new")  # what was cut decides nothing there: this answer fills the context
        t.press("Enter")
        t.wait("Ask something.")
        screen, child = descendants(t, "tinychat run")[-1], descendants(t, "tinychat.process.worker")[-1]
        t.type("Tell me a very long story about a very long river.")
        t.press("Enter")
        store = ChatStore(tmp_path / "chats.db")
        t.wait(lambda _: len(store.chats()) == 2 and store.messages(2)[-1].role == "assistant", 60)
        t.wait(lambda _: store.messages(2)[-1].content, 60)  # stored while it streams
        screen.kill()
        t.wait("ended with 137")
        psutil.wait_procs([child], timeout=5)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE

    with opened(tmp_path, "run", "-c", command=TINYCHAT) as t:
        kept = t.wait("cut: the program ended")
        assert "▌ Tell me a very long story" in kept
        assert store.messages(2)[-1].content.split()[0] in kept
        t.press("C-b")
        t.type("fox")
        t.wait("Tell me a long story")
        t.press("C-q")
        assert "ended with 0" in t.wait("ended with")
        assert t.modes == "0 0 1"


def test_a_killed_engine_leaves_the_screen_and_the_words(tmp_path):
    with opened(tmp_path) as t:
        t.wait(ready)
        t.type("die")
        t.press("Enter")
        t.wait("The engine failed: it was killed (signal 9")
        t.wait(lambda s: "one two three" in s and "cut: the engine failed" in s)
        t.wait(ready)
        t.type("hello")
        t.press("Enter")
        t.wait("echo: hello")


def test_the_terminal_closed_in_mid_answer_loses_at_most_a_second(tmp_path):
    with opened(tmp_path) as t:
        t.wait(ready)
        t.type("slow 1000")
        t.press("Enter")
        t.wait("word60")
        screen = descendants(t, "open_screen.py")[0]
        said = max(map(int, re.findall(r"word(\d+)", t.screen)))
    psutil.wait_procs([screen], timeout=30)
    assert not screen.is_running()
    answer = ChatStore(tmp_path / "chats.db").messages(1)[1]
    assert answer.content.count("word") >= said - 50  # 20 ms a word


def test_resized_in_mid_answer(tmp_path):
    with opened(tmp_path) as t:
        t.wait(ready)
        t.type("slow 150")
        t.press("Enter")
        t.wait("word20")
        for width, height in ((60, 20), (200, 60), (80, 24)):
            t.resize(width, height)
            t.wait("word")
        t.wait("word149")
        assert "ready" in t.wait(ready)


def test_to_the_shell_and_back_in_mid_answer(tmp_path):
    with opened(tmp_path) as t:
        t.wait(ready)
        t.type("slow 200")
        t.press("Enter")
        t.wait("word10 ")
        screen = descendants(t, "open_screen.py")[0]
        t.press("C-z")
        until = time.monotonic() + 10
        while screen.status() != psutil.STATUS_STOPPED and time.monotonic() < until:
            time.sleep(0.02)
        assert screen.status() == psutil.STATUS_STOPPED
        assert t.modes.startswith("0 0")
        screen.send_signal(signal.SIGCONT)
        t.wait("word199")
        t.wait(ready)


def test_ctrl_z_and_fg_in_a_shell(tmp_path):
    shell = ["bash", "--norc", "--noprofile", "-i"]
    with Terminal(shell, TINYCHAT_HOME=str(tmp_path), PS1="shell> ") as t:
        t.wait("shell>")
        t.type(shlex.join(SCREEN))
        t.press("Enter")
        t.wait(ready)
        t.type("slow 200")
        t.press("Enter")
        t.wait("word10 ")
        t.press("C-z")
        t.wait("Stopped")
        t.type("echo between")
        t.press("Enter")
        assert t.modes == "0 0 1"
        t.type("fg")
        t.press("Enter")
        t.wait("word199")  # what was said meanwhile is there
        t.wait(ready)
        t.type("hello")
        t.press("Enter")
        t.wait("echo: hello")
        t.press("C-q")
        t.wait(lambda s: s.rstrip().endswith("shell>"))
        assert t.modes == "0 0 1"
    said = ChatStore(tmp_path / "chats.db").messages(1)[1].content
    assert said == "".join(f"word{i} " for i in range(200))


def test_the_editor_writes_the_message(tmp_path):
    editor = tmp_path / "an editor"
    editor.write_text('#!/bin/sh\n[ "$1" = --wait ] && grep -q begun "$2" && echo "and ended" >> "$2"\n')
    editor.chmod(0o755)
    with opened(tmp_path, EDITOR=f"{shlex.quote(str(editor))} --wait", VISUAL="") as t:
        t.wait(ready)
        t.type("begun ")
        t.press("C-g")
        t.wait(lambda s: "│ begun" in s and "and ended" in s)
        t.press("Enter")
        t.wait("echo: begun")
        t.press("C-q")
        t.wait("ended with 0")


def test_told_to_end_it_stores_and_restores_the_terminal(tmp_path):
    with opened(tmp_path) as t:
        t.wait(ready)
        t.type("slow 1000")
        t.press("Enter")
        t.wait("word30")
        descendants(t, "open_screen.py")[0].terminate()
        t.wait("ended with")
        assert t.modes == "0 0 1"
    assert "word30" in ChatStore(tmp_path / "chats.db").messages(1)[1].content


def test_a_crash_restores_the_terminal(tmp_path):
    code = (
        "import sys; from tinychat.chats.chat_store import ChatStore; from tinychat.tui.app import make_app\n"
        "app = make_app('fake', ChatStore(), command=['sleep', '100'])\n"
        "app.call_later(lambda: app.set_timer(0.5, lambda: 1 / 0)); sys.exit(app.run_to_end())"
    )
    with opened(tmp_path, "-c", code, command=[sys.executable]) as t:
        assert "ZeroDivisionError" in t.wait("ended with 1")
        assert t.modes == "0 0 1"


def test_two_terminals_side_by_side(tmp_path):
    with opened(tmp_path) as a, opened(tmp_path) as b:
        for t, word in ((a, "first"), (b, "second")):
            t.wait(ready)
            t.type(word)
            t.press("Enter")
            t.wait(f"echo: {word}")
        b.press("C-b")
        b.wait("first")
        b.type("first")
        time.sleep(0.3)
        b.press("Enter")
        b.wait("is open in another terminal")


def test_a_hundred_kilobytes_pasted(tmp_path):
    with opened(tmp_path) as t:
        t.wait(ready)
        t.paste("a line of text to paste\n" * 4400)
        t.wait("paste 1")
        assert "106 kB, 26,400 of 936 tokens" in t.wait("tokens")
        t.wait("more than the context holds")
        t.type("what is this?")
        t.press("Enter")
        t.wait("has 26,40")
        t.press("Enter")  # the first tokens of it
        t.wait(lambda s: "tok/s" in s and "what is this?" in s)


def test_what_is_typed_before_the_screen_is_there_is_not_lost(tmp_path, demo_gguf):
    with opened(tmp_path, "run", str(demo_gguf), command=TINYCHAT) as t:
        t.type("early")
        assert "│ early" in t.wait("early", 20) or t.wait("│ early", 20)


def test_nothing_heavy_is_imported_for_the_first_paint(tmp_path):
    heavy = ("torch", "numpy", "tokenizers", "gguf", "safetensors", "huggingface_hub", "jinja2")
    code = (
        "import sys, asyncio, tinychat.cli.main, tinychat.tui.first_frame\n"
        "from pathlib import Path\n"
        "from tinychat.chats.chat_store import ChatStore\n"
        "from tinychat.tui.app import make_app\n"
        "app = make_app('fake', ChatStore(Path(sys.argv[1])), command=['sleep', '100'])\n"
        "async def main():\n"
        "    async with app.run_test() as pilot:\n"
        "        print([m for m in sys.modules if m in sys.argv[2].split()])\n"
        "asyncio.run(main())\n"
    )
    arguments = [str(tmp_path / "chats.db"), " ".join(heavy)]
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr
