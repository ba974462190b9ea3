"""Whatever encoding a terminal has, every command can print, and takes what is typed there."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from contextlib import suppress

from cli_helpers import GREEDY, TINYCHAT, assert_two_lines, tinychat
from stored import add
from tiny import tiny_folder

from tinychat.chats.chat_store import ChatStore

ASCII = {"PYTHONIOENCODING": "ascii"}


def run(*args, environment=ASCII, **kwargs):
    return tinychat(*args, env={**os.environ, **environment}, **kwargs)


def test_chats_can_be_listed_and_exported_in_ascii(here):
    store = ChatStore()
    chat = store.create("demo")
    add(store, chat.id, "user", "“cup” 漢字", None)
    store.close()
    listed = run("chats", environment={"PYTHONIOENCODING": "latin-1"})
    assert (listed.returncode, listed.stderr) == (0, "")
    assert '"cup" ????' in listed.stdout
    assert json.loads(run("chats", "--json").stdout)[0]["title"] == "“cup” 漢字"
    exported = run("chats", "export", "1", "--json").stdout
    assert json.loads(exported)["nodes"][0]["content"] == "“cup” 漢字"


def test_an_answer_in_ascii_and_a_prompt_in_latin1(folder, here):
    whole = tinychat("run", folder, "caf\udce9", *GREEDY, "--json")
    assert whole.returncode == 0, whole.stderr
    ascii_only = run("run", folder, "café", *GREEDY, "--json")
    assert json.loads(ascii_only.stdout)["text"] == json.loads(whole.stdout)["text"]
    assert run("run", folder, "caf\udce9", *GREEDY).returncode == 0


def test_a_line_typed_in_latin1_is_an_ordinary_line(folder, here):
    ours, theirs = pty.openpty()
    command = [*TINYCHAT, "run", str(folder), "--plain", *GREEDY]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        said = b""
        for expected, typed in ((b">>> ", b"caf\xe9 au lait\n"), (b">>> ", b"\x04")):
            at = len(said)
            while expected not in said[at:]:
                said += os.read(ours, 4096)
            os.write(ours, typed)
        with suppress(OSError):
            while data := os.read(ours, 4096):
                said += data
    os.close(ours)
    assert process.returncode == 0, said
    assert ChatStore().messages(1)[0].content in ("café au lait", "caf au lait")  # readline drops it


def test_a_model_whose_name_is_not_utf8_is_refused(here):
    name = os.fsdecode(b"mod\xe8le")
    folder = tiny_folder(here / name)
    for environment in ({}, ASCII):
        for command in (["show", folder], ["show", f"{name}x"], ["run", folder, "hi"], ["run", name, "hi"]):
            assert_two_lines(run(*command, environment=environment), 2)
