"""Many clients of every kind at once: no error, nothing is left behind, memory stays flat."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections import Counter
from contextlib import suppress
from typing import Protocol

import psutil
import pytest
from serving import Served, post, serving, started
from tiny import tiny_folder, tiny_model

from tinychat.serve.limits import Limits

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


class Place(Protocol):
    """Where a server is."""

    port: int

    def raw(self, data: bytes = b"") -> socket.socket: ...


def visit(server: Place, rng: random.Random, seen: Counter, depth: int = 0) -> None:
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


def visits(server: Place, clients: int, requests: int, seed: int) -> Counter:
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
    return seen


def crowd(server: Served, clients: int, requests: int, seed: int) -> Counter:
    """The same, until the server is idle again."""
    seen = visits(server, clients, requests, seed)
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
def test_ten_thousand_requests_of_32_clients_leave_memory_flat(tmp_path, monkeypatch):
    """The server is a process of its own, so that its memory is nobody else's. -s shows the figures."""
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    folder = tiny_folder(tmp_path / "tiny", context_length=1024)
    resident, seen = {}, Counter()
    with started("serve", folder, "--port", "0", "--ctx", "1024") as server:
        process = psutil.Process(server.pid)
        for i in range(1, 11):
            seen += visits(server, 32, 1000, seed=i)
            resident[i] = process.memory_info().rss / 1e6
            print(f"{i},000 requests: {resident[i]:.1f} MB, {process.num_threads()} threads", flush=True)
    assert not seen.keys() & {500, 503}, seen
    assert seen[200] > 2000, seen
    assert resident[10] <= 1.02 * resident[5], resident  # what is remembered of conversations is full by then
