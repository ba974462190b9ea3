"""What the user allowed: for a tool as it was, kept in a file that is believed only if it is theirs."""

from __future__ import annotations

import json

import pytest
from fake_servers import OBJECT, FakeServers

from tinychat.base.errors import UsageError
from tinychat.mcp.permissions import Permissions
from tinychat.mcp.toolbox import DENIED, Toolbox
from tinychat.mcp.tools import Listed, named


def tool(about="Adds.", name="add"):
    return named([("fs", "1", [Listed(name, about, OBJECT)])])[0]


def test_it_holds_until_the_tool_changes_or_it_is_taken_back(tmp_path):
    path = tmp_path / "allowed.json"
    Permissions(path).keep(tool(), "always")
    Permissions(path).keep(tool(name="sub"), "never")
    kept = Permissions(path)
    assert (kept.of(tool()), kept.of(tool(name="sub")), kept.of(tool("Adds!"))) == ("always", "never", None)
    assert path.stat().st_mode & 0o777 == 0o600
    assert kept.forget("fs/add") == 1
    assert Permissions(path).of(tool()) is None
    assert kept.forget("f") == 0
    assert kept.forget("fs") == 1
    assert kept.forget() == 0


def test_what_is_allowed_for_one_run_is_not_kept(tmp_path):
    path = tmp_path / "allowed.json"
    kept = Permissions(path, for_now=("fs/add",))
    assert (kept.of(tool()), kept.of(tool(name="sub"))) == ("always", None)
    assert Permissions(path).of(tool()) is None
    kept.keep(tool(), "never")
    assert kept.of(tool()) == "never"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"fs/add": 1}', '{"fs/add": {"digest": 1, "answer": "always"}}']
)
def test_a_file_that_makes_no_sense_allows_nothing(tmp_path, content):
    path = tmp_path / "allowed.json"
    path.write_text(content)
    assert Permissions(path).of(tool()) is None


def test_a_file_that_others_may_write_allows_nothing(tmp_path):
    path = tmp_path / "allowed.json"
    Permissions(path).keep(tool(), "always")
    path.chmod(0o622)
    assert Permissions(path).of(tool()) is None


def called(name, arguments="{}"):
    return {
        "id": "x",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps({"a": arguments})},
    }


def test_nothing_runs_that_was_not_allowed(tmp_path):
    servers = FakeServers("5" * 5000)
    box = Toolbox(servers, Permissions(tmp_path / "allowed.json"))
    asked = []

    def says(answer):
        return lambda tool, call: asked.append(tool.where) or answer

    assert box.result(called("add"), 4096, says(None)) is None
    assert box.result(called("add"), 4096, says("never")) == DENIED
    assert servers.called == []
    assert box.result(called("add"), 4096, says("once")).startswith(
        "Error: there is no tool add. There is: sub"
    )
    assert [t["function"]["name"] for t in box.offered()] == ["sub"]  # what may never run is not offered
    box.permissions.forget()
    assert box.result(called("add"), 4096, says("once")).startswith("5" * 4096 + "\n(cut")
    assert box.result(called("add"), 4096, says("always")).startswith("5")
    assert box.result(called("add"), 4096, says(None)).startswith("5")
    assert box.result(called("rm"), 4096, says("once")).startswith("Error: there is no tool rm")
    assert len(asked) == 4
    assert len(servers.called) == 3


def test_what_cannot_be_written_holds_for_the_run_and_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    box = Toolbox(FakeServers(), Permissions(tmp_path / "file" / "allowed.json"))
    assert box.result(called("add"), 4096, lambda tool, call: "always") == "5"
    assert box.permissions.of(box.tools()[0]) == "always"
    assert "holds until the chat ends" in box.news()
    assert box.news() == ""


def test_one_answer_is_offered_what_was_allowed_by_name(tmp_path):
    box = Toolbox(
        FakeServers("5" * 5000), Permissions(tmp_path / "a.json", for_now=("fs/sub",)), only=("fs/sub",)
    )
    assert [t["function"]["name"] for t in box.offered()] == ["sub"]
    box.check(["fs/sub"])
    with pytest.raises(UsageError, match="no tool fs/rm"):
        box.check(["fs/sub", "fs/rm"])


def test_it_says_what_there_is_and_takes_back(tmp_path):
    box = Toolbox(FakeServers("5" * 5000), Permissions(tmp_path / "a.json"))
    box.permissions.keep(box.servers.tools()[0], "always")
    lines = box.command("")
    assert lines[0] == "fs: ready"
    assert lines[1] == "  fs/add · always allowed · Adds."
    assert lines[2].startswith("  fs/sub · asks")
    assert box.command("forget fs/add") == ["1 permission taken back: the next call asks."]
    assert "asks" in box.command("")[1]
    with pytest.raises(UsageError):
        box.command("frobnicate")
