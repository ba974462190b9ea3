"""Endpoints beside the answers: models, health, counts, tokens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.responses import PlainTextResponse

from tinychat import __version__
from tinychat.base import arguments
from tinychat.serve.fields import Fields
from tinychat.serve.problems import ApiError, wrong
from tinychat.serve.replies import Reply
from tinychat.serve.service import endpoint, service_of
from tinychat.text.oversized import refuse_oversized

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from tinychat.model import Model
    from tinychat.serve.rack import Held

LONGEST = 16  # contexts that a text may have to be tokenized


def _model(held: Held) -> dict[str, Any]:
    out = {"id": held.name, "object": "model", "created": held.created, "owned_by": "tinychat"}
    return out if held.model is None else {**out, "max_model_len": held.model.n_ctx}


@endpoint()
async def models(request: Request) -> Response:
    """The models that are served."""
    held = service_of(request).rack.models.values()
    return Reply({"object": "list", "data": [_model(h) for h in held]})


@endpoint()
async def model(request: Request) -> Response:
    """One of them."""
    name = request.path_params["name"]
    held = service_of(request).rack.models.get(name)
    if held is None:
        raise ApiError(404, "That model is not served here.", param="model", code="model_not_found")
    return Reply(_model(held))


@endpoint()
async def health(request: Request) -> Response:
    """Whether it is there and takes requests."""
    closed = service_of(request).desk.closed
    return Reply({"status": "ending" if closed else "ok", "version": __version__}, 503 if closed else 200)


@endpoint()
async def metrics(request: Request) -> Response:
    """Counts for Prometheus."""
    service = service_of(request)
    loaded = sum(h.model is not None for h in service.rack.models.values())
    text = service.metrics.text(
        running=len(service.desk.running), waiting=len(service.desk.line), models_loaded=loaded
    )
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def tokens_of(model: Model, fields: Fields) -> list[int]:
    """Ids of a text (`content`, `prompt`) or of a conversation (`messages`). Raises ApiError, UsageError."""
    if "messages" in fields:
        more = {"tools": fields["tools"]} if "tools" in fields else {}
        return model.request(fields["messages"], **more).prompt(model)
    name = "prompt" if "prompt" in fields else "content"
    fields.need(name)
    text = fields.check(name, arguments.text, True)
    refuse_oversized(model.tokenizer, [text], LONGEST * model.n_ctx)
    begin = fields.flag("add_special") or fields.flag("add_special_tokens")
    return model.encode_prompt(text) if begin else model.tokenizer.encode(text)


@endpoint()
async def tokenize(request: Request) -> Response:
    """Text, or a conversation, to ids."""
    service = service_of(request)
    fields = await service.bodies.fields(request)
    async with service.rack.using(fields.text("model")) as lease:
        ids = await asyncio.to_thread(tokens_of, lease.model, fields)
        return Reply({"tokens": ids, "count": len(ids), "max_model_len": lease.model.n_ctx})


@endpoint()
async def detokenize(request: Request) -> Response:
    """Ids to text."""
    service = service_of(request)
    fields = await service.bodies.fields(request)
    fields.need("tokens")
    async with service.rack.using(fields.text("model")) as lease:
        vocabulary = lease.model.config.vocab_size
        ids = fields.check("tokens", lambda name, value: arguments.token_ids(value, vocabulary))
        if len(ids) > LONGEST * lease.model.n_ctx:
            raise wrong("tokens", f"There are {len(ids)} ids.")
        text = await asyncio.to_thread(lease.model.tokenizer.decode, ids, skip_special=False)
    return Reply({"content": text, "prompt": text})
