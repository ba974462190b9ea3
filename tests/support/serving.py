"""A server on a thread of its own, listening on loopback, and clients that know no API."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinychat.model import Model
from tinychat.serve.limits import Limits
from tinychat.serve.server import Address, Server, listen, serve


@dataclass
class Served:
    """A running server."""

    port: int
    server: Server
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    made: int = 0  # tokens of the last answer, where a test notes it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def service(self):
        return self.server.service

    def ask(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, method: str | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, content (JSON where it is) and headers of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method or ("GET" if body is None else "POST"), path, data, dict(headers or {}))
            response = connection.getresponse()
            content = response.read()
            found = {k.lower(): v for k, v in response.getheaders()}
            if found.get("content-type", "").startswith("application/json"):
                content = json.loads(content)
            return response.status, content, found
        finally:
            connection.close()

    def chat(self, text: str = "Hello.", **more: Any) -> tuple[int, Any, dict[str, str]]:
        """Ask for a chat completion."""
        return self.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **more})

    def raw(self, data: bytes = b"") -> socket.socket:
        """A connection on which these bytes were sent."""
        s = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        s.sendall(data)
        return s

    def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        """Wait until something is true of the server, as its own loop sees it."""

        async def look() -> None:
            while not condition():
                await asyncio.sleep(0.005)

        asyncio.run_coroutine_threadsafe(asyncio.wait_for(look(), seconds), self.loop).result(seconds + 5)

    def idle(self) -> bool:
        """Whether nobody is being answered or waits, and no model is in use."""
        desk, rack = self.service.desk, self.service.rack
        return not desk.running and not desk.line and not any(h.users for h in rack.models.values())


def post(path: str, body: Any, port: int, **headers: str) -> bytes:
    """The bytes of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Content-Length: {len(data)}"]
    lines += ["Content-Type: application/json", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def events_of(content: bytes) -> list[Any]:
    """The JSON of server-sent events; comments are passed over."""
    lines = [line[6:] for line in content.decode().split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@contextmanager
def serving(
    *models: Model | Callable[[], Model],
    names: tuple[str, ...] = (),
    limits: Limits | None = None,
    folder: Path | None = None,
    **address: Any,
) -> Iterator[Served]:
    """Serve models, which stay the caller's, or what loads them."""
    where = Address(port=0, limits=limits or Limits(), **address)
    sockets = listen(where)
    began, out, failed = threading.Event(), [], []
    loads, keep = {}, []
    for i, model in enumerate(models):
        name = names[i] if i < len(names) else ("tiny" if i == 0 else f"tiny-{i}")
        if isinstance(model, Model):
            keep.append(model)
            loads[name] = lambda m=model: m
        else:
            loads[name] = model

    def closing(model: Model) -> None:
        if model not in keep:
            model.close()

    async def run() -> None:
        def ready(server: Server) -> None:
            out.extend((server, asyncio.get_running_loop()))
            began.set()

        await serve(loads, where, sockets, ready=ready, closing=closing, folder=folder)

    def work() -> None:
        try:
            asyncio.run(run())
        except BaseException as e:
            failed.append(e)
        finally:
            began.set()

    thread = threading.Thread(target=work, daemon=True)
    port = sockets[0][0].getsockname()[1]
    thread.start()
    assert began.wait(60)
    if failed:
        raise failed[0]
    server, loop = out
    try:
        yield Served(port, server, loop, thread)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        if failed:
            raise failed[0]


@dataclass
class Process:
    """A server that is a process of its own."""

    port: int
    pid: int

    def raw(self, data: bytes = b"") -> socket.socket:
        """A connection on which these bytes were sent."""
        s = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        s.sendall(data)
        return s


@contextmanager
def started(*command: Any) -> Iterator[Process]:
    """A command that serves, from the moment that it does; it ends as by Ctrl+C."""
    words = [sys.executable, "-m", "tinychat", *map(str, command)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = None
        while url is None:
            line = process.stderr.readline()
            assert line, f"it ended with {process.wait()}"
            url = re.search(r"http://127.0.0.1:(\d+)/", line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield Process(int(url[1]), process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
