"""`tinychat run --server`: one answer, and a conversation line by line."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from cli_helpers import TINYCHAT, on_terminal, tinychat
from dialects import Vllm
from scripted_server import ScriptedServer, answer, status

from tinychat.chats.chat_store import ChatStore


@pytest.fixture
def played(here, monkeypatch):
    for name in ("TINYCHAT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with ScriptedServer() as s:
        yield s


def test_one_answer_and_what_is_wrong(played, tmp_path):
    out = tinychat("run", "--server", played.url, "org/big-model", "think", "--json", "--temp", "0.5")
    said = json.loads(out.stdout)
    assert (said["text"], said["reasoning"]) == ("echo: think", "hidden thought")
    assert said["model"] == f"org/big-model@{played.url}/v1"
    assert said["stats"]["cached_tokens"] == 4
    assert played.questions[-1]["temperature"] == 0.5
    out = tinychat("run", "--server", played.url, "die", stdin="piped in")
    assert (out.returncode, out.stdout) == (0, "echo: piped in\n")  # "die" is asked for as a model
    cut = tinychat("run", "--server", played.url, "org/big-model", "die")
    assert (cut.returncode, cut.stdout) == (1, "echo: die and then\n")
    assert cut.stderr.startswith("Error: ")
    assert len(cut.stderr.splitlines()) == 2


def test_a_schema_and_an_effort_are_sent_and_an_answer_that_is_no_json_is_found_out(played):
    played.scripts = [answer('{"a": 1}')]
    asked = ["run", "--server", played.url, "org/big-model", "x", "--schema", '{"type": "object"}']
    out = tinychat(*asked, "--effort", "low")
    assert (out.returncode, out.stdout) == (0, '{"a": 1}\n')
    assert played.questions[-1]["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert played.questions[-1]["reasoning_effort"] == "low"
    out = tinychat(*asked)
    assert (out.returncode, out.stdout) == (5, "echo: x\n")
    assert "no JSON" in out.stderr


def test_a_cut_answer_goes_on_line_by_line(played):
    played.listed = Vllm.listed()
    more = Vllm.answer({"content": ", three."}, {"content": " Four."})
    played.scripts = [Vllm.answer({"content": "One, two"}, reason="length"), more]
    typed = "Count.\n/continue\n/save chat.json\n/exit\n"
    code, shown = on_terminal("run", "--server", played.url, "--plain", "--no-store", typed=typed)
    assert (code, "(cut by max_tokens: /continue goes on)" in shown) == (0, True), shown
    assert [n["content"] for n in json.loads(Path("chat.json").read_text())["nodes"]] == [
        "Count.",
        "One, two, three. Four.",
    ]


def test_options_that_make_no_sense_are_refused_before_anything_is_asked(played):
    for wrong in (
        ["--server", played.url, "m", "hi", "--ctx", "100"],
        ["--server", "nowhere:x", "m", "hi"],
        ["--server", played.url, "--api-key-env", "NOT_SET", "m", "hi"],
        ["--api-key-env", "X", "m", "hi"],
        ["--server", "http://elsewhere", f"m@{played.url}/v1", "hi"],
    ):
        code, shown = on_terminal("run", *wrong)
        assert code == 2
        assert len(shown.splitlines()) == 2, shown
    assert played.heard == []


def test_a_chat_line_by_line_is_kept_and_goes_on_where_it_was_held(played, tmp_path):
    typed = "think\n/set temperature 0.5\nsecond\n/regen\n/stats\n/save chat.json\n/new\nother\n/exit\n"
    code, shown = on_terminal("run", "--server", played.url, "--plain", typed=typed)
    assert code == 0, shown
    assert "echo: second" in shown
    assert "top_k (as the server has it)" in shown
    assert f"org/big-model@{played.url}/v1 · server · 32768 tokens of context" in shown
    assert played.questions[1]["temperature"] == 0.5
    assert "temperature" not in played.questions[0]
    code, shown = on_terminal("run", "--server", played.url, "--plain", typed="/load chat.json\nmore\n")
    assert code == 0, shown
    assert [m["content"] for m in played.questions[-1]["messages"]][-3:] == ["second", "echo: second", "more"]
    out = tinychat("run", "--resume", "1", "and now?")  # its name says where it was held
    assert out.stdout == "echo: and now?\n", out.stderr
    store = ChatStore()
    messages = store.messages(1)
    assert messages[0].content == "think"
    assert messages[1].split() == ("hidden thought", "echo: think")
    assert store.chat(1).model == f"org/big-model@{played.url}/v1"
    assert store.search("second")


def test_a_failed_answer_line_by_line_leaves_the_conversation(played):
    played.scripts = [status(400, {"error": {"message": "not like that"}})]
    code, shown = on_terminal("run", "--server", played.url, "--plain", typed="one\ntwo\n/exit\n")
    assert code == 0
    assert "not like that" in shown
    assert "echo: two" in shown
    assert [m["content"] for m in played.questions[-1]["messages"]] == ["two"]


def test_an_error_in_the_middle_of_an_answer_begins_a_line(played):
    code, shown = on_terminal("run", "--server", played.url, "--plain", typed="die\n/exit\n")
    assert code == 0
    lines = shown.splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith("and then"))
    assert played.url in lines[at + 1], shown


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(played):
    command = [*TINYCHAT, "run", "--server", played.url, "org/big-model", "slow"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        said = ""
        while "word3" not in said:
            said += p.stdout.read(1)
        p.send_signal(signal.SIGINT)
        said += p.stdout.read()
    assert p.returncode == 130
    assert said.startswith("echo: slow word0")
    assert said.endswith("\n")
