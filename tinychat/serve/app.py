"""The application: which path leads to which endpoint, and what stands before all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from tinychat.serve import anthropic, chat, completions, embeddings, facts, responses
from tinychat.serve.guard import Guard
from tinychat.serve.problems import ApiError
from tinychat.serve.replies import Reply
from tinychat.serve.service import error_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from tinychat.serve.service import Service

ROUTES = [
    Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
    Route("/v1/completions", completions.completions, methods=["POST"]),
    Route("/v1/embeddings", embeddings.embeddings, methods=["POST"]),
    Route("/v1/messages", anthropic.messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", anthropic.count_tokens, methods=["POST"]),
    Route("/v1/responses", responses.responses, methods=["POST"]),
    Route("/v1/responses/{id}", responses.response, methods=["GET", "DELETE"]),
    Route("/v1/models", facts.models, methods=["GET"]),
    Route("/v1/models/{name:path}", facts.model, methods=["GET"]),
    Route("/health", facts.health, methods=["GET"]),
    Route("/metrics", facts.metrics, methods=["GET"]),
    Route("/tokenize", facts.tokenize, methods=["POST"]),
    Route("/detokenize", facts.detokenize, methods=["POST"]),
]


def make_app(
    service: Service, key: str | None = None, local: bool = True, origins: Iterable[str] = ()
) -> Starlette:
    """The ASGI application over a service. key, local, origins: as in `Guard`."""
    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(Guard, key=key, local=local, origins=tuple(origins), form=_error)],
        exception_handlers={HTTPException: _not_found},
    )
    app.state.service = service
    return app


def _error(path: str, problem: ApiError) -> dict[str, Any]:
    """An error in the form of the API that a path belongs to."""
    return anthropic.error_of(problem) if path.startswith("/v1/messages") else error_of(problem)


async def _not_found(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    said = "is not known" if e.status_code == 404 else f"does not take {request.method[:20]}"
    problem = ApiError(e.status_code, f"{request.url.path[:200]} {said}.", code="not_found")
    return Reply(_error(request.url.path, problem), e.status_code, headers=e.headers)
