"""OpenAI's /v1/embeddings."""

from __future__ import annotations

import base64
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import numpy as np

from tinychat.embedding import MOST, Embedded, EmbeddingRequest
from tinychat.serve.answers import Answer
from tinychat.serve.fields import Fields
from tinychat.serve.problems import ApiError, wrong
from tinychat.serve.service import endpoint, error_of, service_of
from tinychat.serve.streams import Whole

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from tinychat.model import Model


def _texts(fields: Fields) -> list[str | list[int]]:
    """The texts, each a text or ids. Raises ApiError."""
    value = fields.need("input")
    several = isinstance(value, list) and value and type(value[0]) is not int
    texts = value if several else [value]
    if len(texts) > MOST:
        raise wrong("input", f"input has {len(texts):,} texts; give {MOST:,} at most.")
    for text in texts:
        ids = isinstance(text, list) and text and all(type(i) is int for i in text)
        if not ((isinstance(text, str) and text) or ids):
            raise wrong("input", "input is a text, a list of token ids, or a list of these; none is empty.")
    return texts


async def _whole(answer: Answer, name: str, coded: bool) -> dict[str, Any]:
    """The response."""
    made: list[Embedded] = []
    async with aclosing(answer.events()) as events:
        async for _, said in events:
            if isinstance(said, Embedded):
                made.append(said)
    data = [
        {"object": "embedding", "index": i, "embedding": _coded(m.vector) if coded else m.vector.tolist()}
        for i, m in enumerate(made)
    ]
    used = sum(m.tokens for m in made)
    usage = {"prompt_tokens": used, "total_tokens": used}
    return {"object": "list", "data": data, "model": name, "usage": usage}


def _coded(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


@endpoint()
async def embeddings(request: Request) -> Response:
    """Vectors of texts; a chat model's hidden states were not trained to tell texts apart."""
    service = service_of(request)
    fields = await service.bodies.fields(request)
    texts, dimensions = _texts(fields), fields.whole("dimensions", 1, 1 << 20)
    form = fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise wrong("encoding_format", "encoding_format is float or base64.")

    def make(model: Model) -> list[EmbeddingRequest]:
        if model.pooling is None:
            raise ApiError(
                400,
                "A chat model makes no embeddings. Ask an embedding model, which can be served beside it.",
                param="model",
                code="unsupported_model",
            )
        return [EmbeddingRequest.of(model, model.pooling, texts, dimensions)]

    answer, name = await service.ask(fields.text("model"), make)
    return Whole(_whole(answer, name, form == "base64"), error_of, answer.drop)
