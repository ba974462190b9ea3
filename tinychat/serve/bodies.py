"""Bodies of requests: read within bounds of size and time, and parsed."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect

from tinychat.serve.fields import Fields
from tinychat.serve.problems import ApiError, busy, cut

if TYPE_CHECKING:
    from starlette.requests import Request

    from tinychat.serve.limits import Limits

SMALL = 1 << 16  # bytes that are parsed where they arrive; more would keep others waiting
PIECE = 1 << 20  # bytes that are looked through at once, while nothing else can run
# What JSON is parsed to takes time and memory for each value, and nothing else runs meanwhile.
VALUES, PARTS, ESCAPES = 500_000, 100_000, 2_000_000
PARTS_OF = (b"{", b"[", b":")


class Bodies:
    """Reads bodies, and knows how much all those take that are being read or made into requests."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._bytes = 0

    async def fields(self, request: Request) -> Fields:
        """The JSON object of a request. Raises ApiError."""
        data = await self.read(request)
        return _parsed(data) if len(data) <= SMALL else await asyncio.to_thread(_parsed, data)

    def over(self, request: Request) -> None:
        """The endpoint is done with a request: its body takes no room any more. Idempotent."""
        self._bytes -= getattr(request.state, "body_bytes", 0)
        request.state.body_bytes = 0

    async def read(self, request: Request) -> bytes:
        """The whole body, which takes room until `over`. Raises ApiError: 413 where it is too long, 408 where
        it does not come, 503 where others take the room.
        """
        limits, taken, parts = self._limits, 0, []
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > limits.body:
            raise self._too_long()

        async def parts_of() -> None:
            nonlocal taken
            async for part in request.stream():
                taken += len(part)
                self._bytes += len(part)
                request.state.body_bytes = taken
                if taken > limits.body:
                    raise self._too_long()
                if self._bytes > limits.bodies:
                    raise cut(busy(503, "Too many long requests are being read. Try again later.", 5))
                parts.append(part)

        try:
            await asyncio.wait_for(parts_of(), limits.body_time)
        except asyncio.TimeoutError:
            raise cut(ApiError(408, "The body did not come in time.")) from None
        except ClientDisconnect:
            raise ApiError(400, "The client has gone.") from None
        return b"".join(parts)

    def _too_long(self) -> ApiError:
        most = self._limits.body >> 20
        return cut(ApiError(413, f"The request is larger than {most} MB.", code="too_large"))


def _parsed(data: bytes) -> Fields:
    """The JSON object. Raises ApiError."""
    try:
        _bound(data)
        return Fields(json.loads(data.decode(), parse_constant=_refuse, parse_float=_finite))
    except UnicodeDecodeError:
        raise ApiError(400, "The body is not UTF-8.", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
    except ValueError as e:
        raise ApiError(400, f"The body is not JSON: {str(e)[:200]}.", code="invalid_json") from None


def _bound(data: bytes) -> None:
    """Raise ApiError where JSON has very many values; text may have as many commas and braces as it likes."""
    too_many = ApiError(
        413,
        f"The request has more than {VALUES:,} values, {PARTS:,} lists, objects and their fields, or "
        f"{ESCAPES:,} escapes in its texts.",
        code="too_large",
    )
    if data.count(b"\\") - data.count(b"\\u") > ESCAPES:  # text in \uXXXX is read fast
        raise too_many
    if data.count(b",") <= VALUES and sum(map(data.count, PARTS_OF)) <= PARTS:
        return
    values = parts = 0
    for piece in _outside_strings(data):
        values += piece.count(b",")
        parts += sum(map(piece.count, PARTS_OF))
        if values > VALUES or parts > PARTS:
            raise too_many


def _outside_strings(data: bytes) -> Iterator[bytes]:
    """What stands outside of the strings of JSON, in pieces."""
    at, inside = 0, 0
    while at < len(data):
        piece = data[at : at + PIECE]
        escapes = len(piece) - len(piece.rstrip(b"\\"))
        piece = data[at : at + PIECE + escapes % 2]  # what is escaped stays with its escape
        at += len(piece)
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        yield b"".join(parts[inside::2])
        inside = (inside + len(parts) - 1) % 2


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")
