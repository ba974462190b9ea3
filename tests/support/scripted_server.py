"""An OpenAI-compatible server that plays scripts: answers, and what can go wrong with them.

Run as a program it serves until it is ended, and says its address first.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.played.heard.append((self.path, dict(self.headers), None))
        self.played.models(self)

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.played.heard.append((self.path, dict(self.headers), self.body))
        self.played.next_script()(self)

    @property
    def played(self) -> ScriptedServer:
        return self.server.played  # type: ignore[attr-defined]

    # What scripts do

    def page(self, value: Any, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def begin(self, kind: str = "text/event-stream; charset=utf-8", **headers: str) -> None:
        """Begin a stream; it ends with the connection."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()

    def raw(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def say(self, reason: str | None = None, usage: Any = None, **delta: Any) -> None:
        """One chunk."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        chunk = {"id": "c", "object": "chat.completion.chunk", "choices": [choice]}
        if usage is not None:
            chunk = {"choices": [], "usage": usage}
        self.raw(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def end(self) -> None:
        self.raw(b"data: [DONE]\n\n")

    def reset(self) -> None:
        """End the connection as a machine that is switched off does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def until_left(self) -> None:
        """Wait until the client goes."""
        self.connection.settimeout(30)
        with suppress(OSError):
            while self.connection.recv(1 << 12):
                pass
        self.played.left.set()


def answer(text: str, reasoning: str = "", pieces: int = 4, usage: Any = None) -> Script:
    """An answer as it should be."""

    def play(h: Handler) -> None:
        h.begin()
        h.say(role="assistant", content="")
        for kind, said in (("reasoning_content", reasoning), ("content", text)):
            size = max(1, -(-len(said) // pieces))
            for i in range(0, len(said), size):
                h.say(**{kind: said[i : i + size]})
        h.say("stop")
        if usage is not None:
            h.say(usage=usage)
        h.end()

    return play


def status(code: int, value: Any = b"", kind: str = "application/json", **headers: str) -> Script:
    """An error."""
    return lambda h: h.page(value, code, kind, **headers)


class ScriptedServer:
    """Plays `scripts`, one a question, then echoes. `heard`: (path, headers, body) of each request."""

    def __init__(self, scripts: Iterable[Script] = (), context: Any = None):
        self.scripts = list(scripts)
        self.heard: list[tuple[str, dict[str, str], Any]] = []
        self.left = threading.Event()  # a client went away
        self.listed: Any = {"data": [{"id": "org/big-model", "max_model_len": 32768}]}
        self.models: Script = lambda h: h.page(self.listed)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients come and go
        self._server.played = self  # type: ignore[attr-defined]
        scheme = "http"
        if context is not None:
            scheme = "https"
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def next_script(self) -> Script:
        return self.scripts.pop(0) if self.scripts else echo

    @property
    def questions(self) -> list[Any]:
        """The bodies of what was asked."""
        return [body for _, _, body in self.heard if body is not None]

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def echo(h: Handler) -> None:
    """Says what it was asked; "slow" never ends, "die" breaks off, "think" thinks before."""
    said = h.body["messages"][-1]["content"]
    h.begin()
    if said == "think":
        h.say(reasoning="hidden thought")
    h.say(content=f"echo: {said}")
    if said == "die":
        h.say(content=" and then")
        return
    n = 0
    while said == "slow":
        h.say(content=f" word{n}")
        n += 1
        time.sleep(0.02)
    h.say("stop")
    h.say(usage={"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}})
    h.end()


if __name__ == "__main__":
    with ScriptedServer() as server:
        print(server.url, flush=True)
        sys.stdin.read()
