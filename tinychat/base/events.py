"""Events that a running generation yields. Printing every event's `.text` prints the answer once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "context_full", "error"]


@dataclass
class Stats:
    """Counts and times of one answer. Rates are tokens a second; times are seconds.

    tokens_per_step: decoded tokens for one pass over the weights. draft_speedup: estimated gain of drafting,
    from the steps that ran; 1.0 without.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    tokens_per_step: float = 0.0
    draft_speedup: float = 1.0
    evicted_tokens: int = 0
    reasoning_tokens: int = 0
    kv_bytes: int = 0
    peak_rss_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Fields as JSON can hold them."""
        return asdict(self)


@dataclass
class Completion:
    """A finished answer: its text, the ids that were generated (without the stop token) and why it ended.

    `reasoning`: what the model thought before it answered, "" where it did not; its ids are among the others.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats = field(default_factory=Stats)
    reasoning: str = ""


@dataclass(frozen=True)
class TextDelta:
    """One token. `text` may be empty: half a character, or held back because it may begin a stop string or
    reasoning.

    `reasoning` is what the model thinks before it answers, `written` all that it wrote, with the markers
    between the two. What was held back and turned out to be text at the very end comes in a last delta
    without a token (None).
    """

    text: str
    token_id: int | None
    reasoning: str = ""
    written: str = ""

    def __post_init__(self):
        if not self.written and not self.reasoning:
            object.__setattr__(self, "written", self.text)


@dataclass(frozen=True)
class Notice:
    """Something the user should know that is not part of the answer."""

    message: str
    text: str = ""


@dataclass(frozen=True)
class Reading:
    """A long prompt is being read: so far `tokens` of `total`, `rate` of them a second."""

    tokens: int
    total: int
    rate: float
    text: str = ""


@dataclass(frozen=True)
class Done:
    """Always the last event."""

    finish_reason: FinishReason
    stats: Stats
    completion: Completion
    text: str = ""


Event = TextDelta | Notice | Reading | Done


def event_to_json(event: Event) -> dict[str, Any]:
    """The JSON form that `--stream-json` prints, one object a line."""
    if isinstance(event, TextDelta):
        reasoning = {"reasoning": event.reasoning} if event.reasoning else {}
        return {"event": "text", "text": event.text, **reasoning, "token_id": event.token_id}
    if isinstance(event, Notice):
        return {"event": "notice", "message": event.message}
    if isinstance(event, Reading):
        return {"event": "reading", "tokens": event.tokens, "total": event.total, "rate": event.rate}
    return {
        "event": "done",
        "finish_reason": event.finish_reason,
        "text": event.completion.text,
        "reasoning": event.completion.reasoning,
        "token_ids": event.completion.token_ids,
        "stats": event.stats.as_dict(),
    }
