"""Bodies of requests: read within bounds of size and time, and parsed."""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect

from tinychat.serve.fields import Fields
from tinychat.serve.problems import ApiError, busy, cut

if TYPE_CHECKING:
    from starlette.requests import Request

    from tinychat.serve.limits import Limits


class Bodies:
    """Reads bodies, and knows how much all that are being read take."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._bytes = 0

    async def fields(self, request: Request) -> Fields:
        """The JSON object of a request. Raises ApiError."""
        data = await self.read(request)
        try:
            return Fields(json.loads(data.decode(), parse_constant=_refuse, parse_float=_finite))
        except UnicodeDecodeError:
            raise ApiError(400, "The body is not UTF-8.", code="invalid_json") from None
        except RecursionError:
            raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
        except ValueError as e:
            raise ApiError(400, f"The body is not JSON: {str(e)[:200]}.", code="invalid_json") from None

    async def read(self, request: Request) -> bytes:
        """The whole body. Raises ApiError: 413 where it is too long, 408 where it does not come, 503 where
        others take the room.
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
        finally:
            self._bytes -= taken
        return b"".join(parts)

    def _too_long(self) -> ApiError:
        most = self._limits.body >> 20
        return cut(ApiError(413, f"The request is larger than {most} MB.", code="too_large"))


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")
