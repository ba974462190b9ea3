"""A server that is a child process: lines of JSON on its stdin and stdout, within bounds.

The SDK's own transport reads a line of any length into memory, takes six seconds to end a process that does
not want to, and lets stderr through to the terminal.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LONGEST_LINE = 1 << 23  # bytes
PAUSE, RATE = (
    0.0005,
    50e6,
)  # seconds after each message, and bytes of them a second: a flood leaves others time
PATIENCE = 0.5  # seconds that a process may take to end by itself, and then to hear SIGTERM
PASSED_ON = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "TZ", "USER")
COMPLAINTS = 2000  # bytes of stderr that are kept


class StdioTransport:
    """A Transport of the SDK. `closed` is set when the process says no more."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: str | None):
        self._command, self._cwd = list(command), cwd or str(Path.home())
        self._env = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | dict(env)
        self.closed = asyncio.Event()
        self.problem = ""  # that the process made
        self._complaints = b""
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Any:
        import anyio

        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._env,
            cwd=self._cwd,
            start_new_session=True,  # the terminal and its Ctrl+C are not for it
            limit=LONGEST_LINE,
        )
        said, heard = anyio.create_memory_object_stream[Any](0)
        asked, asks = anyio.create_memory_object_stream[Any](0)
        self._streams = (said, heard, asked, asks)
        self._tasks = [
            asyncio.create_task(work) for work in (self._read(said), self._write(asks), self._complain())
        ]
        return heard, asked

    async def __aexit__(self, *_: object) -> None:
        process = self._process
        if process.stdin is not None:
            process.stdin.close()
        for task in self._tasks[:2]:
            task.cancel()
        try:
            for number in (0, signal.SIGTERM):
                if number:
                    self._signal(number)
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._ended(), PATIENCE)
                    break
        finally:
            self._signal(signal.SIGKILL)  # and whatever it has started
            for task in self._tasks:
                task.cancel()
            for stream in self._streams:
                stream.close()
            process._transport.close()  # type: ignore[attr-defined]  # pipes that somebody else may hold

    def why(self) -> str:
        """Why it ended, in one line, with the last that it said about it."""
        code = self._process.returncode
        how = "it does not speak any more"
        if self.problem:
            how = self.problem
        elif code is not None:
            how = f"it was ended by signal {-code}" if code < 0 else f"it ended with code {code}"
        lines = self._complaints.decode("utf-8", "replace").strip().splitlines()
        return f"{how}: {lines[-1][:200]}" if lines else how

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def _ended(self) -> None:
        # `wait` waits for the pipes too, which a child of the process may hold.
        while self._process.returncode is None:
            await asyncio.sleep(0.01)

    async def _read(self, said: Any) -> None:
        from mcp.shared.message import SessionMessage
        from mcp_types import jsonrpc_message_adapter

        assert self._process.stdout is not None  # a pipe
        try:
            while line := await self._process.stdout.readline():
                try:
                    message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:  # some servers print other things there
                    message = None
                if message is not None:
                    await said.send(SessionMessage(message))
                await asyncio.sleep(PAUSE + len(line) / RATE)
        except ValueError:
            self.problem = f"it wrote a line of more than {LONGEST_LINE >> 20} MB"
        except Exception as e:  # the session is gone
            self.problem = self.problem or type(e).__name__
        finally:
            if not self.problem:
                with suppress(asyncio.TimeoutError):  # its code says more
                    await asyncio.wait_for(self._ended(), PATIENCE)
            said.close()
            self.closed.set()

    async def _write(self, asks: Any) -> None:
        stdin = self._process.stdin
        assert stdin is not None  # a pipe
        async for message in asks:
            with suppress(OSError):  # its end is told by its stdout
                stdin.write(
                    message.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"
                )
                await stdin.drain()

    async def _complain(self) -> None:
        assert self._process.stderr is not None  # a pipe
        while data := await self._process.stderr.read(1 << 14):
            self._complaints = (self._complaints + data)[-COMPLAINTS:]
            await asyncio.sleep(PAUSE + len(data) / RATE)
