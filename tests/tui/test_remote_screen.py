"""The chat screen with a server, in a real terminal: as with a model of this machine."""

from __future__ import annotations

import re
import shutil
import sys

import pytest
from scripted_server import ScriptedServer, answer, status
from serving import serving
from terminal import Terminal
from tiny import tiny_model

from tinychat.chats.chat_store import ChatStore

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
TINYCHAT = [sys.executable, "-m", "tinychat"]


def opened(home, *arguments):
    environment = {"TINYCHAT_HOME": str(home), "TINYCHAT_API_KEY": "sk-very-secret"}
    return Terminal([*TINYCHAT, "run", *arguments], **environment)


def say(t, text):
    t.type(text)
    t.press("Enter")


def test_a_chat_with_a_server(tmp_path):
    """Stream, stop, answer again, switch, edit, think, fail, choose a model, leave, go on, find."""
    with ScriptedServer() as played:
        with opened(tmp_path, "--server", played.url) as t:
            shown = t.wait(
                lambda s: re.search(r"ready · org/big-model · server 127.0.0.1:\d+", s) is not None
            )
            assert "What you say goes to 127.0.0.1" in shown
            assert " 0/32768" in shown
            say(t, "slow")
            t.wait("word20")
            t.press("Escape")
            t.wait("stopped")
            t.press("C-r")
            t.wait("word10")
            t.press("Escape")
            t.wait("2/2")
            t.press("C-Up", "Left")
            t.wait("1/2")
            t.press("Up", "e")
            t.wait("Editing")
            t.press("C-a", "C-k")
            say(t, "think")
            t.wait("echo: think")
            assert "hidden thought" not in t.screen  # folded
            say(t, "/think")
            t.wait("hidden thought")
            t.wait(" 10/32768")

            played.scripts = [answer("\x1b]0;stolen\x07 \x1b[2J[@click=app.quit]x[/]")]
            say(t, "be hostile")
            t.wait("[@click=app.quit]x[/]")
            assert t.title != "stolen"

            say(t, "die")
            t.wait("ended its answer early")
            t.wait("echo: die and then")
            played.scripts = [status(401, {"error": {"message": "bad key sk-very-secret"}})]
            say(t, "one more")
            t.wait("does not accept the key (401): bad key …")

            played.listed = {"data": [{"id": "org/big-model"}, {"id": "small", "max_model_len": 512}]}
            t.press("C-o")
            shown = t.wait("512 tokens")
            assert f"{played.url}/v1 · enter loads" in shown
            t.press("Down", "Enter")
            t.wait("ready · small")
            say(t, "hello")
            t.wait("echo: hello")
            assert played.questions[-1]["model"] == "small"
            t.press("C-q")
            t.wait("ended with 0")
            assert t.modes == "0 0 1"
        assert all(h["Authorization"] == "Bearer sk-very-secret" for _, h, _ in played.heard)
        with opened(tmp_path, "-c") as t:
            t.wait("echo: hello")
            t.wait("ready · small")
            say(t, "and now?")
            t.wait("echo: and now?")
            t.press("C-b")
            t.type("hostile")
            t.wait("slow")  # the chat's title
            t.press("C-q")
            t.wait("ended with 0")
    assert b"secret" not in (tmp_path / "chats.db").read_bytes()
    assert ChatStore(tmp_path / "chats.db").chat(1).model == f"small@{played.url}/v1"


def breaks_off(how):
    """Something is said, and then that."""

    def play(h):
        h.begin()
        h.say(content="so far")
        how(h)

    return play


FAILURES = [
    (status(400, {"error": {"message": "not \x1b[2Jso"}}), "refuses the question (400): not"),
    (status(403, b"no entry", "text/plain"), "does not accept the key (403): no entry."),
    (status(404), "does not have that (404)."),
    (status(413), "refuses the question (413)."),
    (status(501), "failed (501)."),
    (status(308, Location="http://elsewhere/v1"), "Use that address: --server http://elsewhere/v1"),
    (status(200, b"<html>", "text/html"), "answers with text/html"),
    (lambda h: h.begin(Content_Encoding="br"), "answers with br"),
    (breaks_off(lambda h: h.raw(b"data: " + b"x" * (2 << 20))), "a line without end"),
    (breaks_off(lambda h: h.raw(b"data: {{\n\n")), "broken JSON"),
    (
        breaks_off(lambda h: h.raw(b'data: {"error": {"message": "CUDA out of memory"}}\n\n')),
        "out of memory.",
    ),
    (breaks_off(lambda h: h.reset()), "was lost."),
    (breaks_off(lambda h: None), "ended its answer early."),
]


def test_every_failure_is_said_and_the_chat_goes_on(tmp_path):
    with ScriptedServer() as played, opened(tmp_path, "--server", played.url) as t:
        t.wait("ready · org/big-model")
        for i, (script, words) in enumerate(FAILURES):
            played.scripts = [script]
            say(t, f"try {i}")
            t.wait(lambda s, words=words: words in " ".join(s.split()))
        assert len(played.questions) == len(FAILURES)
        say(t, "well?")
        t.wait("echo: well?")
        said = [m["content"] for m in played.questions[-1]["messages"]]
        assert said == [*(w for i in range(8, 13) for w in (f"try {i}", "so far")), "well?"]
        t.wait("ready")
        t.press("C-q")
        t.wait("ended with 0")
    answers = [m for m in ChatStore(tmp_path / "chats.db").messages(1) if m.role == "assistant"]
    assert [m.content for m in answers if m.content] == ["so far"] * 5 + ["echo: well?"]


def test_a_server_that_is_not_there_yet(tmp_path):
    with ScriptedServer() as gone:
        url = gone.url
    with opened(tmp_path, "--server", url, "big-model") as t:
        t.type("early")
        t.wait("Nothing answers at")
        t.press("Enter")
        t.wait("type a name")  # the choice of models
        t.press("Escape")
        t.wait(lambda s: "type a name" not in s and "waiting for a model" in s)
        t.press("Escape")  # the question is taken back
        t.wait(lambda s: "waiting for a model" not in s)
        with ScriptedServer() as played:
            say(t, f"/model big-model@{played.url}/v1")
            t.wait("ready · org/big-model")
            say(t, "early")
            t.wait("echo: early")


def test_a_chat_with_tinychat_serve(tmp_path):
    with (
        tiny_model(ctx=512, backend="cpu", eos_ids=()) as model,
        serving(model, key="sk-very-secret") as server,
        opened(tmp_path, "--server", server.url, "--max-tokens", "8") as t,
    ):
        t.wait("ready · tiny")
        say(t, "hello")
        t.wait("8 tokens")
        t.press("C-r")
        t.wait("2/2")
        t.wait(lambda s: "ready" in s and "8 tokens" in s)
        t.press("C-q")
        t.wait("ended with 0")
    said = ChatStore(tmp_path / "chats.db").messages(1)
    assert [m.finish_reason for m in said] == [None, "length", "length"]
