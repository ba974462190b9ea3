"""The servers that run: started on a thread with a loop of its own, asked for their tools, called, ended.

Nothing here waits for a server on behalf of its caller: what becomes of them is told by their states.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tinychat.base.errors import MissingPackageError
from tinychat.base.terminal import one_line
from tinychat.mcp.config import ServerConfig
from tinychat.mcp.stdio import StdioTransport
from tinychat.mcp.tools import MOST_TOOLS, Listed, Result, Tool, named, read_listed, result_of

START_SECONDS = 60.0  # until a server must have told its tools
CALL_SECONDS = 600.0  # that a call may take
END_SECONDS = 3.0  # that the end of all servers is waited for
PAGES = 20  # of a list of tools


@dataclass
class Server:
    """One of them. `state`: starting, ready, failed or ended; `words` say why."""

    config: ServerConfig
    state: str = "starting"
    words: str = ""
    tools: list[Listed] = field(default_factory=list)
    client: Any = None
    task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """As its owner calls it."""
        return self.config.name


class Servers:
    """All servers of a configuration. Calls may come from any thread."""

    def __init__(self, configs: Sequence[ServerConfig], changed: Callable[[], None] = lambda: None):
        """changed: is called, on the servers' thread, after a state or a list of tools has become another."""
        self._servers = [Server(c) for c in configs]
        self._changed = changed
        self.missing: MissingPackageError | None = None  # what none of them can do without
        self._named: tuple[list[Any], list[Tool]] = ([], [])
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    @property
    def servers(self) -> list[Server]:
        """As they are now."""
        return list(self._servers)

    @property
    def running(self) -> bool:
        """Whether they were started, and not closed since."""
        return self._thread is not None

    def start(self) -> None:
        """Start those that do not run. Idempotent."""
        if self._thread is not None:
            self._again()
            return
        for server in self._servers:
            server.state, server.words, server.tools = "starting", "", []
        ready = threading.Event()
        self._thread = threading.Thread(target=self._main, args=(ready,), name="mcp", daemon=True)
        self._thread.start()
        ready.wait()

    def settle(self, seconds: float) -> bool:
        """Wait until none is starting, that long at most; whether that is so."""
        with self._news:
            return self._news.wait_for(lambda: not self.starting, seconds)

    @property
    def starting(self) -> list[str]:
        """Names of those that have not told their tools yet."""
        return [s.name for s in self._servers if s.state == "starting"] if self.running else []

    def tools(self) -> list[Tool]:
        """The tools of those that are ready."""
        now = [(s.config, list(s.tools)) for s in self._servers if s.state == "ready"]
        if now != self._named[0]:
            self._named = (now, named((c.name, c.identity, tools) for c, tools in now))
        return self._named[1]

    def call(self, tool: Tool, arguments: dict[str, Any]) -> Future[Result]:
        """Have a tool called; cancelling the future stops waiting, and tells the server so. What goes wrong
        is a result, too.
        """
        if self._loop is None:
            future: Future[Result] = Future()
            future.set_result(Result(f"Error: {tool.server} does not run.", True))
            return future
        return asyncio.run_coroutine_threadsafe(self._call(tool, arguments), self._loop)

    def close(self) -> None:
        """End them all, and wait for it, not for long. Idempotent."""
        thread, self._thread = self._thread, None
        loop, stop = self._loop, self._stop
        if thread is None or loop is None or stop is None:
            return
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)
        thread.join(END_SECONDS)
        self._loop = None

    # On their thread

    def _main(self, ready: threading.Event) -> None:
        asyncio.run(self._run(ready))

    async def _run(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda loop, context: None)  # the terminal is not for it
        ready.set()
        try:
            import mcp  # noqa: F401  # what is slow about starting, and nobody waits for
        except ModuleNotFoundError as e:
            if e.name == "mcp":
                self.missing = MissingPackageError("mcp", "tinychat[mcp]", "An MCP server")
            for server in self._servers:
                said = self.missing
                self._become(server, "failed", str(e) if said is None else f"{said.what} {said.todo}")
            return
        _quiet()
        for server in self._servers:
            server.task = asyncio.create_task(self._serve(server))
        await self._stop.wait()
        tasks = [s.task for s in self._servers if s.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _again(self) -> None:
        """Start those that have ended."""
        over = [s for s in self._servers if s.state in ("failed", "ended")]
        for server in over:
            server.state, server.words = "starting", ""

        def again() -> None:
            for server in over:
                server.task = asyncio.create_task(self._serve(server))

        if self._loop is not None:
            self._loop.call_soon_threadsafe(again)

    def _become(self, server: Server, state: str, words: str = "") -> None:
        server.state, server.words = state, one_line(words)[:300]
        if state != "ready":
            server.tools, server.client = [], None
        self._tell()

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()
        self._changed()

    async def _serve(self, server: Server) -> None:
        """One server from its start to its end."""
        config, late = server.config, False
        transport = StdioTransport(config.command, config.env, config.cwd) if config.command else None
        task = asyncio.current_task()

        def give_up() -> None:
            nonlocal late
            late = True
            if task is not None:
                task.cancel()

        watch = asyncio.get_running_loop().call_later(START_SECONDS, give_up)
        try:
            async with _client(config, transport, lambda: self._list_again(server)) as client:
                client.session.validate_tool_result = _unvalidated
                server.tools = await _listed(client)
                watch.cancel()
                server.client = client
                self._become(server, "ready")
                await (transport.closed if transport else asyncio.Event()).wait()
            self._become(server, "ended", transport.why() if transport else "")
        except asyncio.CancelledError:
            said = f"it did not say within {START_SECONDS:.0f} s which tools it has" if late else ""
            self._become(server, "failed" if late else "ended", said)
        except FileNotFoundError as e:
            self._become(server, "failed", f"{e.filename or config.command[0]} does not exist")
        except BaseException as e:  # whatever a stranger's program makes of it
            died = transport is not None and transport.closed.is_set()
            self._become(server, "failed", transport.why() if died and transport else _words(e))
        finally:
            watch.cancel()

    async def _list_again(self, server: Server) -> None:
        """A server says that its tools have changed."""
        if server.client is not None:
            with suppress(Exception):
                server.tools = await _listed(server.client)
                self._tell()

    async def _call(self, tool: Tool, arguments: dict[str, Any]) -> Result:
        server = next((s for s in self._servers if s.name == tool.server), None)
        if server is None or server.client is None:
            why = f" ({server.words})" if server is not None and server.words else ""
            return Result(f"Error: the server {one_line(tool.server)} does not run{why}.", True)
        if tool.digest not in [t.digest for t in self.tools()]:
            return Result(f"Error: {one_line(tool.name)} has changed, or is gone.", True)
        try:
            said = await server.client.call_tool(tool.name, arguments, read_timeout_seconds=CALL_SECONDS)
        except Exception as e:
            return Result(f"Error: {_words(e)}", True)
        return await asyncio.to_thread(result_of, said.content, said.structured_content, bool(said.is_error))


def _client(config: ServerConfig, transport: StdioTransport | None, changed: Callable[[], Any]) -> Any:
    """The SDK's client. It is given nothing that a server could ask for: no sampling, no roots, no forms."""
    import mcp_types
    from mcp import Client
    from mcp.client.streamable_http import streamable_http_client

    async def hear(message: Any) -> None:
        if isinstance(message, mcp_types.ToolListChangedNotification):
            # Asked from here, the server's answer would wait for this handler.
            asyncio.get_running_loop().create_task(changed())

    channel: Any = transport
    if channel is None:
        import httpx2

        timeout = httpx2.Timeout(START_SECONDS, read=CALL_SECONDS)
        http = httpx2.AsyncClient(headers=dict(config.headers), timeout=timeout)
        channel = streamable_http_client(config.url, http_client=http)
    about = mcp_types.Implementation(name="tinychat", version="1")
    return Client(
        channel, read_timeout_seconds=START_SECONDS / 2, message_handler=hear, client_info=about, cache=None
    )


async def _listed(client: Any) -> list[Listed]:
    """The tools that a server lists, within bounds."""
    out: list[Listed] = []
    cursor = None
    for _ in range(PAGES):
        page = await client.list_tools(cursor=cursor)
        out += [
            t for tool in page.tools if (t := read_listed(tool.name, tool.description, tool.input_schema))
        ]
        cursor = page.next_cursor
        if cursor is None or len(out) >= MOST_TOOLS:
            break
    return list({t.name: t for t in out}.values())[:MOST_TOOLS]


async def _unvalidated(name: str, result: Any) -> None:
    """Leave a result unchecked: a schema's pattern is the server's, and could keep this program busy."""


def _words(e: BaseException) -> str:
    """What went wrong, of an error or of the first one in a group."""
    while inner := getattr(e, "exceptions", None):
        e = inner[0]
    return one_line(f"{e}" or type(e).__name__)[:300]


def _quiet() -> None:
    """Keep what the SDK logs off the terminal."""
    import logging

    for name in ("mcp", "httpx2", "httpcore2"):
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False
