"""mcp.json: in the form of other programs, read only where it is the user's own."""

from __future__ import annotations

import json
import os

import pytest

from tinychat.base.errors import TinychatError
from tinychat.mcp import config
from tinychat.mcp.config import ServerConfig, read


def written(folder, content, mode=0o600):
    path = folder / "mcp.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(mode)
    return path


def test_what_other_programs_write_is_read(tmp_path):
    servers = {
        "fs": {"command": "npx", "args": ["-y", "server", "/home/me"], "env": {"DEBUG": 1}, "type": "stdio"},
        "web": {"url": "https://example.org/mcp", "headers": {"Authorization": "Bearer x"}},
        "off": {"command": "x", "disabled": True},
    }
    found = [
        ServerConfig("fs", ("npx", "-y", "server", "/home/me"), {"DEBUG": "1"}),
        ServerConfig("web", url="https://example.org/mcp", headers={"Authorization": "Bearer x"}),
    ]
    for table in ("mcpServers", "servers"):
        assert read(written(tmp_path, {table: servers, "other": 1})) == found
    assert read(tmp_path / "nothing.json") == []


def test_it_lies_beside_the_settings_and_never_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    written(tmp_path, {"mcpServers": {"evil": {"command": "x"}}})
    assert config.config_file() == tmp_path / "home" / "mcp.json"
    assert read() == []


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_not_believed(tmp_path, mode):
    path = written(tmp_path, {"mcpServers": {}}, mode)
    with pytest.raises(TinychatError) as e:
        read(path)
    assert e.value.todo == f"chmod 600 {path}"
    path.chmod(0o644)
    assert read(path) == []


def test_neither_is_one_of_somebody_else_or_in_a_folder_of_all(tmp_path, monkeypatch):
    path = written(tmp_path, {"mcpServers": {}})
    tmp_path.chmod(0o777)
    with pytest.raises(TinychatError, match="folder"):
        read(path)
    tmp_path.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(TinychatError, match="not yours"):
        read(path)


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", '{"mcpServers": []}', "[" * 10_000, {"mcpServers": {"a": []}}, {"mcpServers": {"a": {}}},
    {"mcpServers": {"a": {"command": ["x"]}}}, {"mcpServers": {"a": {"command": "x", "args": "y"}}},
    {"mcpServers": {"a": {"command": "x", "args": [1]}}}, {"mcpServers": {"a": {"command": "x\0"}}},
    {"mcpServers": {"a": {"command": "x", "env": ["A=b"]}}}, {"mcpServers": {"a": {"command": ""}}},
    {"mcpServers": {"a": {"command": "x", "env": {"A": "b\0"}}}}, {"mcpServers": {"a": {"url": "file:///x"}}},
    {"mcpServers": {"a": {"url": "http://[/"}}}, {"mcpServers": {"a": {"url": "http://h", "command": "x"}}},
    {"mcpServers": {"a": {"url": "http://h", "headers": {"A": "b\r\nC: d"}}}}, {"mcpServers": {"": {}}},
    {"mcpServers": {"a\x1b[2J": {"command": "x"}}}, {"mcpServers": {"a": {"url": "http://h", "type": "sse"}}},
    {"mcpServers": {str(i): {"command": "x"} for i in range(60)}},
], ids=lambda c: str(c)[:40])  # fmt: skip
def test_what_makes_no_sense_is_said_in_two_lines(tmp_path, content):
    with pytest.raises(TinychatError) as e:
        read(written(tmp_path, content))
    assert e.value.todo
    assert "\x1b" not in f"{e.value.what}{e.value.todo}"
    assert "\n" not in e.value.what
