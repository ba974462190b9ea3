"""Several clients at once: turns, the line and its end, clients that go away, models that come and go."""

from __future__ import annotations

import socket
import threading

import pytest
from serving import events_of, post, serving
from tiny import tiny_model

from tinychat.base.errors import DamagedWeightsError, MemoryBudgetError
from tinychat.serve.limits import Limits

LONG = {"prompt": "Long", "temperature": 0, "max_tokens": 8000}  # seconds of work


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=8192, backend="cpu", eos_ids=(), context_length=8192) as m:
        m.tokenizer.eos_ids = frozenset()
        yield m


@pytest.fixture
def one(model):
    """One answer at a time, and one that waits."""
    limits = Limits(parallel=1, waiting=1, quiet_time=0.02, grace_time=0)
    with serving(model, limits=limits) as s:
        yield s


def begin(server, stream=True) -> socket.socket:
    """A client with a long answer, which has begun."""
    before = server.service.desk.running.copy()
    s = server.raw(post("/v1/completions", {**LONG, "stream": stream}, server.port))
    server.until(lambda: server.service.desk.running - before)
    return s


def everything(s: socket.socket) -> bytes:
    out = b""
    while more := s.recv(65536):
        out += more
    return out


def test_whoever_finds_the_line_full_is_told_when_to_come_again(one):
    first = begin(one)
    second = one.raw(post("/v1/completions", {"prompt": "x", "max_tokens": 1}, one.port, Connection="close"))
    one.until(lambda: len(one.service.desk.line) == 1)
    status, said, headers = one.chat()
    assert (status, said["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(headers["retry-after"]) <= 120
    assert one.ask("/v1/completions", {"prompt": "x", "n": 3})[0] == 429
    assert one.ask("/v1/models")[0] == 200
    first.close()
    assert everything(second).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_a_client_that_goes_away_cancels_its_work(one, model, stream, half):
    s = begin(one, stream)
    if half:
        s.shutdown(socket.SHUT_WR)
    else:
        s.close()
    one.until(one.idle)
    assert one.service.metrics.counts["tinychat_answers_total", '{reason="cancelled"}'] == 1
    assert one.service.metrics.counts["tinychat_generated_tokens_total", ""] < 8000
    assert not model.shelf._taken


def test_a_client_that_goes_away_in_the_line_leaves_it(one):
    first = begin(one)
    second = one.raw(post("/v1/completions", LONG, one.port))
    one.until(lambda: len(one.service.desk.line) == 1)
    second.close()
    one.until(lambda: not one.service.desk.line)
    first.close()
    one.until(one.idle)


def test_a_stream_that_waits_says_that_it_is_alive(one):
    first = begin(one)
    second = one.raw(post("/v1/completions", {"prompt": "x", "max_tokens": 1, "stream": True}, one.port))
    head = b""
    while head.count(b": still here\n\n") < 3:
        head += second.recv(65536)
    assert head.startswith(b"HTTP/1.1 200")
    assert b"data:" not in head
    first.close()
    rest = b""
    while b"[DONE]" not in rest:
        rest += second.recv(65536)
    assert b'"text":' in rest


def test_several_choices_of_a_client_that_goes_away_all_end(model):
    with serving(model, limits=Limits(parallel=2)) as server:
        s = server.raw(
            post("/v1/completions", {**LONG, "n": 4, "temperature": 1, "stream": True}, server.port)
        )
        server.until(lambda: len(server.service.desk.running) == 2)
        s.close()
        server.until(server.idle)


def test_no_more_than_so_many_run_at_once(model):
    with serving(model, limits=Limits(parallel=2)) as server:
        clients = [begin(server) for _ in range(2)]
        clients.append(server.raw(post("/v1/completions", LONG, server.port)))
        server.until(lambda: len(server.service.desk.line) == 1)
        assert len(server.service.desk.running) == 2
        for s in clients:
            s.close()
        server.until(server.idle)


def test_an_error_in_a_stream_that_has_begun_is_an_event(one, model, monkeypatch):
    first = begin(one)
    second = one.raw(post("/v1/completions", {"prompt": "x", "stream": True}, one.port, Connection="close"))
    while b": still here" not in second.recv(65536):
        pass

    def broken(*args, **kwargs):
        raise DamagedWeightsError("A page of the weights is damaged.", "Pull the model again.")

    monkeypatch.setattr(model.engine, "generate", broken)
    first.close()
    *_, last = events_of(everything(second))
    assert last["error"]["message"].startswith("A page of the weights")
    assert last["error"]["type"] == "server_error"


def test_the_server_ends_although_somebody_is_being_answered(model):
    with serving(model, limits=Limits(parallel=1, grace_time=0)) as server:
        first = begin(server)
        second = server.raw(post("/v1/completions", LONG, server.port))
        server.until(lambda: len(server.service.desk.line) == 1)
    said = everything(second)
    assert said.startswith(b"HTTP/1.1 503") or not said
    assert b"[DONE]" not in everything(first)


@pytest.mark.parametrize("forced", [True, False])
def test_an_answer_that_the_end_of_the_server_cuts_is_no_whole_answer(model, forced):
    with serving(model, limits=Limits(parallel=2, grace_time=60 if forced else 0)) as server:
        streamed, whole = begin(server), begin(server, stream=False)
        server.server.force_exit = forced
    last = [e for e in events_of(everything(streamed)) if e != "[DONE]"][-1]
    assert "ending" in last["error"]["message"]
    said = everything(whole)
    assert said.startswith(b"HTTP/1.1 503")
    assert b"ending" in said


def test_models_are_loaded_when_they_are_asked_for_and_make_way_for_each_other():
    alive, loads = [], []

    def load(seed):
        def made():
            if len(alive) == 2:
                raise MemoryBudgetError("It needs 5 GB.", "Choose a smaller model.")
            loads.append(seed)
            m = tiny_model(ctx=64, seed=seed, backend="cpu")
            inner = m.close
            alive.append(m)
            m.close = lambda: (alive.remove(m), inner())
            return m

        return made

    with serving(*(load(seed) for seed in range(3)), names=("a", "b", "c")) as server:
        assert [m["id"] for m in server.ask("/v1/models")[1]["data"]] == ["a", "b", "c"]
        assert loads == [0]
        for name in ("b", "a", "c", "a"):
            assert server.chat("Hi", model=name, max_tokens=2)[1]["model"] == name
        assert loads == [0, 1, 2]  # b, the longest idle, made way for c
        assert server.chat("Hi", model="b", max_tokens=2)[0] == 200
        assert loads == [0, 1, 2, 1]
        assert server.chat("Hi", model="d")[1]["error"]["code"] == "model_not_found"
    assert not alive


def test_a_model_that_does_not_fit_beside_those_in_use_is_tried_later(model):
    def too_large():
        raise MemoryBudgetError("It needs 5 GB.", "Choose a smaller model.")

    with serving(model, too_large, names=("small", "large"), limits=Limits(parallel=2)) as server:
        s = begin(server)
        status, said, headers = server.chat(model="large")
        assert status == 503
        assert "retry-after" in headers
        assert "Other models are in use" in said["error"]["message"]
        s.close()
        server.until(server.idle)


def test_what_is_no_embedding_model_says_so(one):
    status, said, _ = one.ask("/v1/embeddings", {"model": "tiny", "input": "text"})
    assert (status, said["error"]["param"]) == (400, "model")
    assert "A chat model makes no embeddings" in said["error"]["message"]


def test_requests_that_share_steps_say_what_they_say_alone(model):
    """Eight at once over HTTP, some of which go away; the others' texts are those of single answers."""
    prompts = [f"{i} question " + "and so on " * i for i in range(8)]
    options = {"temperature": 1.0, "max_tokens": 24}
    alone = [[*model.generate(p, seed=i, **options)][-1].completion.text for i, p in enumerate(prompts)]
    said: dict[int, str] = {}
    with serving(model, limits=Limits(parallel=4)) as server:

        def ask(i: int) -> None:
            body = {"prompt": prompts[i], "seed": i, **options}
            if i % 3 == 2:
                server.raw(post("/v1/completions", {**body, "stream": True}, server.port)).close()
            else:
                said[i] = server.ask("/v1/completions", body)[1]["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        server.until(server.idle)
    assert said == {i: alone[i] for i in range(8) if i % 3 != 2}
