"""Whatever a stranger's file, folder, chat or name holds, no command lets it speak to the terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess

import pytest
from cli_helpers import GREEDY, TINYCHAT, on_terminal
from stored import add
from tiny import tiny_folder
from tiny_gguf import write as write_gguf

from tinychat.base import locations
from tinychat.chats.chat_store import ChatStore

EVIL = "X\x1b]52;c;aGk=\x07\x1b]0;TITLE\x07\x1b[8m\x9b2J\u202e\u2066\r\x08[link=https://evil]Y"
FORBIDDEN = re.compile(
    "\x1b(?!\\[[0-9;]*m)|\x1b\\[(?:0;)?8m|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)
BAR = re.compile("\x1b\\[(?:\\?25[lh]|2K|1A)|\r(?=\x1b\\[)")  # how a progress bar moves


@pytest.fixture
def evil(here):
    """A folder, a GGUF, an installed model, an alias and a chat, all of them with EVIL where text can be."""
    folder = tiny_folder(here / f"m{EVIL.replace('/', '')}")
    config = json.loads((folder / "config.json").read_text())
    (here / "bad").mkdir()
    bad = config | {"architectures": [EVIL], "torch_dtype": EVIL, "model_type": EVIL}
    (here / "bad" / "config.json").write_text(json.dumps(bad))
    (here / "bad" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": EVIL}))
    (folder / "README.md").write_text(f"---\nlicense: '{EVIL}'\n---\n", newline="")
    write_gguf(here / "evil.gguf", license=EVIL)
    installed = locations.models_dir() / "installed"
    installed.mkdir(parents=True)
    manifest = {"name": f"in{EVIL}", "file": "x.gguf", "source": EVIL, "quantization": EVIL, "license": EVIL}
    (installed / "manifest.json").write_text(json.dumps(manifest))
    (installed / "x.gguf").write_bytes(b"GGUF")
    (locations.home() / "aliases.json").write_text(json.dumps({EVIL: "file:/nowhere.gguf"}))
    store = ChatStore()
    chat = store.create(f"model{EVIL}", title=f"title{EVIL}")
    add(store, chat.id, "user", f"glacier {EVIL}", None)
    store.close()
    return folder


def test_no_command_lets_a_stranger_speak_to_the_terminal(evil, here):
    (here / "text.txt").write_text(f"It was a dark night. {EVIL}" * 5, newline="")
    (here / f"note{EVIL.replace('/', '')}.txt").write_bytes(b"\xff\xfe")
    session = {"tinychat_session": 1, "model": EVIL, "system": None, "params": {}, "leaf": 0}
    node = {"role": "user", "content": EVIL, "parent": None, "prompt_text": "", "prompt_ids": [], "ids": []}
    (here / "chat.json").write_text(
        json.dumps(session | {"nodes": [node | {"finish_reason": None, "stats": {}}]})
    )
    said = {}
    for args, typed, code in [
        (["run", evil, "hi", *GREEDY, "--verbose"], "", 0),
        (
            ["run", evil, "--plain"],
            f"/load {here}/chat.json\n/nope{EVIL}\n/save /{EVIL}/x\n/system {EVIL}\n",
            0,
        ),
        (["run", here / "bad", "hi"], "", 1),
        (["run", evil, "hi", "-f", next(here.glob("note*"))], "", 2),
        (["run", f"no{EVIL}", "hi"], "", 0),  # it has spaces, so all of it is said to a model
        (["run", EVIL, "hi"], "", 1),
        (["show", evil], "", 0),
        (["show", here / "evil.gguf"], "", 0),
        (["show", here / "evil.gguf", "--json"], "", 0),
        (["show", here / "bad"], "", 1),
        (["list"], "", 0),
        (["list", "--all"], "", 0),
        (["list", "--json"], "", 0),
        (["pull", EVIL], "", 1),
        (["ppl", evil, "text.txt"], "", 0),
        (["bench", here / "bad"], "", 1),
        (["quantize", here / "bad", "--out", f"o{EVIL}"], "", 1),
        (["chats"], "", 0),
        (["chats", "glacier"], "", 0),
        (["chats", EVIL], "", 0),
        (["chats", "export", "1"], "", 0),
        (["chats", "rm", "1"], "", 0),
        (["rm", "installed"], "n\n", 130),
        (["rm", EVIL], "y\n", 3),
        (["doctor"], "", None),
        ([f"no{EVIL}"], "", 2),
        (["run", f"--{EVIL}"], "", 2),
        (["--help"], "", 0),
    ]:
        got, shown = on_terminal(*args, typed=typed)
        assert code in (None, got), (args, shown)
        shown = BAR.sub("", shown) if args[0] == "ppl" else shown
        assert not FORBIDDEN.findall(shown), (args, shown)
        assert "Internal error" not in shown, (args, shown)
        said[" ".join(map(str, args[:2]))] = shown
    # It is all there, as text.
    assert "title" in said["chats"] or "titleX␛]52;c;aGk=" in said["chats glacier"]
    assert "X␛]52;c;aGk=␇" in said[f"show {evil}"]
    assert "[link=https://evil]Y" in said["chats export"]


def test_a_traceback_and_a_warning_are_text_too(evil, here, monkeypatch):
    monkeypatch.setenv("TINYCHAT_DEBUG", "1")
    code, shown = on_terminal("run", here / "bad", "hi")
    assert code == 1
    assert "Traceback" in shown
    assert not FORBIDDEN.findall(shown)

    def warns(*_args, **_kwargs):
        import warnings

        warnings.warn(EVIL, stacklevel=1)
        return {}

    monkeypatch.setattr("tinychat.hub.store.show", warns)
    assert "␛]52" in (shown := on_terminal("show", "x")[1])
    assert not FORBIDDEN.findall(shown)


def test_licences_are_text(evil, monkeypatch):
    from tinychat.hub import store

    monkeypatch.setattr(store, "pull", lambda name: print(EVIL) or locations.home())
    assert not FORBIDDEN.findall(on_terminal("pull", "x")[1])


def test_completion_offers_no_name_that_a_shell_would_show_as_something_else(evil):
    from tinychat.cli.options import complete_models

    offered = [item.value for item in complete_models(None, None, "")]
    assert "smollm2-135m" in offered
    assert not [n for n in offered if not n.isprintable()]


def test_on_a_real_terminal(evil, here):
    """Once without a stand-in for the terminal."""
    for args in (["show", evil], ["run", here / "bad", "hi"]):
        ours, theirs = pty.openpty()
        process = subprocess.Popen([*TINYCHAT, *map(str, args)], stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            shown += part
        assert process.wait(60) in (0, 1)
        os.close(ours)
        text = shown.decode().replace("\r\n", "\n")
        assert "␛]52;c;aGk=␇" in text
        assert not FORBIDDEN.findall(text)
