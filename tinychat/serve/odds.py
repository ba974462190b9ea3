"""Log-probabilities as OpenAI's two APIs have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinychat.base.events import Logprobs
from tinychat.engine.odds import MOST
from tinychat.serve.fields import Fields
from tinychat.serve.problems import wrong

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
