"""MCP servers that the user has set up: their tools, calls of them, and what the user allows."""
