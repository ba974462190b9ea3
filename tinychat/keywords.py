"""Types of what programs give by keyword: to models and sessions, and to those who call them for others.

    def answer(question: str, **sampling: Unpack[tinychat.SamplingKeywords]) -> str:
        return model.chat(question, **sampling).text

`None` leaves a sampling parameter as the model or the session has it. The meaning of each is told by
`SamplingParams`, `LoadOptions` and `Model.request`; a test compares the names and types with those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypedDict

from tinychat.text.response_format import Form


class SamplingKeywords(TypedDict, total=False):
    """How tokens are chosen (`SamplingParams`)."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] | None
    max_tokens: int | None
    think_budget: int | None
    seed: int | None
    stop: str | Iterable[str] | None


class PromptKeywords(SamplingKeywords, total=False):
    """What `Model.generate` takes."""

    draft: str | None
    logprobs: int | None


class ChatKeywords(PromptKeywords, total=False):
    """What `Model.chat` takes (`Model.request`)."""

    response_format: Mapping[str, Any] | Form | None
    think: bool | None
    effort: str | None
    tools: Iterable[Callable[..., Any] | Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    go_on: bool


class SessionKeywords(SamplingKeywords, total=False):
    """What `Model.session` takes (`Session`)."""

    draft: str | None
    kv_budget: int | None
    kv_policy: Literal["h2o", "window", "none", "random"] | None
    response_format: Mapping[str, Any] | Form | None


class LoadKeywords(TypedDict, total=False):
    """How a model is loaded (`LoadOptions`)."""

    ctx: int | None
    kv_budget: int | None
    kv_policy: Literal["h2o", "window", "none", "random"] | None
    kv_disk_budget: int
    kv_bits: Literal[16, 8, 4]
    device: Literal["auto", "cpu", "cuda", "reference"]
    gpu_memory: float | Literal["auto"]
    threads: int | None
    act_bits: Literal[16, 8] | None
    head_bits: Literal[8, 16]
    quantize: Literal["auto", "rtn", "none"]
    offline: bool
    draft: str | None
    draft_tokens: int | None
    think: bool | None
    effort: Literal["low", "medium", "high", "none", "minimal", "xhigh", "max"] | None
