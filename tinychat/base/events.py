"""Events that a running generation yields. Printing every event's `.text` prints the answer once."""

from __future__ import annotations

from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, Literal

SHOWN = 60  # characters of a text in a repr

FinishReason = Literal["stop", "length", "cancelled", "context_full", "error", "tool_calls", "repeating"]


def _brief(value: Any) -> str:
    if isinstance(value, str) and len(value) > SHOWN:
        return f"{value[:SHOWN]!r}…"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


class _Brief:
    """Base of dataclasses whose repr has the fields that say something: no defaults, the beginning of a long
    text, and nothing twice.
    """

    def __repr__(self) -> str:
        given = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != _default(f)}  # type: ignore[arg-type]
        if given.get("written") == given.get("text"):
            given.pop("written", None)
        return f"{type(self).__name__}({', '.join(f'{k}={_brief(v)}' for k, v in given.items())})"


@dataclass(repr=False)
class Stats(_Brief):
    """Counts and times of one answer. Rates are tokens a second; times are seconds.

    tokens_per_step: decoded tokens for one pass over the weights. draft_speedup: estimated gain of drafting,
    from the steps that ran; 1.0 without. given_up: of each message of the conversation, this answer the last,
    how many of how many tokens the memory has given up, on average over layers and heads; [] where none.
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
    given_up: list[tuple[int, int]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Fields as JSON can hold them; `given_up` where there is something in it."""
        fields = asdict(self)
        if not self.given_up:
            del fields["given_up"]
        return fields


@dataclass(frozen=True, repr=False)
class ToolCall(_Brief):
    """A call that a model asks for. `arguments`: a JSON object as text, without duplicate keys."""

    id: str
    name: str
    arguments: str

    def as_dict(self) -> dict[str, Any]:
        """The form that a message of the assistant has it in."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(repr=False)
class Completion:
    """A finished answer: its text, the ids that were generated (without the stop token) and why it ended.

    `reasoning`: what the model thought before it answered, "" where it did not; its ids are among the others.
    `tool_calls`: the whole calls in it, which are no part of the text; it then ends for the reason
    "tool_calls", unless it was cut.
    `written`: all of it with its markers, as the model wrote it.
    `stop`: the stop string that ended it, if one did.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats = field(default_factory=Stats)
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    written: str = ""
    stop: str | None = None

    def __repr__(self) -> str:
        n, rate = len(self.token_ids), self.stats.decode_tps
        said = [_brief(self.text), self.finish_reason, f"{n} token{'s' * (n != 1)}"]
        said += [f"{rate:.1f} tok/s"] if rate else []
        said += [f"reasoning={_brief(self.reasoning)}"] if self.reasoning else []
        said += [f"tool_calls={self.tool_calls!r}"] if self.tool_calls else []
        return f"<Completion {', '.join(said)}>"

    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation that goes on with it."""
        out: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            out["reasoning_content"] = self.reasoning
        if self.tool_calls:
            out["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return out


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the probabilities that the model itself gave to a token and to the likeliest in
    its place, (id, log-probability) each, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, repr=False)
class TextDelta(_Brief):
    """One token. `text` may be empty: half a character, or held back because it may begin a stop string or
    reasoning.

    `reasoning` is what the model thinks before it answers, `written` all that it wrote, with the markers
    between the two. What was held back and turned out to be text at the very end comes in a last delta
    without a token (None). `logprobs` of the token, where they were asked for. `uncalled`: what was written
    without the calls of tools in it, where there are some.
    """

    text: str
    token_id: int | None
    reasoning: str = ""
    written: str = ""
    logprobs: Logprobs | None = None
    uncalled: str | None = None

    def __post_init__(self):
        if not self.written and not self.reasoning:
            object.__setattr__(self, "written", self.text)

    @property
    def kept(self) -> str:
        """What a conversation keeps of it as content: all that was written but calls."""
        return self.written if self.uncalled is None else self.uncalled

    @property
    def tokens(self) -> int:
        """How many it is of."""
        return int(self.token_id is not None)


@dataclass(frozen=True, repr=False)
class ToolCallDelta(_Brief):
    """A piece of a call, in the order in which it is written.

    The first one of a call, and no other, has its id and its name; `arguments` is a piece of JSON text.
    index: 0 for the first call of the answer. damaged: the last one of a call that turned out to be none;
    what was written of it follows as text.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    damaged: bool = False
    text: str = ""


@dataclass(frozen=True, repr=False)
class Notice(_Brief):
    """Something the user should know that is not part of the answer."""

    message: str
    text: str = ""


@dataclass(frozen=True, repr=False)
class Reading(_Brief):
    """A long prompt is being read: so far `tokens` of `total`, `rate` of them a second."""

    tokens: int
    total: int
    rate: float
    text: str = ""


@dataclass(frozen=True, repr=False)
class Done:
    """Always the last event."""

    finish_reason: FinishReason
    stats: Stats
    completion: Completion
    text: str = ""

    def __repr__(self) -> str:
        return f"<Done {self.completion!r}>"


Event = TextDelta | ToolCallDelta | Notice | Reading | Done


def event_to_json(event: Event) -> dict[str, Any]:
    """The JSON form that `--stream-json` prints, one object a line."""
    if isinstance(event, TextDelta):
        reasoning = {"reasoning": event.reasoning} if event.reasoning else {}
        return {"event": "text", "text": event.text, **reasoning, "token_id": event.token_id}
    if isinstance(event, ToolCallDelta):
        said = {"id": event.id, "name": event.name} if event.name else {}
        damaged = {"damaged": True} if event.damaged else {}
        return {"event": "tool_call", "index": event.index, **said, "arguments": event.arguments, **damaged}
    if isinstance(event, Notice):
        return {"event": "notice", "message": event.message}
    if isinstance(event, Reading):
        return {"event": "reading", "tokens": event.tokens, "total": event.total, "rate": event.rate}
    return {
        "event": "done",
        "finish_reason": event.finish_reason,
        "text": event.completion.text,
        "reasoning": event.completion.reasoning,
        **({"tool_calls": [c.as_dict() for c in calls]} if (calls := event.completion.tool_calls) else {}),
        "token_ids": event.completion.token_ids,
        "stats": event.stats.as_dict(),
    }
