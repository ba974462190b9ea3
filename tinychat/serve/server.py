"""What listens: sockets, connections within bounds, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from tinychat.base.errors import TinychatError, UsageError
from tinychat.serve.app import make_app
from tinychat.serve.connections import protocol
from tinychat.serve.guard import is_loopback
from tinychat.serve.limits import Limits
from tinychat.serve.rack import Load, Rack
from tinychat.serve.service import Service

if TYPE_CHECKING:
    from tinychat.model import Model

SHORTEST_KEY = 8
LAST_WORDS = 2  # seconds for answers that were interrupted to say so


@dataclass(frozen=True)
class Address:
    """Where the server listens, and who may ask.

    key      that clients send; None: nobody but this machine is served, and no key is asked for
    origins  web pages that may ask, such as "https://chat.example.org"
    """

    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    origins: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.key is not None and (
            len(self.key) < SHORTEST_KEY
            or not (self.key.isascii() and self.key.isprintable())
            or " " in self.key
        ):
            raise UsageError(
                "The API key cannot be used.",
                f"Give {SHORTEST_KEY} or more characters, ASCII and no spaces: python3 -c"
                ' "import secrets; print(secrets.token_urlsafe(24))" makes one.',
            )


def listen(address: Address) -> tuple[list[socket.socket], bool]:
    """Sockets that are bound to the address, and whether all of them are this machine's own (loopback).

    Raises UsageError for an address beyond loopback without a key, TinychatError where it cannot be had.
    """
    found: list[socket.socket] = []
    try:
        infos = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        places = list(dict.fromkeys((info[0], info[4]) for info in infos))
        local = all(is_loopback(str(place[0]).partition("%")[0]) for _, place in places)
        if not local and address.key is None:
            raise UsageError(
                f"{address.host} can be reached from other machines, and there is no API key.",
                "Set TINYCHAT_API_KEY, or leave out --host.",
            )
        port = address.port
        for family, place in places:
            s = socket.socket(family, socket.SOCK_STREAM)
            found.append(s)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            s.bind((place[0], port, *place[2:]))
            port = s.getsockname()[1]
            s.listen(address.limits.connections)
            s.setblocking(False)
        return found, local
    except (OSError, UnicodeError, OverflowError) as e:
        for s in found:
            s.close()
        said = getattr(e, "strerror", None) or e
        raise TinychatError(
            f"Cannot listen at {address.host}:{address.port} ({said}).", "Use another --port or --host."
        ) from e
    except BaseException:
        for s in found:
            s.close()
        raise


class Server(uvicorn.Server):
    """uvicorn's server, which ends the service before it ends, and then ends well."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The end of the terminal is the server's too, unless it was begun to outlive it (nohup)."""
        here = threading.current_thread() is threading.main_thread()
        ends = here and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        with super().capture_signals():
            if ends:
                signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                if ends:
                    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    async def shutdown(self, sockets=None) -> None:
        """Let running answers come to their end, for a while; then whoever waits for one is told."""
        self.service.desk.close()
        late = asyncio.get_running_loop().call_later(self.service.limits.grace_time, self.service.interrupt)
        await super().shutdown(sockets)
        late.cancel()
        await self.service.close()
        self._captured_signals.clear()  # it has done what they asked for


async def serve(
    models: Mapping[str, Load],
    address: Address,
    sockets: tuple[list[socket.socket], bool],
    *,
    keep_alive: float | None = None,
    ready: Callable[[Server], None] = lambda server: None,
    closing: Callable[[Model], None] | None = None,
    folder: Path | None = None,
) -> None:
    """Serve models until SIGINT, SIGTERM or SIGHUP. sockets: from `listen`. ready: is told when the first
    model is there. folder: as in `Rack`.
    """
    limits = address.limits
    rack = Rack(models, keep_alive, folder)
    if closing is not None:
        rack.when_closing(closing)
    service = Service(rack, limits)
    found, local = sockets
    debug = bool(os.environ.get("TINYCHAT_DEBUG"))
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR if debug else logging.CRITICAL)
    if not debug:  # it warns of each client that goes away in the middle of an answer
        logging.getLogger("asyncio").setLevel(logging.ERROR)
    config = uvicorn.Config(
        make_app(service, address.key, local, address.origins),
        http=protocol(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(limits.idle_time),
        timeout_graceful_shutdown=math.ceil(limits.grace_time) + LAST_WORDS,
    )
    server = Server(config, service)
    try:
        (await service.rack.lease(None)).end()  # the first is loaded before anybody asks
        ready(server)
        await server.serve(found)
    finally:
        await service.close()
