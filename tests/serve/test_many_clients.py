"""Many clients of every kind at once: no error, nothing is left behind, memory stays flat."""

from __future__ import annotations

import gc
import json
import random
import socket
import threading
from collections import Counter
from contextlib import suppress

import psutil
import pytest
from serving import Served, post, serving
from tiny import tiny_model

from tinychat.engine import shelf
from tinychat.serve.limits import Limits
from tinychat.text.known_text import KnownText

WORDS = ["red", "green", "blue", "and", "so", "on", "again", "\n"]


def text(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(WORDS, k=n))


def body_of(rng: random.Random) -> dict:
    """A request: fresh conversations, and some that several clients have in common."""
    common = rng.randrange(4)
    messages = [{"role": "system", "content": f"{common} " + "be brief " * 20 * common}]
    messages.append({"role": "user", "content": text(rng, rng.randrange(1, 60))})
    more = {"temperature": rng.choice([0, 1.0]), "seed": rng.randrange(100), "stream": rng.random() < 0.6}
    if more["stream"] and rng.random() < 0.5:
        more["stream_options"] = {"include_usage": True}
    if rng.random() < 0.1:
        more["n"] = 2
    if rng.random() < 0.2:
        more["stop"] = ["q", "zz"]
    return {"messages": messages, "max_tokens": rng.randrange(1, 60), **more}


def read_all(s: socket.socket, piece: int = 65536) -> bytes:
    out = b""
    while more := s.recv(piece):
        out += more
    return out


def visit(server: Served, rng: random.Random, seen: Counter, depth: int = 0) -> None:
    """One request of a client that behaves well, or does not."""
    kind = rng.choice(["whole"] * 5 + ["gone", "gone early", "half closed", "slow", "garbage"])
    body = body_of(rng)
    s = server.raw(post("/v1/chat/completions", body, server.port, Connection="close"))
    try:
        if kind == "gone early":
            return
        if kind == "gone":
            s.recv(rng.randrange(1, 2000))
            return
        if kind == "half closed":
            s.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                s.recv(1)
            return
        if kind == "garbage":
            with suppress(ConnectionError):
                s.sendall(b"\0" * 1000)
                read_all(s)
            return
        said = s.recv(1)
        if kind == "slow" and depth < 2:  # it does something else before it reads on
            visit(server, rng, seen, depth + 1)
        said += read_all(s, 200 if kind == "slow" else 65536)
        status = int(said.split(b" ", 2)[1])
        seen[status] += 1
        assert status in (200, 429), said[:500]
        if status == 200:
            _, _, content = said.partition(b"\r\n\r\n")
            assert b'"error"' not in content
            assert b"[DONE]" in content if body["stream"] else json.loads(content)["choices"]
    finally:
        seen[kind] += 1
        s.close()


def crowd(server: Served, clients: int, requests: int, seed: int) -> Counter:
    """So many clients, so many requests together; what came of them."""
    seen: Counter = Counter()
    failed: list[BaseException] = []

    def client(i: int) -> None:
        rng = random.Random(seed * 1000 + i)
        try:
            for _ in range(requests // clients):
                visit(server, rng, seen)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failed:
        raise failed[0]
    state = server.server.server_state
    server.until(lambda: not state.connections and not state.tasks and server.idle())
    return seen


def check_nothing_is_left(server: Served, model) -> None:
    assert not model.shelf._taken
    assert not server.service._answers
    assert server.service.bodies._bytes == 0
    assert not model.engine.scheduler._wanted
    assert not any(b.busy for b in model.engine._branches)


def test_a_small_crowd_leaves_nothing_behind(tmp_path):
    limits = Limits(parallel=4, waiting=4)
    with tiny_model(ctx=1024, backend="cpu", eos_ids=(), context_length=1024) as model:
        with serving(model, limits=limits, folder=tmp_path) as server:
            seen = crowd(server, 16, 80, seed=1)
            check_nothing_is_left(server, model)
        assert seen[200] > 10, seen


@pytest.mark.slow
def test_a_thousand_requests_of_32_clients(tmp_path, monkeypatch):
    """Run by hand: -s shows the figures. What is remembered is bounded so that the bounds are reached."""
    monkeypatch.setattr(shelf, "FILES", 16)
    limits = Limits(parallel=4, waiting=16)
    model = tiny_model(ctx=1024, backend="cpu", eos_ids=(), context_length=1024, grows=False)
    model.known = KnownText(most_texts=64)
    # A tokenizer remembers 10,000 words, and this one takes each text for a word.
    model.tokenizer.backend.model._resize_cache(0)
    resident = []
    with model, serving(model, limits=limits, folder=tmp_path) as server:
        for i in range(6):
            seen = crowd(server, 32, 320 if i == 0 else 1000, seed=i)
            gc.collect()
            resident.append(psutil.Process().memory_info().rss)
            print(f"{dict(seen)} resident {resident[-1] / 1e6:.1f} MB, threads {threading.active_count()}")
            check_nothing_is_left(server, model)
    assert resident[-1] <= 1.02 * resident[-2], resident
