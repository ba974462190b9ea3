"""Several answers in one batch say bit for bit what each says alone: steps composed by hand, in any order."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from tiny import tiny_model

from tinychat.backends.interface import LargestLogits
from tinychat.base.errors import CheckpointError, UsageError
from tinychat.base.events import Done, TextDelta
from tinychat.engine.eviction import EvictionPolicy
from tinychat.engine.generation import Room
from tinychat.engine.sampling import SamplingParams, best_of
from tinychat.engine.scheduler import BESIDE_SECONDS, CHUNK_SECONDS, Rows
from tinychat.engine.speculation import Draft
from tinychat.engine.speculation.control import Controller
from tinychat.engine.speculation.lookup import PromptLookup
from tinychat.engine.speculation.speculator import Speculator


class HalfRight:
    """A drafter that knows the answer and is wrong now and then."""

    name, slow = "half right", False

    def __init__(self, prompt, answer, every):
        self.start, self.answer, self.every = len(prompt), answer, every

    def begin(self, context, branch):
        pass

    def propose(self, context, k, params, seed, guide=None):
        at = len(context) - self.start
        ids = [(t + 1) % 256 if i % self.every == 0 else t for i, t in enumerate(self.answer)]
        return Draft(ids[at : at + k])


@dataclass(frozen=True)
class Conversation:
    """What is asked, and how: once or twice, the second time behind the first answer."""

    prompt: tuple[int, ...]
    params: SamplingParams
    policy: str | None = None
    drafts: str | None = None
    then: tuple[int, ...] | None = None


@dataclass
class Running:
    """One of them in a crowd."""

    conversation: Conversation
    engine: Any
    cancel: threading.Event = field(default_factory=threading.Event)
    done: list[Done] = field(default_factory=list)
    text: str = ""
    wish: Rows | Room | None = None
    going: Any = None

    def __post_init__(self):
        c = self.conversation
        self.branch = self.engine.branch(c.policy and EvictionPolicy.of(c.policy, 112))
        self.begin(list(c.prompt))

    def begin(self, prompt):
        c, speculator = self.conversation, Speculator()
        if c.drafts == "ngram":
            speculator = Speculator(PromptLookup(), Controller(3))
        elif c.drafts is not None:
            answers = said_alone(c, self.engine.backend.kv_bits)
            answer = answers[len(self.done)].token_ids if len(self.done) < len(answers) else []
            speculator = Speculator(HalfRight(prompt, answer, int(c.drafts)), Controller(int(c.drafts)))
        self.prompt = prompt
        self.going = self.engine.going(self.branch, prompt, c.params, self.cancel, speculator)
        self.go_on()

    def go_on(self):
        """To its next wish, or its end."""
        self.wish, error = None, getattr(self.wish, "error", None)
        said = self.going.throw(error) if error else next(self.going, None)
        while said is not None and not isinstance(said, (Rows, Room)):
            if isinstance(said, TextDelta):
                self.text += said.text
            if isinstance(said, Done):
                self.done.append(said)
            said = next(self.going, None)
        self.wish = said
        again = self.conversation.then
        if said is None and again is not None and len(self.done) == 1 and not self.cancel.is_set():
            self.begin([*self.prompt, *self.done[0].completion.token_ids, *again])


def step(running, rng, absent=0.0):
    """One step over those who are present; those who wait for room look whether there is some."""
    for r in running:
        if isinstance(r.wish, Room):
            with r.engine.changing():
                found = r.engine.has_room(r.branch, r.wish.n)
            if found or r.cancel.is_set():
                r.go_on()
    wishing = [r for r in running if isinstance(r.wish, Rows)]
    present = [r for r in wishing if rng.random() >= absent] or wishing[:1]
    rng.shuffle(present)
    if present:
        present[0].engine.scheduler.step([r.wish for r in present])
    for r in present:
        if r.wish.done:
            r.go_on()
    return len(present)


SETTINGS = (
    dict(temperature=0),
    dict(temperature=0, repeat_penalty=1.3, frequency_penalty=0.2),
    dict(temperature=1.2, top_k=0, top_p=0.9, min_p=0.0),
    dict(temperature=0.8, top_k=5),
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
)


def draw(rng) -> Conversation:
    policy = rng.choice([None, None, "h2o", "window"])
    n = rng.choice([1, 5, 16, 40, 70]) if policy is None else rng.choice([90, 111, 150])
    words = [rng.randrange(256) for _ in range(rng.choice([3, 256]))]  # few words: the answer repeats
    prompt = tuple(rng.choice(words) for _ in range(n))
    params = SamplingParams(
        **rng.choice(SETTINGS),
        seed=rng.randrange(1000),
        max_tokens=rng.choice([1, 4, 9, 24 if policy is None else 40]),
        stop=rng.choice([(), (), ("e",), ("\x00", "ab")]),
    )
    then = None if rng.random() < 0.6 else tuple(rng.randrange(256) for _ in range(rng.choice([1, 20])))
    return Conversation(prompt, params, policy, rng.choice([None, "ngram", "2", "5"]), then)


_alone: dict[Conversation, list[Any]] = {}
_said: dict[tuple[Conversation, int], list[Any]] = {}


def said_alone(c: Conversation, kv_bits: int = 16) -> list[Any]:
    """The completions of this conversation without drafts, on a model that nobody else uses."""
    plain = Conversation(c.prompt, c.params, c.policy, None, c.then)
    if (plain, kv_bits) not in _said:
        with tiny_model(ctx=256, backend="cpu", eos_ids=(7,), kv_bits=kv_bits) as m:
            r = Running(plain, m.engine)
            while r.wish is not None:
                step([r], random.Random(0))
            _said[plain, kv_bits] = [d.completion for d in r.done]
    return _said[plain, kv_bits]


RNG = random.Random(11)
CROWD = [draw(RNG) for _ in range(60)]


def play(model, rng, n):
    """A random schedule of n conversations: they join and leave, stay away, and are cancelled."""
    drawn = [rng.choice(CROWD) for _ in range(n)]
    joins = sorted((rng.randrange(12), i) for i in range(n))
    ends = {i: rng.randrange(1, 25) for i in range(n) if rng.random() < 0.15}
    absent, running, at, seen = rng.choice([0.0, 0.0, 0.3]), {}, 0, Counter()
    while joins or any(r.wish for r in running.values()):
        while joins and joins[0][0] <= at:
            i = joins.pop(0)[1]
            running[i] = Running(drawn[i], model.engine)
        for i, when in ends.items():
            if when == at and i in running:
                running[i].cancel.set()
        seen["waited"] += sum(isinstance(r.wish, Room) for r in running.values())
        seen["shared"] += step(list(running.values()), rng, absent) > 1
        at += 1
        assert at < 5000, "somebody never ends"
    for r in running.values():
        expected = said_alone(r.conversation, model.backend.kv_bits)
        for done, alone in zip(r.done, expected, strict=False):
            got, c = done.completion, r.conversation
            if done is not r.done[0] and c.policy and seen["waited"]:
                continue  # it may have been read again, and what its first answer attended to is lost
            if done.finish_reason == "cancelled":
                assert got.token_ids == alone.token_ids[: len(got.token_ids)]
                continue
            assert got.token_ids == alone.token_ids
            assert (got.text, got.finish_reason) == (alone.text, alone.finish_reason)
            s = done.stats
            assert s.evicted_tokens == alone.stats.evicted_tokens
            seen += Counter(evicted=s.evicted_tokens, accepted=s.accepted_tokens)
            seen["rejected"] += s.drafted_tokens - s.accepted_tokens
        assert r.cancel.is_set() or len(r.done) == len(expected)
    return seen


def play_many(seeds, n, grows, kv_bits=16):
    """grows: there is memory for all of them; else they take it from each other, and wait."""
    with tiny_model(ctx=256, backend="cpu", eos_ids=(7,), grows=grows, kv_bits=kv_bits) as m:
        seen: Counter[str] = Counter()
        for seed in seeds:
            rng = random.Random(seed)
            chunk = rng.choice([16, 32, 512])
            m.engine.scheduler.chunk_size = lambda _, chunk=chunk: chunk
            seen += play(m, rng, n)
        assert all(seen[what] > len(seeds) for what in ("shared", "accepted", "rejected", "evicted")), seen
        assert grows or seen["waited"] > len(seeds) // 2


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("n", [4, 8])
def test_conversations_in_one_batch_say_what_each_says_alone(n, grows):
    play_many(range(60), n, grows)


@pytest.mark.parametrize("grows", [True, False])
def test_the_same_with_keys_and_values_in_4_bits(grows):
    play_many(range(30), 6, grows, kv_bits=4)


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", [16, 4])
@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("n", [4, 8, 12])
def test_conversations_in_one_batch_in_many_schedules(n, grows, kv_bits):
    play_many(range(1000, 1600), n, grows, kv_bits)


# What goes wrong for one


def crowd(m, n, **sampling):
    """n answers that have said their first word, in the order in which they began."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 12, **sampling})
    running = [Running(Conversation(tuple(range(i, i + 30)), params), m.engine) for i in range(n)]
    while not all(r.text or r.wish is None for r in running):
        step(running, random.Random(0))
    return running


def run_out(running):
    while any(r.wish for r in running):
        step(running, random.Random(0))


def assert_as_alone(running):
    for r in running:
        assert [d.completion.token_ids for d in r.done] == [c.token_ids for c in said_alone(r.conversation)]


@pytest.fixture
def model():
    with tiny_model(ctx=256, backend="cpu", eos_ids=(7,)) as m:
        yield m


def test_a_step_that_one_sequence_makes_fail_fails_for_it_alone(model):
    running = crowd(model, 4)
    inner, steps = model.backend.step_greedy, []

    def fails(step):
        steps.append(len(step.spans))
        if any(span.position == poisoned for span in step.spans):
            raise RuntimeError("device lost")
        return inner(step)

    poisoned = len(running[2].branch)
    for r in (running[0], running[1], running[3]):
        while len(r.branch) <= poisoned:
            step([r], random.Random(0))
    model.backend.step_greedy = fails
    model.engine.scheduler.step([r.wish for r in running])
    assert steps == [4, 1, 1, 1, 1]
    with pytest.raises(RuntimeError, match="device lost"):
        running[2].go_on()
    model.backend.step_greedy = inner
    others = [running[i] for i in (0, 1, 3)]
    for r in others:
        r.go_on()
    run_out(others)
    assert_as_alone(others)


def test_a_choice_that_fails_for_one_answer_leaves_the_others(model):
    running = crowd(model, 3, temperature=0.8, seed=1)
    inner = model.backend.step

    def damaged(step):
        out = inner(step)
        out[1, 5] = np.nan
        return out

    model.backend.step = damaged
    model.engine.scheduler.step([r.wish for r in running])
    model.backend.step = inner
    with pytest.raises(CheckpointError, match="finite"):
        running[1].go_on()
    others = [running[0], running[2]]
    for r in others:
        r.go_on()
    run_out(others)
    assert_as_alone(others)


def test_a_closed_model_is_heard_of_by_every_answer(model):
    running = crowd(model, 3)
    model.close()
    model.engine.scheduler.step([r.wish for r in running])
    for r in running:
        with pytest.raises(UsageError, match="closed"):
            r.go_on()


def test_an_interrupted_step_is_run_again_for_those_who_still_want_it(model):
    running = crowd(model, 3)
    inner = model.backend.step_greedy

    def interrupted(step):
        inner(step)
        raise KeyboardInterrupt

    model.backend.step_greedy = interrupted
    with pytest.raises(KeyboardInterrupt):
        model.engine.scheduler.step([r.wish for r in running])
    model.backend.step_greedy = inner
    assert not any(r.wish.done for r in running)
    run_out(running)
    assert_as_alone(running)


# What a step has


def test_running_answers_come_first_and_one_prompt_has_what_is_left(model):
    running = crowd(model, 3)
    long = Conversation(tuple(range(100)), SamplingParams(temperature=0, max_tokens=1))
    prompts = [Running(long, model.engine) for _ in range(2)]
    wanted = [prompts[1].wish, *(r.wish for r in running), prompts[0].wish]
    scheduler = model.engine.scheduler
    scheduler.chunk_size = lambda beside: 32 if beside else 64
    parts = scheduler.compose(wanted)
    assert [rows for rows, _ in parts] == [*(r.wish for r in running), prompts[0].wish]  # it began first
    assert [n for _, n in parts] == [1, 1, 1, 32]
    assert scheduler.compose([wanted[0]]) == [(wanted[0], 64)]


def test_a_short_prompt_does_not_wait_for_a_long_one_which_has_every_second_step(model):
    long, short = (
        Running(Conversation(tuple(range(n)), SamplingParams(temperature=0, max_tokens=1)), model.engine)
        for n in (200, 20)
    )
    scheduler = model.engine.scheduler
    scheduler.chunk_size = lambda beside: 16
    assert [scheduler.compose([long.wish])[0][0] for _ in range(2)] == [long.wish] * 2
    both = [scheduler.compose([long.wish, short.wish])[0][0] for _ in range(4)]
    assert both == [short.wish, long.wish] * 2  # however many short ones come, the long one is read too


def test_nobody_is_left_out_where_a_step_has_little_room(model):
    running = crowd(model, 3)
    running.append(Running(Conversation(tuple(range(100)), SamplingParams(max_tokens=3)), model.engine))
    model.backend.max_rows, model.backend.max_spans = 8, 2
    wanted, turns = [r.wish for r in running], Counter()
    for _ in range(12):
        for rows, n in model.engine.scheduler.compose(wanted):
            assert 0 < n <= 8
            turns[rows] += 1
            wanted.remove(rows)
            wanted.append(rows)
    assert min(turns[r.wish] for r in running) >= 3


def test_a_chunk_beside_running_answers_is_short(model):
    scheduler = model.engine.scheduler
    assert (scheduler.chunk_size(False), scheduler.chunk_size(True)) == (64, 16)
    scheduler._rate = 1000.0
    assert scheduler.chunk_size(False) / 1000 == pytest.approx(CHUNK_SECONDS, rel=0.05)
    assert scheduler.chunk_size(True) / 1000 == pytest.approx(BESIDE_SECONDS, rel=0.1)


@pytest.mark.parametrize("largest", [False, True])
def test_each_answer_of_a_step_chooses_in_its_own_way(model, largest):
    asked = []
    if largest:

        def step_largest(step, temperature):
            asked.append(temperature)
            rows = model.backend.step(step)
            order = [np.lexsort((np.arange(len(row)), -row))[:50] for row in rows]
            return [
                LargestLogits(ids, row[ids], len(row), 0.0, lambda row=row: row)
                for ids, row in zip(order, rows, strict=True)
            ]

        model.backend.step_largest = step_largest
    ways = [SamplingParams(**way, seed=3, max_tokens=20) for way in SETTINGS[:4]]
    running = [Running(Conversation(tuple(range(40)), way), model.engine) for way in ways]
    run_out(running)
    assert_as_alone(running)
    assert (len(asked) > 10) is largest
    everything = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=3, max_tokens=20)
    running = [Running(Conversation(tuple(range(40)), way), model.engine) for way in (ways[0], everything)]
    while not all(r.wish.logits_from == 0 for r in running):
        step(running, random.Random(0))
    n = len(asked)
    step(running, random.Random(0))
    assert len(asked) == n  # one of them may draw anything
    run_out(running)
    assert_as_alone(running)


def test_the_best_of_a_row_is_what_a_greedy_step_gives():
    row = np.array([0, 5, 5, 1], np.float32)
    order = np.array([1, 2, 3, 0])
    assert best_of(row) == best_of(LargestLogits(order, row[order], 4, 0.0, lambda: row)) == 1
    assert best_of(LargestLogits(order[:0], row[:0], 4, 0.0, lambda: row)) == 1
    for bad in (np.nan, np.inf, -np.inf):
        row[3] = bad
        assert best_of(row) == -1
    assert best_of(LargestLogits(order, np.array([np.nan, 5, 5, 0]), 4, 0.0, lambda: row)) == -1
