"""Threads that ask for answers of one model share its steps, and nobody waits for one who does not come."""

from __future__ import annotations

import threading
import time

import pytest
from tiny import tiny_model

from tinychat.base.events import Done, TextDelta
from tinychat.bench import measure_together
from tinychat.engine import scheduler as module
from tinychat.engine.sampling import SamplingParams
from tinychat.engine.scheduler import Rows, Scheduler

PARAMS = SamplingParams(temperature=0, max_tokens=40)
PROMPTS = [[i, *range(40)] for i in range(4)]


@pytest.fixture
def model():
    with tiny_model(ctx=256, backend="cpu", eos_ids=()) as m:
        yield m


@pytest.fixture
def ready(model, monkeypatch):
    """Where four threads wait for each other. The next step begins when all of them want something, and from
    then on those who come back are waited for, however busy the machine is.
    """
    scheduler = model.engine.scheduler
    inner, found = scheduler._gather, []

    def gather():
        while not found and len(scheduler._wanted) < 4:
            time.sleep(0)
        found.append(None)
        inner()

    def begin():
        monkeypatch.setattr(module, "RETURN_SECONDS", 60.0)
        monkeypatch.setattr(scheduler, "_gather", gather)

    return threading.Barrier(4, begin)


@pytest.fixture(scope="module")
def alone():
    with tiny_model(ctx=256, backend="cpu", eos_ids=()) as m:
        return [list(m.engine.generate(m.engine.branch(), p, PARAMS))[-1].completion for p in PROMPTS]


def spans_of(monkeypatch):
    """How many sequences each step has had."""
    seen, inner = [], Scheduler._timed

    def timed(self, parts):
        seen.append(len(parts))
        inner(self, parts)

    monkeypatch.setattr(Scheduler, "_timed", timed)
    return seen


def at_once(work, n):
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads)


def test_answers_of_several_threads_share_steps(model, ready, alone, monkeypatch):
    seen, got = spans_of(monkeypatch), {}

    def work(i):
        stream = model.engine.generate(model.engine.branch(), PROMPTS[i], PARAMS)
        next(e for e in stream if isinstance(e, TextDelta))
        ready.wait(60)
        *_, got[i] = stream

    at_once(work, 4)
    assert [got[i].completion.token_ids for i in range(4)] == [c.token_ids for c in alone]
    assert [n for n in seen if n > 1] == [4] * 39  # the first token came with the prompt
    assert sum(seen) == 4 * 40


def test_chats_of_several_threads_say_what_they_say_alone(model):
    messages = [[{"role": "user", "content": text}] for text in ("hi", "who are you?", "x" * 50, "bye")]
    settings = dict(seed=5, max_tokens=25)
    expected, got = [model.chat(m, **settings).text for m in messages], {}

    def work(i):
        got[i] = model.chat(messages[i], **settings).text

    at_once(work, 4)
    assert [got[i] for i in range(4)] == expected


def test_draft_models_draft_for_several_threads(model, alone):
    got, speculators = {}, [model.speculator("layers:0") for _ in PROMPTS]

    def work(i):
        s = speculators[i]
        s.controller.fixed = 3
        *_, got[i] = model.engine.generate(model.engine.branch(), PROMPTS[i], PARAMS, speculator=s)

    at_once(work, 4)
    assert [got[i].completion.token_ids for i in range(4)] == [c.token_ids for c in alone]
    assert all(d.stats.drafted_tokens > 20 for d in got.values())


def test_bench_has_all_answers_decode_together(model, monkeypatch):
    seen, due, inner = spans_of(monkeypatch), [], Scheduler._gather

    class Ready(threading.Barrier):
        """When all have begun, the next step begins when all want something, however busy the machine is."""

        def __init__(self, parties, action):
            def begin():
                action()
                due.append(parties)

            super().__init__(parties, begin)

    def gather(scheduler):
        while due and len(scheduler._wanted) < due[0]:
            time.sleep(0)
        due.clear()
        inner(scheduler)

    monkeypatch.setattr(Scheduler, "_gather", gather)
    monkeypatch.setattr(threading, "Barrier", Ready)
    rows = measure_together(model.backend, model.tokenizer, 258, (4,), 30, 1)
    assert [row["sequences"] for row in rows] == [1, 4]
    assert all(row["tok_s"] > 0 for row in rows)
    assert max(seen) == 4


def test_a_thread_that_is_interrupted_while_it_leads_leaves_the_others_their_answers(model, ready, alone):
    inner, got, interrupted = model.backend.step_greedy, {}, []

    def step_greedy(step):
        if len(step.spans) == 4 and not interrupted:  # the first that they share
            interrupted.append(threading.get_ident())
            raise KeyboardInterrupt
        return inner(step)

    model.backend.step_greedy = step_greedy

    def work(i):
        stream = model.engine.generate(model.engine.branch(), PROMPTS[i], PARAMS)
        next(e for e in stream if isinstance(e, TextDelta))
        ready.wait(60)
        try:
            *_, got[i] = stream
        except KeyboardInterrupt:
            got[i] = threading.get_ident()

    at_once(work, 4)
    (stopped,) = [i for i in range(4) if got[i] in interrupted]
    for i in {0, 1, 2, 3} - {stopped}:
        assert got[i].completion.token_ids == alone[i].token_ids


def test_an_answer_that_nobody_reads_on_holds_nobody_up(model, alone, monkeypatch):
    """In one thread, which is never waited for by itself, and of a thread that does something else."""
    streams = [model.engine.generate(model.engine.branch(), p, PARAMS) for p in PROMPTS[:2]]
    waits = []
    inner = threading.Event.wait

    def wait(event, timeout=None):
        waits.append(timeout)
        return inner(event, 0 if event is model.engine.scheduler._arrived else timeout)

    monkeypatch.setattr(threading.Event, "wait", wait)
    done = [None, None]
    while not all(done):
        for i, stream in enumerate(streams):
            event = next(stream, None)
            done[i] = event if isinstance(event, Done) else done[i]
    assert [d.completion.token_ids for d in done] == [c.token_ids for c in alone[:2]]
    assert waits == []
    parked = model.engine.generate(model.engine.branch(), PROMPTS[2], PARAMS)
    at_once(lambda _: [next(parked) for _ in range(3)], 1)
    waits.clear()
    *_, last = model.engine.generate(model.engine.branch(), PROMPTS[3], PARAMS)
    assert last.completion.token_ids == alone[3].token_ids
    assert len(waits) == 1  # then it is not expected any more
    *_, last = parked
    assert last.completion.token_ids == alone[2].token_ids


def test_an_answer_that_ends_is_not_waited_for(model):
    streams = [model.engine.generate(model.engine.branch(), p, PARAMS) for p in PROMPTS]
    for stream in streams:  # each of which is kept, in a thread of its own
        at_once(lambda _, s=stream: next(e for e in s if isinstance(e, Done)), 1)
        assert not model.engine.scheduler._due


def waiting_for(scheduler, rows):
    """A thread that waits for its rows, while another (this one) leads."""
    thread = threading.Thread(target=scheduler.run, args=(rows,), daemon=True)
    thread.start()
    while rows not in scheduler._wanted:
        time.sleep(0)
    assert not rows.done
    return thread


def test_a_prompt_that_waits_for_others_can_be_cancelled(model, monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.001)
    scheduler, branch = model.engine.scheduler, model.engine.branch()
    rows = Rows(branch, PROMPTS[0], len(PROMPTS[0]), prompt=True, cancel=threading.Event())
    with scheduler._leading:
        waiting = waiting_for(scheduler, rows)
        rows.cancel.set()
        waiting.join(60)
        assert not waiting.is_alive()
    assert (rows.ran, len(branch), scheduler._wanted) == (0, 0, [])


def test_a_step_that_was_missed_is_led_by_who_waits(model, monkeypatch):
    """However the thread that led has ended, those who wait look for themselves."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.001)
    scheduler, branch = model.engine.scheduler, model.engine.branch()
    rows = Rows(branch, PROMPTS[0], len(PROMPTS[0]), prompt=True)
    with scheduler._leading:
        waiting = waiting_for(scheduler, rows)
    waiting.join(60)  # nobody has woken it
    assert rows.done
    assert len(branch) == len(PROMPTS[0])


def test_rows_that_an_interrupted_answer_left_behind_are_not_run_beside_those_of_the_next(model, alone):
    scheduler, branch = model.engine.scheduler, model.engine.branch()
    left = Rows(branch, PROMPTS[0], len(PROMPTS[0]), prompt=True, held=0)
    scheduler._wanted.append(left)
    *_, done = model.engine.generate(branch, PROMPTS[0], PARAMS)
    assert done.completion.token_ids == alone[0].token_ids
    assert (left.done, scheduler._wanted) == (False, [])
