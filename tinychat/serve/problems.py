"""What goes wrong with a request, as a status and the error object of OpenAI's API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinychat.base import errors
from tinychat.base.errors import MemoryBudgetError, ModelNotFoundError, UsageError

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"} | {
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer that is an error.

    status, message  what the client is told
    param            the field of the request that is wrong
    code             a word for programs, such as "model_not_found"
    headers          more headers of the response
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def as_dict(self) -> dict[str, Any]:
        """The error object."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, message: str) -> ApiError:
    """The value of one field is wrong."""
    return ApiError(400, message, param=param, code="invalid_value")


def busy(status: int, message: str, seconds: float) -> ApiError:
    """Too much is asked for at once; `seconds`: when to try again."""
    after = max(1, min(120, math.ceil(seconds)))
    code = "rate_limit_exceeded" if status == 429 else "overloaded"
    return ApiError(status, message, code=code, headers={"retry-after": str(after)})


def cut(error: ApiError) -> ApiError:
    """The same where the request was not read to its end: the connection cannot go on."""
    error.headers["connection"] = "close"
    return error


def of(e: BaseException) -> ApiError:
    """Any exception as what the client is told."""
    if isinstance(e, ApiError):
        return e
    error = errors.of(e)
    message, code = f"{error.what} {error.todo}", None
    if isinstance(error, UsageError):
        code = "context_length_exceeded" if "the context holds" in error.what else "invalid_value"
        return ApiError(400, message, code=code)
    if isinstance(error, ModelNotFoundError):
        return ApiError(404, message, param="model", code="model_not_found")
    return ApiError(503 if isinstance(error, MemoryBudgetError) else 500, message)
