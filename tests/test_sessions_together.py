"""Several conversations of one model at once: the pool grows with memory, and where it cannot, they wait."""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import zip_longest

import numpy as np
import pytest
from tiny import tiny_model

from tinychat.base.errors import UsageError
from tinychat.base.events import Done
from tinychat.engine.engine import FORK_SECONDS

TALK = dict(temperature=0, kv_policy="none")


def talk(model, i, **settings):
    """(why it ended, tokens in the context) of a conversation that fills it."""
    *_, done = model.session(**TALK, **settings).send(f"A story about whale number {i}.")
    return done.finish_reason, done.stats.prompt_tokens + done.stats.generated_tokens, done.completion.text


def at_once(n, work):
    """What n threads return, or raise."""
    out = [None] * n

    def run(i):
        try:
            out[i] = work(i)
        except BaseException as e:
            out[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(100)
    return out


@pytest.fixture(scope="module")
def alone():
    with tiny_model(ctx=96, backend="cpu", eos_ids=()) as m:
        return [talk(m, i) for i in range(3)]


def test_each_conversation_fills_its_own_context(alone):
    with tiny_model(ctx=96, backend="cpu", eos_ids=()) as m:
        assert at_once(3, lambda i: talk(m, i)) == alone
        assert all(reason == "context_full" and n == 97 for reason, n, _ in alone)


def test_where_memory_is_full_an_answer_waits_for_another(alone):
    with tiny_model(ctx=96, backend="cpu", eos_ids=(), grows=False) as m:
        n_blocks = m.engine.memories.pools[0].n_blocks
        assert at_once(3, lambda i: talk(m, i)) == alone
        assert m.engine.memories.pools[0].n_blocks == n_blocks


def test_a_waiting_answer_can_be_cancelled(monkeypatch):
    monkeypatch.setattr("tinychat.engine.engine.PATIENCE_SECONDS", 1e9)
    with tiny_model(ctx=96, backend="cpu", eos_ids=(), grows=False) as m:
        first, second = m.session(**TALK), m.session(**TALK)
        parked = first.send("x" * 50)
        next(parked)
        waiting = threading.Event()
        inner = m.engine.wait_for_room

        def wait(*args):
            waiting.set()
            return inner(*args)

        m.engine.wait_for_room = wait
        got = []
        thread = threading.Thread(target=lambda: got.extend(second.send("y" * 50)))
        thread.start()
        assert waiting.wait(60)
        second.cancel()
        thread.join(60)
        assert [e.finish_reason for e in got if isinstance(e, Done)] == ["cancelled"]
        assert (
            list(parked)[-1].finish_reason == "context_full"
        )  # and the first goes on as if nothing had been


def test_an_answer_with_votes_gives_way_and_goes_on_bit_for_bit(monkeypatch):
    """Answers in one thread, in turns: each takes the memory from the other again and again."""
    monkeypatch.setattr("tinychat.engine.engine.PATIENCE_SECONDS", 0.0)
    settings = dict(temperature=0, max_tokens=90, kv_budget=112)
    with tiny_model(ctx=112, backend="cpu", eos_ids=()) as m:
        expected = [list(m.session(**settings).send(c * 40))[-1].completion.token_ids for c in "ab"]
    with tiny_model(ctx=112, backend="cpu", eos_ids=(), grows=False) as m:
        streams = [m.session(**settings).send(c * 40) for c in "ab"]
        done = [None, None]
        while not all(done):
            for i, stream in enumerate(streams):
                for _, event in zip(range(30), stream, strict=False):
                    done[i] = event if isinstance(event, Done) else done[i]
    assert [d.completion.token_ids for d in done] == expected
    assert all(d.stats.evicted_tokens for d in done)


def test_idle_conversations_keep_their_cache_while_memory_is_plentiful_and_give_it_when_not():
    with tiny_model(ctx=128, backend="cpu", eos_ids=()) as m:
        sessions = [m.session(**TALK, max_tokens=20) for _ in range(6)]
        for i, s in enumerate(sessions):
            list(s.send(f"{i}" * 60))
        grown = m.engine.memories.pools[0].n_blocks
        assert grown > 10
        *_, done = sessions[0].send("m")
        assert done.stats.cached_tokens > 90  # its own, still there
        assert done.stats.kv_bytes == m.engine.memories.pools[0].used * m.backend.kv_bytes_per_block()
        m.engine.memories.more_bytes = lambda: 0
        more = [m.session(**TALK, max_tokens=20) for _ in range(12)]
        for i, s in enumerate(more):
            list(s.send(f"{i + 10}" * 30))
        assert m.engine.memories.pools[0].n_blocks == grown
        *_, done = sessions[1].send("m")
        assert done.stats.cached_tokens < 64
        assert done.stats.generated_tokens > 0


def test_growing_takes_no_more_memory_than_there_is(alone):
    with tiny_model(ctx=96, backend="cpu", eos_ids=()) as m:
        few = m.engine.memories.pools[0].n_blocks
        size = m.backend.kv_bytes_per_block()
        m.engine.memories.more_bytes = lambda: (5 - (m.engine.memories.pools[0].n_blocks - few)) * size
        streams = [m.session(**TALK).send(f"A story about whale number {i}.") for i in range(2)]
        pairs = list(zip_longest(*streams))
        done = [[e for e in events if e][-1] for events in zip(*pairs, strict=True)]
        assert [d.completion.text for d in done] == [text for *_, text in alone[:2]]
        assert m.engine.memories.pools[0].n_blocks == few + 5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_pool_that_grows_keeps_what_it_holds(backend):
    with tiny_model(ctx=64, backend=backend) as m:
        b, size = m.backend, m.backend.kv_bytes_per_block()
        data = np.random.default_rng(0).integers(0, 60, (6, size), np.uint8)  # no NaN in any format
        table = np.arange(6, dtype=np.int32)
        b.write_blocks(table, data)
        b.allocate_kv(50)
        np.testing.assert_array_equal(b.read_blocks(table), data)
        b.write_blocks(table + 44, data)
        np.testing.assert_array_equal(b.read_blocks(table + 44), data)


def in_a_child(work, seconds=60):
    """The exit code of a forked process that runs `work`; None if it hangs."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_child_forked_while_another_thread_answers_works_or_says_why_not(backend):
    with tiny_model(ctx=256, backend=backend, eos_ids=()) as m:
        expected = list(m.session(**TALK, max_tokens=5).send("hi"))[-1].completion.text
        busy, stop = threading.Event(), threading.Event()
        session = m.session(temperature=0, max_tokens=100_000)

        def talk():
            for _ in session.send("on and on"):
                busy.set()
                m.logits(list(range(250)))  # long steps: the fork comes in the middle of one
                if stop.is_set():
                    session.cancel()

        thread = threading.Thread(target=talk)
        thread.start()
        assert busy.wait(60)

        def child():
            try:
                text = list(m.session(**TALK, max_tokens=5).send("hi"))[-1].completion.text
                return 0 if text == expected else 2
            except UsageError as e:
                return 3 if "forked" in e.what else 4

        codes = [in_a_child(child) for _ in range(5)]
        stop.set()
        thread.join(60)
        assert codes == [0 if m.backend.name == "cpu" else 3] * 5


def test_a_fork_waits_for_no_lock_that_it_has():
    """A model and a draft of its own layers have one tokenizer, as checkpoints on disk give it."""
    with tiny_model(backend="cpu") as m:
        m.checkpoint.tokenizer = lambda: m.tokenizer
        assert m.speculator("layers:0").drafter.engine.tokenizer is m.tokenizer
        began = time.monotonic()
        assert in_a_child(lambda: 0) == 0
        assert time.monotonic() - began < FORK_SECONDS
        assert m.engine.tokenizer.lock.acquire(blocking=False)
