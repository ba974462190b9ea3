"""What an OpenAI-compatible server says of an answer, chunk by chunk, as the events of a session. Whatever is
not as it should be is left out or an error, never believed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tinychat.base.characters import whole
from tinychat.base.events import Completion, Done, FinishReason, Stats, TextDelta, ToolCall, ToolCallDelta
from tinychat.process.served_calls import ServedCalls
from tinychat.process.server import Server, ServerError, words_of
from tinychat.text.reasoning import Splitter
from tinychat.text.stopping import Outlet

LONGEST_ANSWER = 1 << 22  # characters
SHORTEST = 0.05  # seconds of an answer that tell how fast it came
OPEN, CLOSE = "<think>", "</think>"  # how an answer keeps reasoning that came in a field of its own
REASONING = ("reasoning_content", "reasoning")  # vLLM's, SGLang's, llama.cpp's; OpenRouter's, ollama's
REASONS: dict[str, FinishReason] = {"length": "length", "max_tokens": "length"}  # all others: "stop"


@dataclass(frozen=True)
class ServedDelta(TextDelta):
    """A piece of a server's answer: about a token, whose id nobody tells."""

    @property
    def tokens(self) -> int:
        """One, as servers send them."""
        return 1


class Reader:
    """Reads one answer. `said`: whether something of it has come."""

    def __init__(self, server: Server, begun: tuple[str, str] | None = None):
        """begun: thought and text of the answer that goes on. What comes is its text then: a server that
        takes thoughts apart may take it for one.
        """
        self.server = server
        self._goes_on = begun is not None
        self.said = False
        self.finish: str | None = None
        thought, text = begun or ("", "")
        self._texts, self._thoughts = [text], [thought]
        self._size = 0
        self._calls = ServedCalls()
        self._whole: list[ToolCall] = []
        self._outlet = Outlet(splitter=Splitter())
        self._open, self._closed = False, self._goes_on  # reasoning in a field of its own
        self._answered = False
        self._held = ""  # of the reasoning: what may be the beginning of a marker
        self._usage: dict[str, Any] = {}
        self._began = time.monotonic()
        self._first = self._last = 0.0
        self._count = 0

    def take(self, chunk: Any) -> Iterator[ServedDelta | ToolCallDelta]:
        """The text in a chunk, or in a whole answer. Raises ServerError for an error in its place."""
        if not isinstance(chunk, dict):
            return
        if error := chunk.get("error") or (chunk.get("object") == "error" and chunk):
            raise self._failed(error)
        if isinstance(usage := chunk.get("usage"), dict):
            self._usage = usage
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return
        said = choice.get("delta") or choice.get("message")
        if isinstance(said, dict):
            reasoning = next((t for k in REASONING if (t := _text(said.get(k)))), "")
            text = _text(said.get("content")) or _text(said.get("refusal"))
            reasoning += _text(said.get("content"), "thinking")
            if self._goes_on:
                reasoning, text = "", reasoning + text
            yield from self._hear(reasoning, text)
            for call in self._calls.take(said.get("tool_calls")):
                self.said = True
                yield call
            self._bound()
        if isinstance(reason := choice.get("finish_reason"), str) and reason:
            self.finish = reason[:40]

    def end(self) -> Iterator[ServedDelta | ToolCallDelta]:
        """The stream has ended: what was held back."""
        written = self._close()
        last = self._outlet.flush()
        if written or last.written:
            yield self._made(last.text, last.reasoning, written + last.written)
        self._whole, lost = self._calls.end()
        for index, said in lost:  # cut, or no JSON: it is told as text
            yield ToolCallDelta(index, damaged=True)
            yield self._made(said, "", said)

    def done(self, cancelled: bool) -> Done:
        """Done with the numbers of the answer, as the server tells them where it does."""
        reason: FinishReason = "cancelled" if cancelled else REASONS.get(self.finish or "", "stop")
        if reason == "stop" and self._whole:
            reason = "tool_calls"
        text, thought = "".join(self._texts), "".join(self._thoughts)
        stats = self._stats()
        return Done(reason, stats, Completion(text, [], reason, stats, thought, self._whole))

    def _stats(self) -> Stats:
        usage = self._usage
        n = _number(usage.get("completion_tokens")) or self._count
        took = self._last - self._first
        return Stats(
            prompt_tokens=_number(usage.get("prompt_tokens")),
            cached_tokens=_number(_inner(usage, "prompt_tokens_details", "cached_tokens")),
            generated_tokens=n,
            reasoning_tokens=_number(_inner(usage, "completion_tokens_details", "reasoning_tokens")),
            ttft_s=self._first - self._began if self._first else 0.0,
            tpot_s=took / (n - 1) if n > 1 else 0.0,
            decode_tps=(n - 1) / took if n > 1 and took > SHORTEST else 0.0,
        )

    def _failed(self, error: Any) -> ServerError:
        code = error.get("code") if isinstance(error, dict) else None
        status = code if type(code) is int and 400 <= code < 600 else 500
        return self.server.refused(status, self.server.quoted(words_of(error)))

    def _hear(self, reasoning: str, text: str) -> Iterator[ServedDelta]:
        if not reasoning and not text:
            return
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._count += 1
        self._size += len(reasoning) + len(text)
        self._bound()
        self.said = True
        written = ""
        if reasoning and (self._closed or self._answered):  # it would stand in the middle of the answer
            reasoning = ""
        elif reasoning:
            written, reasoning = self._think(reasoning)
        self._answered |= bool(text.strip())
        if text and self._open:
            written += self._close()
        if text and self._closed:
            yield self._made(text, reasoning, written + text)
        elif text:
            heard = self._outlet.push(text)
            yield self._made(heard.text, heard.reasoning, heard.written)
        else:
            yield self._made("", reasoning, written)

    def _bound(self) -> None:
        if self._size + self._calls.size > LONGEST_ANSWER:
            raise ServerError(
                f"{self.server.address} answers without end.", "What it said is kept; ask anew."
            )

    def _think(self, more: str) -> tuple[str, str]:
        """(what is written, what of it is reasoning). A marker's end in it is spelled so that it is none."""
        written = "" if self._open else f"{OPEN}\n"
        self._open = True
        more = (self._held + more).replace(CLOSE, "</ think>")
        kept = next((n for n in range(len(CLOSE) - 1, 0, -1) if more.endswith(CLOSE[:n])), 0)
        more, self._held = more[: len(more) - kept], more[len(more) - kept :]
        return written + more, more

    def _close(self) -> str:
        """The end of the reasoning, where it is open."""
        if not self._open:
            return ""
        held, self._held = self._held, ""
        self._open, self._closed = False, True
        return f"{held}\n{CLOSE}\n\n"

    def _made(self, text: str, reasoning: str, written: str) -> ServedDelta:
        if text:
            self._texts.append(text)
        if reasoning:
            self._thoughts.append(reasoning)
        return ServedDelta(text, None, reasoning, written)


def _text(value: Any, kind: str = "text") -> str:
    """A text, or those of a list of parts that are of that kind."""
    if isinstance(value, str):
        return whole(value) if kind == "text" else ""
    parts = [p for p in value if isinstance(p, dict)] if isinstance(value, list) else []
    inner = [p.get(kind) for p in parts if p.get("type") in (kind, None)]
    inner += [q.get("text") for part in inner if isinstance(part, list) for q in part if isinstance(q, dict)]
    return whole("".join(t for t in inner if isinstance(t, str)))


def _number(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 40 else 0


def _inner(usage: dict[str, Any], key: str, name: str) -> Any:
    inner = usage.get(key)
    return inner.get(name) if isinstance(inner, dict) else None
