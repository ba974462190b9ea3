"""Answers over HTTP in random company are, to the bit, what each is alone: with drafts, forms of answers,
clients that go away, conversations that make way and come back from disk.
"""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from serving import Served, events_of, post, serving
from tiny import tiny_model

from tinychat.serve.limits import Limits

SMALL = dict(ctx=512, backend="cpu", context_length=512, grows=False)
FORMS: list[dict[str, Any]] = [
    {"type": "choice", "choices": ["red", "green", "blue"]},
    {"type": "regex", "pattern": "[a-c]{3,9}-[0-9]+"},
    {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"enum": [1, 22, "x"]}}}},
]


def conversation(rng: random.Random, number: int) -> list[dict[str, Any]]:
    """Two or three turns; each is what is said and how the answer is chosen. The number keeps it apart from
    others, whose answers may have the same text in other bytes.
    """
    turns = []
    for i in range(rng.randrange(2, 4)):
        said = f"{number if not i else ''} " + "and so on " * rng.randrange(12)
        options: dict[str, Any] = {"temperature": rng.choice([0, 0.7, 1.3]), "seed": rng.randrange(1000)}
        options["max_tokens"] = rng.randrange(1, 40)
        if rng.random() < 0.3:
            options["response_format"] = rng.choice(FORMS)
        if rng.random() < 0.2:
            options["stop"] = ["o", "\n\n"]
        turns.append({"said": said, **options})
    return turns


def alone(turns: list[dict[str, Any]]) -> list[str]:
    """What is answered where nobody else is."""
    answers, messages = [], []
    with tiny_model(**SMALL) as model:
        for turn in turns:
            options = {k: v for k, v in turn.items() if k != "said"}
            messages.append({"role": "user", "content": turn["said"]})
            answers.append(model.chat(messages, **options).text)
            messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def over_http(server: Served, turns: list[dict[str, Any]], rng: random.Random, out: list[str]) -> None:
    """The same of a server, streamed or not; at times somebody asks the like and goes away."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        options = {k: v for k, v in turn.items() if k != "said"}
        messages.append({"role": "user", "content": turn["said"]})
        body = {"messages": messages, **options}
        if rng.random() < 0.3:
            gone = server.raw(post("/v1/chat/completions", {**body, "seed": 7, "stream": True}, server.port))
            if rng.random() < 0.5:
                gone.recv(rng.randrange(1, 900))
            gone.close()
        stream = rng.random() < 0.5
        status, said, _ = server.ask("/v1/chat/completions", {**body, "stream": stream})
        assert status == 200, said
        if stream:
            *chunks, done = events_of(said)
            assert done == "[DONE]"
            text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
        else:
            text = said["choices"][0]["message"]["content"]
        out.append(text)
        messages.append({"role": "assistant", "content": text})


def play(server: Served, rng: random.Random, first: int) -> int:
    """A schedule: some conversations at once. How many there were."""
    n = rng.randrange(2, 7)
    plans = [conversation(rng, first + i) for i in range(n)]
    found: list[list[str]] = [[] for _ in plans]
    failed: list[BaseException] = []

    def work(i: int, seed: int) -> None:
        try:
            over_http(server, plans[i], random.Random(seed), found[i])
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(i, rng.randrange(1 << 30))) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failed:
        raise failed[0]
    assert found == [alone(plan) for plan in plans]
    return n


def play_many(schedules: int, tmp_path, seed: int) -> None:
    rng, played = random.Random(seed), 0
    with tiny_model(**SMALL) as model, serving(model, limits=Limits(parallel=4), folder=tmp_path) as server:
        for _ in range(schedules):
            played += play(server, rng, played)
        server.until(server.idle)
        assert not model.shelf._taken


def test_answers_in_company_are_what_each_is_alone(tmp_path):
    play_many(4, tmp_path, 1)
    assert list(tmp_path.glob("served-*"))


@pytest.mark.slow
def test_answers_in_company_in_500_schedules(tmp_path):
    play_many(500, tmp_path, 2)
