"""A server over streamable HTTP, on loopback."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from tinychat.mcp.config import ServerConfig
from tinychat.mcp.servers import Servers

pytest.importorskip("mcp_types")


@pytest.fixture
def address():
    import uvicorn
    from mcp.server.mcpserver import Context, MCPServer

    server = MCPServer("web")

    @server.tool()
    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    def secret(ctx: Context) -> str:
        """The key that came with the call."""
        return ctx.headers["authorization"]

    secret.__annotations__ = {"ctx": Context, "return": str}
    server.tool()(secret)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        runner = uvicorn.Server(uvicorn.Config(server.streamable_http_app(), log_level="critical"))
        thread = threading.Thread(target=runner.run, args=([listening],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
        runner.should_exit = runner.force_exit = True
        thread.join(10)


def test_it_is_listed_called_and_given_its_headers(address):
    servers = Servers([ServerConfig("web", url=address, headers={"Authorization": "Bearer x"})])
    servers.start()
    assert servers.settle(30)
    assert [(s.state, s.words) for s in servers.servers] == [("ready", "")]
    add, secret = servers.tools()
    assert servers.call(add, {"a": 2, "b": 3}).result(20).text == "5"
    assert servers.call(secret, {}).result(20).text == "Bearer x"
    began = time.monotonic()
    servers.close()
    assert time.monotonic() - began < 3
