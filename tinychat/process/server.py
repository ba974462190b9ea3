"""HTTP with a server that may be slow, broken or hostile: requests that another thread can end at once, and
every failure as an error of two lines.

The standard library's client: which other one huggingface-hub brings changes with its versions.
"""

from __future__ import annotations

import base64
import errno
import http.client
import json
import os
import re
import select
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

from tinychat import __version__
from tinychat.base.errors import TinychatError
from tinychat.base.terminal import one_line
from tinychat.hub.http import tls_context
from tinychat.process.address import KEY, OPENAI_KEY, Address

CONNECT = 10.0  # seconds until a connection stands
FIRST = 600.0  # until the first byte: a long prompt is being read, or others are before us
STALL = 120.0  # between two pieces of an answer
LONGEST_LINE = 1 << 20  # bytes
LONGEST_BODY = 1 << 23  # bytes of what is no stream
LONGEST_WORDS = 300  # characters of what a server says in an error
AGAIN = (408, 429, 500, 502, 503, 504, 529)
LONGEST_WAIT = 20.0  # seconds that a server may ask us to wait


class ServerError(TinychatError):
    """What a server, or the way to it, does wrong. status: of HTTP, 0 without. again: whether another attempt
    may help, after `wait` seconds if the server says so.
    """

    def __init__(self, what: str, todo: str, *, status: int = 0, again: bool = False, wait: float = 0.0):
        super().__init__(what, todo)
        self.status, self.again, self.wait = status, again, wait


class AbortedError(Exception):
    """The exchange was ended from this side."""


class Exchange:
    """One request and what comes back; any thread, and a signal's handler, may end it."""

    def __init__(self) -> None:
        self.ended = False
        self._handle: socket.socket | None = None  # a second handle of the connection
        self._lock = threading.RLock()  # a handler may come while its own thread holds it

    def hold(self, connection: socket.socket) -> None:
        """Know the connection. Raises AbortedError if there shall be none any more."""
        with self._lock:
            if self.ended:
                connection.close()
                raise AbortedError
            self._handle = connection.dup()

    def abort(self) -> None:
        """End it: who waits for the server hears so at once, and the server that nobody listens."""
        with self._lock:
            self.ended = True
            if self._handle is not None:
                with suppress(OSError):
                    self._handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the connection. Idempotent."""
        with self._lock:
            if self._handle is not None:
                self._handle.close()
                self._handle = None


class Server:
    """A server and the key that it gets. `source`: where the key is from, for errors."""

    def __init__(self, address: Address, key: str | None = None, source: str = ""):
        self.address, self._key, self._source = address, key, source

    def ask(self, exchange: Exchange, path: str) -> Any:
        """A JSON page. Raises ServerError, AbortedError."""
        with _Failures(self, exchange), self._opened(exchange, "GET", path, None) as answer:
            return self._json(answer)

    def talk(self, exchange: Exchange, path: str, body: dict[str, Any]) -> Generator[Any, None, None]:
        """What a server streams for a question: the JSON value of each event, as it comes; the only one where
        it does not stream. Raises ServerError, AbortedError.
        """
        with _Failures(self, exchange), self._opened(exchange, "POST", path, body) as answer:
            if answer.headers.get_content_type() == "application/json":
                yield self._json(answer)
                return
            if answer.headers.get_content_type() != "text/event-stream":
                raise self._strange(answer)
            for data in self._events(answer):
                if data.strip() == b"[DONE]":
                    return
                yield self._value(data)

    # The request

    def _opened(self, exchange: Exchange, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        a = self.address
        connection, target, headers = self._way(exchange, a.path + path)
        headers |= {"User-Agent": f"tinychat/{__version__}", "Connection": "close"}
        headers["Accept"] = "application/json" if body is None else "text/event-stream, application/json"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            connection.connect()
            assert connection.sock is not None
            wire = connection.sock
            wire.settimeout(FIRST)
            with suppress(BrokenPipeError, ConnectionResetError):  # who refuses need not read it all
                connection.request(method, target, data, headers)
            answer = connection.getresponse()
            wire.settimeout(STALL)
        except BaseException:
            connection.close()
            raise
        if answer.status != 200:
            with answer:
                raise self._refusal(answer)
        if answer.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            with answer:
                raise self._strange(answer)
        return answer

    def _way(self, exchange: Exchange, path: str) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """A connection that is not made yet, what to ask for over it, and headers for a proxy."""
        a = self.address
        proxy = None
        if not a.is_here and not urllib.request.proxy_bypass(f"{a.host}:{a.port}"):
            proxy = urllib.request.getproxies().get(a.scheme)
        host, port, headers, target = a.host, a.port, {}, path
        if proxy:
            parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            try:
                host, port = parts.hostname or "", parts.port or 80
            except ValueError:
                host = ""
            if parts.scheme != "http" or not host:
                raise ServerError("The proxy of the environment is no http address.", "Correct HTTPS_PROXY.")
            if parts.username:
                login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
                token = base64.b64encode(login.encode()).decode()
                headers["Proxy-Authorization"] = f"Basic {token}"
        connection: http.client.HTTPConnection
        if a.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=CONNECT, context=tls_context())
            if proxy:
                connection.set_tunnel(a.host, a.port, headers)
                headers = {}
        else:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT)
            if proxy:
                target = f"http://{a.place}{path}"
        connection._create_connection = lambda address, *_: _connect(exchange, address)  # type: ignore[attr-defined]
        return connection, target, headers

    # The answer

    def _events(self, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        """The data of server-sent events, joined where they have several lines."""
        data: list[bytes] = []
        size = 0
        for line in self._lines(answer):
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
                size += len(line)
                if size > LONGEST_LINE:
                    raise self._absurd()
            elif not line and data:
                yield b"\n".join(data)
                data, size = [], 0
        if data:
            yield b"\n".join(data)

    def _lines(self, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        held = bytearray()
        while piece := answer.read1(1 << 16):
            held += piece
            if b"\n" in piece:
                *lines, held = held.split(b"\n")
                for line in lines:
                    yield bytes(line.removesuffix(b"\r"))
            if len(held) > LONGEST_LINE:
                raise self._absurd()
        if held:
            yield bytes(held)

    def _json(self, answer: http.client.HTTPResponse) -> Any:
        if answer.headers.get_content_type() != "application/json":
            raise self._strange(answer)
        return self._value(_body(answer, LONGEST_BODY) or b"")

    def _value(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise ServerError(
                f"{self.address} answers with broken JSON.",
                "Try again; if that stays, look at the server's log.",
                again=True,
            ) from None

    # What is wrong

    def _absurd(self) -> ServerError:
        return ServerError(
            f"{self.address} sends a line without end.", "Check the address: that is no chat server."
        )

    def _strange(self, answer: http.client.HTTPResponse) -> ServerError:
        kind = self.quoted(answer.headers.get("Content-Encoding") or answer.headers.get_content_type())
        return ServerError(
            f"{self.address} answers with {kind}, not with what chat servers say.",
            "Check the address: it often ends with /v1.",
        )

    def quoted(self, text: Any) -> str:
        """What a server says, for an error: on one line, harmless, not long, without the key."""
        said = text if isinstance(text, str) else ""
        if self._key is not None:
            said = said.replace(self._key, "…")
        said = one_line(said[: 4 * LONGEST_WORDS])
        return said if len(said) <= LONGEST_WORDS else f"{said[:LONGEST_WORDS]}…"

    def _refusal(self, answer: http.client.HTTPResponse) -> ServerError:
        """The error of an answer that is none."""
        status, wait = answer.status, _seconds(answer.headers.get("Retry-After"))
        if 300 <= status < 400:
            to = answer.headers.get("Location", "").removesuffix("/models").removesuffix("/chat/completions")
            shown = re.fullmatch(r"https?://[A-Za-z0-9.:/_-]{1,200}", to)
            todo = f"Use that address: --server {to}" if shown else "Find out its right address."
            return ServerError(f"{self.address} sends us elsewhere ({status}).", todo, status=status)
        said = ""
        with suppress(OSError, http.client.HTTPException, ValueError, RecursionError):
            body = _body(answer, 1 << 16) or b""
            if answer.headers.get_content_type() == "application/json":
                said = self.quoted(words_of(json.loads(body)))
            elif answer.headers.get_content_type() == "text/plain":
                said = self.quoted(body.decode("utf-8", "replace"))
        return self.refused(status, said, wait)

    def refused(self, status: int, said: str, wait: float = 0.0) -> ServerError:
        """The error for an HTTP status and what the server says about it."""
        why = f": {said.rstrip('.')}." if said else "."
        a = self.address
        if status in (401, 403) and self._key is None:
            todo = f"Set {KEY} to its key, or use --api-key-file FILE."
            if a.scheme == "http":
                todo += f" ({OPENAI_KEY} goes over https alone, unless --api-key-env names it.)"
            return ServerError(f"{a} wants a key ({status}){why}", todo, status=status)
        if status in (401, 403):
            todo = f"Check the key in {self._source}."
            return ServerError(f"{a} does not accept the key ({status}){why}", todo, status=status)
        if status == 404:
            todo = "Check the model's name (/model lists them) and the address, which often ends with /v1."
            return ServerError(f"{a} does not have that (404){why}", todo, status=status)
        if status == 429:
            todo = "Try again later, or look at its limits."
            return ServerError(
                f"{a} takes no more questions now (429){why}", todo, status=status, again=True, wait=wait
            )
        if status >= 500 or status in AGAIN:
            todo = "Try again; if that stays, look at the server's log."
            again = status in AGAIN
            return ServerError(f"{a} failed ({status}){why}", todo, status=status, again=again, wait=wait)
        too_long = re.search(r"context|too (?:long|large|many)|maximum|exceed", said, re.IGNORECASE)
        todo = "Change the setting or the message that it names."
        if status == 413 or too_long:
            todo = "Begin a new chat, or edit the message that is too long."
        return ServerError(f"{a} refuses the question ({status}){why}", todo, status=status)


def words_of(value: Any) -> str:
    """What a server's error object says: OpenAI's, FastAPI's (which names the field beside it), or a text."""
    for _ in range(4):
        if isinstance(value, list):
            value = value[0] if value else None
        if not isinstance(value, dict):
            break
        if isinstance(value.get("msg"), str) and isinstance(where := value.get("loc"), list):
            return f"{value['msg']}: {'.'.join(str(part)[:50] for part in where[:8])}"
        value = next((value[k] for k in ("error", "message", "detail", "msg") if value.get(k)), None)
    return value if isinstance(value, str) else ""


def _body(answer: http.client.HTTPResponse, limit: int) -> bytes | None:
    """The whole of an answer, or what of it is not beyond the limit."""
    parts: list[bytes] = []
    size = 0
    while size <= limit and (piece := answer.read1(1 << 16)):
        parts.append(piece)
        size += len(piece)
    return b"".join(parts)[:limit]


def _seconds(text: str | None) -> float:
    """Of a Retry-After that is a number."""
    try:
        seconds = float(text or 0)
    except ValueError:
        return 0.0
    return min(seconds, LONGEST_WAIT) if seconds > 0 else 0.0


def _connect(exchange: Exchange, address: tuple[str, int]) -> socket.socket:
    """A connection, unless the exchange is ended while it is being made. Raises OSError, AbortedError."""
    host, port = address
    problem: OSError = TimeoutError()
    until = time.monotonic() + CONNECT
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, "not a name") from None
    for family, kind, protocol, _, where in found:
        wire = socket.socket(family, kind, protocol)
        try:
            wire.setblocking(False)
            code = wire.connect_ex(where)
            while code in (errno.EINPROGRESS, errno.EAGAIN, errno.EALREADY):
                if exchange.ended:
                    raise AbortedError
                if time.monotonic() > until:
                    raise TimeoutError
                if select.select([], [wire], [], 0.05)[1]:
                    code = wire.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            wire.settimeout(CONNECT)
            exchange.hold(wire)
            return wire
        except OSError as e:
            problem = e
            wire.close()
        except BaseException:
            wire.close()
            raise
    raise problem


class _Failures:
    """Whatever goes wrong on the way, as a ServerError; AbortedError where this side has ended it. Lets go of
    the connection.
    """

    def __init__(self, server: Server, exchange: Exchange):
        self.server, self.exchange = server, exchange

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, e: BaseException | None, trace: Any) -> None:
        self.exchange.close()
        if isinstance(e, Exception) and self.exchange.ended:
            raise AbortedError from None
        if isinstance(e, (OSError, http.client.HTTPException)):
            raise self._of(e) from e

    def _of(self, e: OSError | http.client.HTTPException) -> ServerError:
        a = self.server.address
        if isinstance(e, ConnectionRefusedError):
            todo = "Start the server there, or check the address and its port."
            return ServerError(f"Nothing answers at {a}.", todo, again=True)
        if isinstance(e, ssl.SSLCertVerificationError):
            return ServerError(
                f"The certificate of {a.host} cannot be verified: {one_line(e.verify_message)[:100]}.",
                "Set SSL_CERT_FILE to the file with your network's certificates.",
            )
        if isinstance(e, ssl.SSLError) and a.scheme == "https" and not isinstance(e, ssl.SSLEOFError):
            todo = "Use http:// if the server has no certificate."
            return ServerError(f"{a} does not speak TLS ({one_line(e.reason or '')[:60]}).", todo)
        if isinstance(e, socket.gaierror):
            again = e.errno == socket.EAI_AGAIN
            return ServerError(
                f"There is no host {a.host}.", "Check the address and the network.", again=again
            )
        if isinstance(e, TimeoutError) or getattr(e, "errno", 0) == errno.ETIMEDOUT:
            todo = "Try again; if that stays, look at the server's log."
            return ServerError(f"{a} does not say anything any more.", todo, again=True)
        lost = isinstance(
            e, (ConnectionError, ssl.SSLEOFError, http.client.IncompleteRead, http.client.RemoteDisconnected)
        )
        if lost:
            todo = "Try again; if that stays, look at the server's log."
            return ServerError(f"The connection to {a} was lost.", todo, again=True)
        if isinstance(e, http.client.HTTPException):
            todo = "Check the address and its port; a server with a certificate wants https://."
            return ServerError(f"{a} does not speak HTTP.", todo)
        said = one_line(e.strerror or type(e).__name__)[:100]
        return ServerError(
            f"{a} cannot be reached: {said}.", "Check the address and the network.", again=True
        )
