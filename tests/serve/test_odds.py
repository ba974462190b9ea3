"""Log-probabilities of an answer that a stop string ends: of the tokens of its text, and of no others."""

from __future__ import annotations

import pytest
from said import says
from serving import events_of, serving
from tiny import tiny_model

ASKED = {"messages": [{"role": "user", "content": "Hello."}], "stop": ["stop!"], "logprobs": True}


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=2048, backend="cpu", eos_ids=(), context_length=2048) as m:
        yield m


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as s:
        yield s


def bytes_of(choice) -> bytes:
    """Bytes of the tokens that log-probabilities are told of."""
    told = choice["logprobs"] or {"content": []}
    return b"".join(bytes(entry["bytes"]) for entry in told["content"])


@pytest.mark.parametrize(("written", "said"), [("é sto, stop! é", "é sto, "), ("é sto", "é sto")])
def test_the_tokens_of_a_stop_string_have_no_log_probabilities(server, model, monkeypatch, written, said):
    """What might have become a stop string and did not has them."""
    says(monkeypatch, model, written)
    choice = server.ask("/v1/chat/completions", ASKED)[1]["choices"][0]
    assert (choice["message"]["content"], bytes_of(choice).decode()) == (said, said)
    _, content, _ = server.ask("/v1/chat/completions", {**ASKED, "stream": True})
    text, told = "", b""
    for chunk in events_of(content)[:-1]:
        text += chunk["choices"][0]["delta"].get("content") or ""
        told += bytes_of(chunk["choices"][0])
        assert text.encode().startswith(told)  # none comes before its text
    assert told.decode() == said


def test_text_completions_leave_them_out_too(server, model, monkeypatch):
    says(monkeypatch, model, "one two three")
    asked = {"prompt": "x", "stop": "o t", "logprobs": 1, "max_tokens": 20}
    _, said, _ = server.ask("/v1/completions", asked)
    assert "".join(said["choices"][0]["logprobs"]["tokens"]) == said["choices"][0]["text"] == "one tw"
    _, content, _ = server.ask("/v1/completions", {**asked, "stream": True})
    parts = [c["choices"][0]["logprobs"] or {"tokens": []} for c in events_of(content)[:-1]]
    assert "".join(token for part in parts for token in part["tokens"]) == "one tw"
