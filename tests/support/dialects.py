"""What vLLM and SGLang send, as their own sources write it: chunks, errors and lists of models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from scripted_server import Handler, Script


def _stream(chunks: Iterable[dict[str, Any]], done: bool = True) -> Script:
    def play(h: Handler) -> None:
        h.begin()
        for chunk in chunks:
            h.raw(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        if done:
            h.end()

    return play


class Vllm:
    """vLLM's entrypoints/openai: unset fields are left out, thoughts are `reasoning`, a call's id comes with
    its name, and the last chunk of a stream has no choices.
    """

    owner = "vllm"
    reasoning = "reasoning"
    auto_refused = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'

    @staticmethod
    def listed() -> dict[str, Any]:
        model = {"id": "org/big-model", "object": "model", "created": 1, "owned_by": "vllm", "root": "/m"}
        return {
            "object": "list",
            "data": [{**model, "parent": None, "max_model_len": 32768, "permission": []}],
        }

    @staticmethod
    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, **more}
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "org/big-model"}
        return {**head, "choices": [choice]}

    @classmethod
    def usage(cls) -> dict[str, Any]:
        counts = {"prompt_tokens": 20, "total_tokens": 29, "completion_tokens": 9}
        return {
            **cls.chunk({}),
            "choices": [],
            "usage": {**counts, "prompt_tokens_details": {"cached_tokens": 16}},
        }

    @classmethod
    def answer(cls, *deltas: dict[str, Any], reason: str = "stop") -> Script:
        first = cls.chunk({"role": "assistant", "content": ""})
        *rest, last = deltas
        end = {"stop_reason": None} if reason != "length" else {}
        return _stream([first, *map(cls.chunk, rest), cls.chunk(last, reason, **end), cls.usage()])

    @staticmethod
    def call(index: int, id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
        head = {"id": id, "type": "function"} if id else {}
        return {"index": index, **head, "function": function}

    @staticmethod
    def error(message: str, code: int = 400) -> dict[str, Any]:
        return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}


class Sglang(Vllm):
    """SGLang's: every field is there, null where nothing is; thoughts are `reasoning_content`; errors have no
    object around them, and a stream's have.
    """

    owner = "sglang"
    reasoning = "reasoning_content"
    auto_refused = "Please launch the server with --tool-call-parser to use tools"

    @staticmethod
    def listed() -> dict[str, Any]:
        model = {
            "id": "org/big-model",
            "object": "model",
            "created": 1,
            "owned_by": "sglang",
            "root": "org/big",
        }
        return {"object": "list", "data": [{**model, "parent": None, "max_model_len": 32768}]}

    @staticmethod
    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
        whole = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None} | delta
        choice = {"index": 0, "delta": whole, "logprobs": None, "finish_reason": reason, "matched_stop": None}
        head = {"id": "9f", "object": "chat.completion.chunk", "created": 1, "model": "org/big-model"}
        return {**head, "choices": [choice], "usage": None}

    @classmethod
    def answer(cls, *deltas: dict[str, Any], reason: str = "stop") -> Script:
        first = cls.chunk({"role": "assistant", "content": ""})
        return _stream([first, *map(cls.chunk, deltas), cls.chunk({}, reason), cls.usage()])

    @staticmethod
    def call(index: int, id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
        return {
            "id": id,
            "index": index,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    @staticmethod
    def error(message: str, code: int = 400) -> dict[str, Any]:
        return {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": code}


def broken_off(dialect: type[Vllm], message: str, *deltas: dict[str, Any]) -> Script:
    """A stream in which an error takes the place of the rest."""
    error = {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}}
    return _stream([*map(dialect.chunk, deltas), error])


DIALECTS: dict[str, type[Vllm]] = {"vllm": Vllm, "sglang": Sglang}
