"""The tools of a conversation: which there are, whether one may run, and running it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as StillRunning
from typing import Any

from tinychat.base.errors import TinychatError, UsageError
from tinychat.base.terminal import one_line
from tinychat.mcp import config
from tinychat.mcp.permissions import ALWAYS, NEVER, Permissions
from tinychat.mcp.servers import Servers
from tinychat.mcp.tools import Result, Tool, cut

MOST_ROUNDS = 20  # answers with calls, one after another, until the user is asked to go on
PATIENCE = 10.0  # seconds that a question waits for servers that start
DENIED = "Error: the user does not allow this call."
STOPPED = "Error: the user stopped here."
POLL = 0.05  # seconds between two looks at whether a call was stopped
Call = Mapping[str, Any]  # of a message, in OpenAI's form


class Toolbox:
    """The servers of mcp.json, and what the user allows. Empty, and without a thread, without them."""

    def __init__(
        self,
        servers: Servers | None = None,
        permissions: Permissions | None = None,
        only: Sequence[str] | None = None,
    ):
        """only: the tools that are offered, as SERVER/TOOL; None: all."""
        self.servers = servers or Servers([])
        self.permissions = permissions or Permissions()
        self.only = only
        self.problem: TinychatError | None = None  # of the file
        self._began = 0.0
        self._told: dict[str, str] = {}
        self._unwritten = ""

    @classmethod
    def found(cls, allowed: Sequence[str] = (), alone: bool = False) -> Toolbox:
        """The toolbox of this user. allowed: SERVER/TOOL that may be called without asking; alone: no other
        tool is offered. What is wrong with the file is `problem`.
        """
        problem, configs = None, []
        try:
            configs = config.read()
        except TinychatError as e:
            problem = e
        box = cls(Servers(configs), Permissions(for_now=tuple(allowed)), allowed if alone else None)
        box.problem = problem
        return box

    # Servers

    def start(self) -> None:
        """Start the servers, without waiting for them."""
        if self.servers.servers:
            self._began = time.monotonic()
            self.servers.start()

    def close(self) -> None:
        """End them."""
        self.servers.close()

    @property
    def waits_for(self) -> list[str]:
        """Servers that a question should wait for: those that are starting, for a while."""
        return self.servers.starting if time.monotonic() - self._began < PATIENCE else []

    def news(self) -> str:
        """A sentence about what went wrong since the last time; else empty."""
        if self._unwritten:
            said, self._unwritten = self._unwritten, ""
            return said
        if self.problem is not None and "" not in self._told:
            self._told[""] = self.problem.what
            return f"{self.problem.what} {self.problem.todo}"
        if (missing := self.servers.missing) is not None:
            if self._told.get("mcp") == missing.what:
                return ""
            self._told["mcp"] = missing.what
            return f"{missing.what} {missing.todo}"
        for s in self.servers.servers:
            now = f"{s.state}: {s.words}"
            if self.servers.running and s.state in ("failed", "ended") and self._told.get(s.name) != now:
                self._told[s.name] = now
                return (
                    f"The MCP server {one_line(s.name)} {_how(s.state)}: {s.words or 'it says no more'}. /mcp"
                )
            if s.state == "ready":
                self._told.pop(s.name, None)
        return ""

    # Tools

    def tools(self) -> list[Tool]:
        """Those that a model may be told of."""
        found = self.servers.tools() if self.servers.running else []
        return [
            t
            for t in found
            if (self.only is None or t.where in self.only) and self.permissions.of(t) != NEVER
        ]

    def offered(self) -> list[dict[str, Any]]:
        """The same, in OpenAI's form."""
        return [t.as_openai() for t in self.tools()]

    def find(self, call: Call) -> Tool | None:
        """The tool that a call is of."""
        name = call["function"]["name"]
        return next((t for t in self.tools() if t.called == name), None)

    def keep(self, tool: Tool, answer: str | None) -> None:
        """Keep what the user said, if it is for good; that it cannot be written is among the news."""
        if answer in (ALWAYS, NEVER) and self.permissions.of(tool) != answer:
            try:
                self.permissions.keep(tool, answer)
            except TinychatError as e:
                self._unwritten = f"{e.what} {e.todo}"

    def run(self, tool: Tool, call: Call) -> Future[Result]:
        """Have it called; whether that may be was found out before."""
        return self.servers.call(tool, json.loads(call["function"]["arguments"], strict=False))

    def result(
        self,
        call: Call,
        context: int,
        ask: Callable[[Tool, Call], str | None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> str | None:
        """What the model is told of a call, for programs that wait for it; None: the user stops everything.

        context: tokens that the model can read. ask: gives "once", "always", "never", or None to stop.
        """
        tool = self.find(call)
        if tool is None:
            return self.unknown(call)
        answer = self.permissions.of(tool) or ask(tool, call)
        if answer is None:
            return None
        self.keep(tool, answer)
        if answer == NEVER:
            return DENIED
        future = self.run(tool, call)
        try:
            while True:
                try:
                    return cut(future.result(POLL).text, context)
                except StillRunning:
                    if stopped():
                        return None
        except CancelledError:
            return None
        finally:
            future.cancel()

    def unknown(self, call: Call) -> str:
        """What a model is told that calls what it was not offered."""
        names = ", ".join(t.called for t in self.tools()) or "none"
        return f"Error: there is no tool {call['function']['name']}. There is: {names}."

    def check(self, allowed: Sequence[str]) -> None:
        """Raises UsageError where a tool that was allowed by name is not there, and MissingPackageError."""
        if self.servers.missing is not None:
            raise self.servers.missing
        there = {t.where for t in self.servers.tools()}
        if missing := [a for a in allowed if a not in there]:
            own = (s for s in self.servers.servers if s.words and missing[0].startswith(f"{s.name}/"))
            why = next((f" ({s.words})" for s in own), "")
            some = ", ".join(sorted(there)[:8])
            raise UsageError(
                f"There is no tool {one_line(missing[0])[:100]}{why}.",
                f"There is {some}." if some else f"Set up its server in {config.config_file()}.",
            )

    # For the user

    def command(self, words: str) -> list[str]:
        """What /mcp does, and the lines that it shows. Raises UsageError."""
        verb, _, rest = words.partition(" ")
        if verb == "on":
            self._reread()
            self.start()
        elif verb == "off":
            self.close()
        elif verb == "forget":
            n = self.permissions.forget(rest.strip() or None)
            return [f"{n} permission{'s' * (n != 1)} taken back: the next call asks."]
        elif verb:
            raise UsageError(
                f"/mcp {one_line(verb)[:40]} means nothing.", "Use /mcp, on, off or forget NAME."
            )
        return self.report()

    def _reread(self) -> None:
        """The file may say something else now."""
        configs = config.read()
        if [s.config for s in self.servers.servers] != configs or self.servers.missing:
            self.servers.close()
            self.servers = Servers(configs)
        self.problem = None

    def report(self) -> list[str]:
        """Servers, their tools, and what is allowed."""
        if self.problem is not None:
            return [self.problem.what, self.problem.todo]
        if not self.servers.servers:
            return [f"There are no MCP servers: {config.config_file()} sets them up (docs/tools.md)."]
        lines = []
        tools = self.servers.tools()
        for s in self.servers.servers:
            state = s.state if self.servers.running else "off"
            lines.append(f"{one_line(s.name)}: {state}{f' ({s.words})' if s.words else ''}")
            for t in (t for t in tools if t.server == s.name):
                allowed = {ALWAYS: "always allowed", NEVER: "never allowed"}.get(
                    self.permissions.of(t) or "", "asks"
                )
                about = one_line(t.description)
                lines.append(f"  {t.where} · {allowed} · {about[:80]}{'…' if about[80:] else ''}")
        return [*lines, "/mcp on · /mcp off · /mcp forget [SERVER[/TOOL]]"]


def shown_arguments(call: Call) -> str:
    """The arguments of a call in full, a line each, for reading."""
    return json.dumps(json.loads(call["function"]["arguments"], strict=False), ensure_ascii=False, indent=2)


def _how(state: str) -> str:
    return "does not start" if state == "failed" else "is gone"
