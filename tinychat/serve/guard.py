"""Who may ask: the checks that stand before every endpoint.

A web page that somebody looks at can send requests to this machine. It is told apart by its Origin, and,
where a name of its own leads here (DNS rebinding), by its Host. Whoever comes over the network needs the key.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.responses import Response

from tinychat.serve.problems import ApiError
from tinychat.serve.replies import Reply

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/health",)  # needs no key
METHODS = "GET, POST, DELETE, OPTIONS"


def is_loopback(host: str) -> bool:
    """Whether that name or address can only be this machine."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_of(header: str) -> str:
    """The host in a Host header, without the port."""
    host, colon, port = header.rpartition(":")
    return host if colon and port.isdecimal() and (":" not in host or host.endswith("]")) else header


def authority_of(target: bytes) -> tuple[str, bytes] | None:
    """The authority and the path of a request's target in absolute form (`http://HOST/PATH`), which proxies
    and some clients send; None for any other form.
    """
    scheme, colon, rest = target.partition(b"://")
    if not colon or scheme.lower() not in (b"http", b"https"):
        return None
    host, _, path = rest.partition(b"/")
    return host.decode("latin-1"), b"/" + path


class Guard:
    """ASGI middleware: Host, Origin, Sec-Fetch-Site and the key, before anything of the body is read."""

    def __init__(
        self,
        app: ASGIApp,
        key: str | None,
        local: bool,
        origins: Iterable[str] = (),
        form: Callable[[str, ApiError], Any] = lambda path, problem: problem.as_dict(),
    ):
        """key: None asks for none. local: the server listens on loopback only, so a Host that is another name
        is a web page's trick. origins: of web pages that may ask. form: the body of an error on a path.
        """
        self._form = form
        self._app, self._local = app, local
        self._key = None if key is None else key.encode()
        self._origins = frozenset(o.rstrip("/").lower() for o in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        named = headers.getlist("host")
        if absolute := authority_of(scope.get("raw_path") or b""):
            host, path = absolute
            named = [*named, host]
            scope = {**scope, "path": unquote(path.decode("latin-1")), "raw_path": path}
        try:
            self._check_host(headers, named)
            self._check_source(headers, origin)
            if scope["method"] == "OPTIONS" and origin is not None:
                return await self._preflight(origin)(scope, receive, send)
            if self._key is not None and scope["path"] not in OPEN:
                self._check_key(headers)
        except ApiError as e:
            more = {**e.headers, **self._cross(origin), "connection": "close"}
            return await Reply(self._form(scope["path"], e), e.status, more)(scope, receive, send)

        async def shared(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(k.encode(), v.encode()) for k, v in self._cross(origin).items()]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        await self._app(scope, receive, send if origin is None else shared)

    def _check_host(self, headers: Headers, named: Sequence[str]) -> None:
        """named: the Host, and the authority of the target where it has one."""
        if len(headers.getlist("host")) != 1:
            raise ApiError(400, "A request has one Host.", code="invalid_host")
        if self._local and not all(is_loopback(host_of(host)) for host in named):
            raise ApiError(
                403, "This server is asked for by localhost or 127.0.0.1 only.", code="invalid_host"
            )

    def _check_source(self, headers: Headers, origin: str | None) -> None:
        if "transfer-encoding" in headers and "content-length" in headers:
            raise ApiError(400, "A body has one length.", code="invalid_length")
        if origin is not None and (
            len(headers.getlist("origin")) != 1 or origin.rstrip("/").lower() not in self._origins
        ):
            raise ApiError(
                403, "Web pages may not ask this server (--allow-origin names those that may).", code="origin"
            )
        if origin is None and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ApiError(403, "Web pages may not ask this server.", code="origin")

    def _check_key(self, headers: Headers) -> None:
        given = headers.getlist("authorization") + headers.getlist("x-api-key")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        keys = headers.getlist("x-api-key")
        if scheme.lower() == "bearer":
            keys.append(token.strip())
        assert self._key is not None
        # Each is compared in a time that does not tell how much of it is right.
        right = [hmac.compare_digest(key.encode("latin-1", "replace"), self._key) for key in keys]
        if len(given) > 2 or not right or not all(right):
            said = "is missing: send Authorization: Bearer KEY" if not given else "is wrong"
            raise ApiError(
                401, f"The API key {said}.", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
            )

    def _cross(self, origin: str | None) -> dict[str, str]:
        if origin is None or origin.rstrip("/").lower() not in self._origins:
            return {}
        return {"access-control-allow-origin": origin, "vary": "Origin"}

    def _preflight(self, origin: str) -> Response:
        more = {"access-control-allow-methods": METHODS, "access-control-allow-headers": "*, Authorization"}
        return Response(status_code=204, headers={**self._cross(origin), **more})
