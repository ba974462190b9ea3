"""Calls of tools line by line: each asks on a terminal, and elsewhere only what was allowed runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cli_helpers import on_terminal
from fake_servers import toolbox
from said import says
from tiny import tiny_model

from tinychat import loading
from tinychat.chats.chat_store import ChatStore
from tinychat.chats.keeper import Keeper
from tinychat.cli.repl import Repl
from tinychat.mcp.toolbox import DENIED, STOPPED

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=4096, backend="cpu", context_length=4096) as m:
        yield m


@pytest.fixture
def talk(model, monkeypatch, tmp_path, capsys):
    """Run a conversation of these lines (an exception is raised in place of one) and answers."""
    box = toolbox(tmp_path)

    def run(lines, *answers):
        says(monkeypatch, model, *answers)
        typed = iter(lines)

        def read(prompt=""):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        session = model.session(temperature=0)
        Repl(session, Keeper(ChatStore(in_memory=True), session), toolbox=box).run()
        out, err = capsys.readouterr()
        return session, out, err

    return run, box


@pytest.mark.parametrize(("answer", "result", "runs"), [
    ("o", "5", 1), ("always", "5", 1), ("N", DENIED, 0),
    (KeyboardInterrupt(), STOPPED, 0), (EOFError(), STOPPED, 0),
], ids=str)  # fmt: skip
def test_a_call_asks_and_what_is_said_holds(talk, answer, result, runs):
    run, box = talk
    session, out, err = run(["2 + 3?", "what?", answer, "/exit"], f"I add.\n{CALL}", "Five.")
    assert "The model wants to call fs/add (Adds.) with" in err
    assert '  "a": 2' in err
    assert len(box.servers.called) == runs
    assert [m["content"] for m in session.messages if m["role"] == "tool"] == [result]
    assert ("Five." in out) == (result != STOPPED)


def test_what_is_always_allowed_runs_and_mcp_takes_it_back(talk):
    run, box = talk
    _, out, err = run(
        ["2 + 3?", "a", "And 2 + 3?", "/mcp", "/mcp forget fs/add", "/mcp x", "/exit"],
        CALL, "Five.", CALL, "Five again.",
    )  # fmt: skip
    assert "Five again." in out
    assert err.count("The model wants to call") == 1
    assert "fs/add · always allowed" in err
    assert "1 permission taken back" in err
    assert "/mcp x means nothing" in err
    assert len(box.servers.called) == 2


@pytest.fixture
def one(model, monkeypatch, tmp_path):
    """Ask for one answer, with a server in mcp.json."""
    pytest.importorskip("mcp_types")
    server = Path(__file__).parents[1] / "support" / "odd_mcp_server.py"
    (tmp_path / "mcp.json").write_text(
        json.dumps({"mcpServers": {"fs": {"command": sys.executable, "args": ["-S", str(server)]}}})
    )
    (tmp_path / "mcp.json").chmod(0o600)
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    monkeypatch.setattr(type(model), "__exit__", lambda *_: None)
    monkeypatch.setattr(loading, "load", lambda *_, **__: model)

    def ask(*options, answers):
        says(monkeypatch, model, *answers)
        return on_terminal("run", "smollm2-135m", "2 + 3?", "--temp", "0", *options)

    return ask


def test_one_answer_runs_what_was_allowed_by_name_and_is_offered_nothing_else(one):
    code, out = one("--allow-tool", "fs/add", answers=[f"I add.\n{CALL}", "Five."])
    assert code == 0
    assert out.replace("\r", "") == 'I add.\n\n(calls fs/add {"a": 2, "b": 3})\nFive.\n'
    die = CALL.replace("add", "die")
    code, out = one("--allow-tool", "fs/add", "--json", answers=[die, "No."])
    assert "no tool" not in out
    assert json.loads(out.splitlines()[-1])["text"] == "No."


def test_without_a_word_of_the_user_no_server_is_started_and_calls_are_text(one):
    code, out = one(answers=[CALL])
    assert (code, out.replace("\r", "")) == (0, f"{CALL}\n")


def test_a_tool_that_is_not_there_is_said_before_anything_is_asked(one):
    code, out = one("--allow-tool", "fs/rm", answers=["x"])
    assert code != 0
    assert "There is no tool fs/rm." in out
    assert "There is fs/add" in out
