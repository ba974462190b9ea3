"""MCP servers without processes: one, called fs, whose tools answer at once or when a test says so."""

from __future__ import annotations

from concurrent.futures import Future

from tinychat.mcp.config import ServerConfig
from tinychat.mcp.permissions import Permissions
from tinychat.mcp.servers import Servers
from tinychat.mcp.toolbox import Toolbox
from tinychat.mcp.tools import Listed, Result

OBJECT = {"type": "object", "properties": {}}


class FakeServers(Servers):
    """`called` has what was called; `waits` leaves results to the test."""

    def __init__(self, result: str = "5"):
        super().__init__([ServerConfig("fs", ("x",))])
        self.result, self.waits = result, False
        self.called: list[tuple] = []
        self.futures: list[Future] = []
        (server,) = self.servers
        server.state, server.tools = "ready", [Listed("add", "Adds.", OBJECT), Listed("sub", "", OBJECT)]

    running = True

    def start(self):
        pass

    def close(self):
        pass

    def call(self, tool, arguments):
        self.called.append((tool.name, arguments))
        self.futures.append(future := Future())
        if not self.waits:
            future.set_result(Result(self.result))
        return future


def toolbox(folder, result: str = "5") -> Toolbox:
    """A toolbox with that server; what is allowed is kept in a file of the folder."""
    return Toolbox(FakeServers(result), Permissions(folder / "allowed.json"))
