"""Log-probabilities as OpenAI's two APIs have them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from tinychat.base.events import Done, Event, Logprobs, TextDelta
from tinychat.engine.odds import MOST
from tinychat.serve.fields import Fields
from tinychat.serve.problems import wrong
from tinychat.text.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from tinychat.text.tokenizer import Tokenizer

LEAST = -9999.0  # in place of minus infinity, which JSON does not have


def asked(fields: Fields) -> int | None:
    """How many of the likeliest tokens a chat asks for beside each; None: no log-probabilities."""
    top = fields.whole("top_logprobs", 0, MOST)
    if not fields.flag("logprobs"):
        if top:
            raise wrong("top_logprobs", "top_logprobs needs logprobs: true.")
        return None
    return top or 0


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(data)}


def chat_entry(tokenizer: Tokenizer, odds: Logprobs) -> dict[str, Any]:
    """One token in `logprobs.content`."""
    top = [_token(tokenizer, *pair) for pair in odds.top]
    return {**_token(tokenizer, odds.token_id, odds.logprob), "top_logprobs": top}


class Certain:
    """Log-probabilities of the tokens whose text is said. Those of a stop string are none of the answer's,
    and while text is held back because it may begin one, so are its tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = StreamDecoder(tokenizer, continued=True)
        self._waiting: deque[tuple[Logprobs, int | None]] = deque()  # and how much text there is with it
        self._made = self._said = 0  # characters

    def of(self, heard: Event) -> list[Logprobs]:
        """Those that an event makes certain."""
        if isinstance(heard, Done):
            left = [] if heard.completion.stop is not None else [odds for odds, _ in self._waiting]
            self._waiting.clear()
            return left
        if not isinstance(heard, TextDelta) or (heard.logprobs is None and not self._waiting):
            return []
        self._said += len(heard.written)
        if heard.logprobs is not None:
            text = self._decoder.push(heard.logprobs.token_id)
            self._made += len(text)
            if text:  # whole characters, with the bytes of those before
                self._waiting = deque((odds, end or self._made) for odds, end in self._waiting)
            self._waiting.append((heard.logprobs, self._made if text else None))
        out = []
        while self._waiting and (end := self._waiting[0][1]) is not None and end <= self._said:
            out.append(self._waiting.popleft()[0])
        return out


class TextOdds:
    """The `logprobs` of a text completion, piece by piece."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._at = 0

    def of(self, tokens: list[Logprobs]) -> dict[str, Any]:
        """For the next tokens."""
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for odds in tokens:
            text = self._text(odds.token_id)
            out["tokens"].append(text)
            out["token_logprobs"].append(max(odds.logprob, LEAST))
            top = {self._text(i): max(x, LEAST) for i, x in reversed(odds.top)}
            out["top_logprobs"].append(dict(reversed(top.items())))
            out["text_offset"].append(self._at)
            self._at += len(text)
        return out

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
