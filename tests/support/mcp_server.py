"""An MCP server made with the SDK, over stdio."""

import os

from mcp.server.mcpserver import MCPServer
from mcp_types import ImageContent, TextContent

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@server.tool()
def environment(name: str) -> str:
    """A variable of the server's environment."""
    return os.environ.get(name, "(unset)")


@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("the disk is on fire")


@server.tool()
def picture() -> list[TextContent | ImageContent]:
    """Draws."""
    return [
        TextContent(type="text", text="Here it is."),
        ImageContent(type="image", data="AAAA", mime_type="image/png"),
    ]


if __name__ == "__main__":
    server.run()
