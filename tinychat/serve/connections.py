"""uvicorn's side of a connection, with bounds that it does not have."""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinychat.serve.limits import Limits
from tinychat.serve.problems import ApiError

LINGER = 2.0  # seconds in which a refused connection is told so
_BODY = json.dumps(ApiError(503, "Too many connections are open.", code="overloaded").as_dict())
REFUSAL = (
    "HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 5\r\n"
    f"content-type: application/json\r\ncontent-length: {len(_BODY)}\r\n\r\n{_BODY}"
).encode()


class Timer:
    """Ends a connection after a while, unless it is stopped."""

    def __init__(self) -> None:
        self._handle: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop, seconds: float, transport: asyncio.Transport) -> None:
        """Let the time run, if it does not already."""
        if self._handle is None:
            self._handle = loop.call_later(seconds, transport.abort)

    def stop(self) -> None:
        """Idempotent."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class Connection(H11Protocol):
    """One connection: how many there are, how long a request's head may take, and how long a client may take
    nothing of what is sent to it.
    """

    limits: ClassVar[Limits]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head, self._sending, self._ending = Timer(), Timer(), Timer()
        self._refused = False

    def connection_made(self, transport: Any) -> None:
        """One more, or one too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refused = True
            self.connections.discard(self)
            transport.write(REFUSAL)
            transport.close()
            self.loop.call_later(LINGER, transport.abort)
        else:
            self._look_at_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives it."""
        self._head.stop()
        self._sending.stop()
        self._ending.stop()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """The client says no more: it is gone, its work ends. What it was sent has a while to reach it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._ending.start(self.loop, self.limits.send_time, self.transport)

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        if not self._refused:
            super().data_received(data)
            self._look_at_head()

    def on_response_complete(self) -> None:
        """The next request may have begun."""
        super().on_response_complete()
        self._look_at_head()

    def _look_at_head(self) -> None:
        """Let the time run while a request's head is on its way, and no longer."""
        begun = self.cycle is None or bool(self.conn.trailing_data[0])
        if begun and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._head.start(self.loop, self.limits.header_time, self.transport)
        else:
            self._head.stop()

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        self._sending.start(self.loop, self.limits.send_time, self.transport)

    def resume_writing(self) -> None:
        """It takes more again."""
        super().resume_writing()
        self._sending.stop()


def protocol(limits: Limits) -> type[Connection]:
    """The protocol with these bounds."""
    return type("BoundedConnection", (Connection,), {"limits": limits})
