"""Servers that run, die, hang and flood: what becomes of their tools and calls, and of the program."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from tinychat.base.errors import MissingPackageError, UsageError
from tinychat.mcp import config as configuration
from tinychat.mcp import stdio
from tinychat.mcp.config import ServerConfig
from tinychat.mcp.servers import Servers
from tinychat.mcp.toolbox import Toolbox

pytest.importorskip("mcp_types")
SUPPORT = Path(__file__).parents[1] / "support"
SERVER = str(SUPPORT / "odd_mcp_server.py")


def config(name="fs", how="", server=SERVER, **more) -> ServerConfig:
    return ServerConfig(name, (sys.executable, "-S", server, *([how] if how else [])), **more)


def processes() -> set[int]:
    return {p.pid for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE}


def call(servers, name, /, **arguments):
    tool = next(t for t in servers.tools() if t.name == name)
    return servers.call(tool, arguments).result(20)


@pytest.fixture(scope="module")
def servers():
    all_of_them = Servers([config(), config("other")])
    all_of_them.start()
    assert all_of_them.settle(30)
    yield all_of_them
    all_of_them.close()


def test_a_server_made_with_the_sdk():
    command = (sys.executable, str(SUPPORT / "mcp_server.py"))
    alone = Servers([ServerConfig("sdk", command, {"TOKEN": "secret"})])
    alone.start()
    assert alone.settle(60)
    assert [(s.state, s.words) for s in alone.servers] == [("ready", "")]
    assert [(t.where, t.called) for t in alone.tools()][:2] == [
        ("sdk/add", "add"),
        ("sdk/environment", "environment"),
    ]
    assert call(alone, "add", a=2, b=3).text == "5"
    assert call(alone, "environment", name="TOKEN").text == "secret"
    assert call(alone, "environment", name="TINYCHAT_HOME").text == "(unset)"  # it sees what it needs
    failed = call(alone, "fail")
    assert failed.failed
    assert failed.text.startswith("Error: ")
    assert call(alone, "add", a="x").failed
    assert call(alone, "picture").text == "Here it is.\n[image: image/png, which is not shown]"
    alone.close()


def test_tools_of_two_servers_have_names_of_their_own(servers):
    assert [(s.state, s.words) for s in servers.servers] == [("ready", ""), ("ready", "")]
    tools = {t.where: t for t in servers.tools()}
    assert (tools["fs/add"].called, tools["other/add"].called) == ("fs_add", "other_add")
    assert tools["fs/add"].digest == servers.tools()[0].digest != tools["other/add"].digest
    assert tools["fs/add"].schema["required"] == ["a", "b"]
    assert "\x1b" not in tools["fs/evil"].description
    assert {t.name for t in servers.tools()} == {"add", "die", "hang", "flood", "evil", "where"}


def test_what_a_tool_says_is_text_without_instructions_to_a_terminal(servers):
    text = call(servers, "evil").text
    assert not any(c in text for c in "\x1b\u202e")
    assert "Obey." in text
    assert len(call(servers, "flood").text) == 300_000  # cut for its model, who is not known here
    assert call(servers, "where").text == str(Path.home())  # never where the user happens to be


def test_a_server_that_dies_in_a_call_says_so_and_starts_again():
    others, alone = processes(), Servers([config()])
    alone.start()
    assert alone.settle(30)
    assert [(s.state, s.words) for s in alone.servers] == [("ready", "")]
    began = time.monotonic()
    assert call(alone, "die").failed
    assert time.monotonic() - began < 10
    server = alone.servers[0]
    until = time.monotonic() + 10
    while server.state != "ended" and time.monotonic() < until:
        time.sleep(0.01)
    assert (server.state, server.words) == ("ended", "it ended with code 7: dying as told")
    assert alone.tools() == []
    alone.start()
    assert alone.settle(30)
    assert call(alone, "add", a=1, b=1).text == "2"
    hanging = alone.call(next(t for t in alone.tools() if t.name == "hang"), {})
    assert processes() > others
    began = time.monotonic()
    alone.close()
    assert time.monotonic() - began < 3
    assert processes() == others
    assert hanging.cancelled() or hanging.result(5).failed


@pytest.mark.parametrize(("how", "words"), [
    ("dies", "it ended with code 3: no key was given"),
    ("endless", "it wrote a line of more than 8 MB"),
    ("chatty", "it did not say within"),
    ("silent", "it did not say within"),
])  # fmt: skip
def test_a_server_that_does_not_do_its_part_is_left_and_ended(how, words, monkeypatch):
    from tinychat.mcp import servers as module

    monkeypatch.setattr(module, "START_SECONDS", 60.0 if how in ("dies", "endless") else 0.4)
    before, others = psutil.Process().memory_info().rss, processes()
    alone = Servers([config(how=how)])
    alone.start()
    assert alone.settle(40)
    assert alone.servers[0].state == "failed"
    assert alone.servers[0].words.startswith(words)
    assert processes() == others
    assert psutil.Process().memory_info().rss - before < 8 * stdio.LONGEST_LINE
    alone.close()


def test_a_command_that_is_not_there_is_said():
    alone = Servers(
        [ServerConfig("no", ("/nowhere/at-all",)), ServerConfig("web", url="http://127.0.0.1:1/mcp")]
    )
    alone.start()
    assert alone.settle(30)
    no, web = alone.servers
    assert (no.state, no.words) == ("failed", "/nowhere/at-all does not exist")
    assert web.state == "failed"
    alone.close()


def test_off_on_and_another_file(monkeypatch):
    configs = [config()]
    monkeypatch.setattr(configuration, "read", lambda: configs)
    box = Toolbox(Servers(configs))
    box.start()
    assert box.servers.settle(30)
    assert len(box.offered()) == 6
    others = processes()
    assert box.command("off")[0] == "fs: off"
    assert (box.offered(), len(processes())) == ([], len(others) - 1)
    configs.append(config("other"))
    box.command("on")
    assert box.servers.settle(30)
    assert len(box.offered()) == 12
    assert box.command("")[0] == "fs: ready"
    with pytest.raises(UsageError, match="means nothing"):
        box.command("of")
    box.close()


def test_without_the_sdk_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    alone = Servers([config()])
    alone.start()
    assert alone.settle(10)
    assert "needs mcp, which is not installed" in alone.servers[0].words
    box = Toolbox(alone)
    assert box.news() == (
        'An MCP server needs mcp, which is not installed. Install it: pip install "tinychat[mcp]"'
    )
    assert box.news() == ""
    with pytest.raises(MissingPackageError):
        box.check(["fs/add"])
    alone.close()
