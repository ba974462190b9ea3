"""What speculation samples against the target's exact distribution: chi-square over the first two tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tiny import byte_tokenizer

from tinychat.backends.interface import MemorySpec
from tinychat.base.events import TextDelta
from tinychat.engine.engine import Engine
from tinychat.engine.penalties import Penalties
from tinychat.engine.sampling import SamplingParams, candidates
from tinychat.engine.speculation import Draft, acceptance
from tinychat.engine.speculation.control import Controller
from tinychat.engine.speculation.speculator import Speculator

VOCABULARY = 24
PROMPT = [3, 7]


class TableBackend:
    """A target whose logits depend on the last token only: its exact distribution can be written down."""

    name, row_independent, max_rows, max_spans = "table", True, 16, 8
    memories = (MemorySpec("paged", (0,), 1, 1),)
    step_largest = None

    def __init__(self):
        self.table = np.random.default_rng(2).normal(0, 1.5, (VOCABULARY, VOCABULARY)).astype(np.float32)

    def describe(self):
        return {"backend": self.name}

    def kv_bytes_per_block(self, memory=0):
        return 1

    def kv_heads(self, memory=0):
        return 1, 1

    def allocate_kv(self, n_blocks, memory=0):
        pass

    def copy_block(self, src, dst, memory=0):
        pass

    def step(self, step):
        return np.concatenate([self.table[s.token_ids[s.logits_from :]] for s in step.spans])

    def step_greedy(self, step):
        return self.step(step).argmax(axis=1).astype(np.int32)

    def close(self):
        pass


class TableDrafter:
    """Draws from its own table: the target's and a little noise (good), a lot (bad), or always its best."""

    name, slow = "table", False

    def __init__(self, target: np.ndarray, kind: str):
        rng = np.random.default_rng(9)
        self.kind, self.rng = kind, np.random.default_rng(1)
        noise = 0.3 if kind == "good" else 3.0
        self.table = (target + rng.normal(0, noise, target.shape)).astype(np.float32)

    def begin(self, context, branch):
        pass

    def propose(self, context, k, params, seed, guide=None):
        draft, last = Draft([]), context[-1]
        for _ in range(k):
            ids, p = candidates(self.table[last], params.without_penalties())
            if self.kind == "one-hot":
                ids, p = ids[:1], np.ones(1)
            last = int(self.rng.choice(ids, p=p))
            draft.tokens.append(last)
            draft.distributions.append((ids, p))
        return draft


def exact(table: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the first and of the second new token."""
    first, second = np.zeros(VOCABULARY), np.zeros(VOCABULARY)
    ids, p = candidates(row := table[PROMPT[-1]], params, Penalties.of(params, row, PROMPT, (), len(PROMPT)))
    for i, pi in zip(ids, p, strict=True):
        first[i] += pi
        ids2, p2 = candidates(row := table[i], params, Penalties.of(params, row, PROMPT, [i], len(PROMPT)))
        second[ids2] += pi * p2
    return first, second


def chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    """p-value; bins of expected count below 5 are merged. Anything where nothing can be gives 0."""
    import torch

    if counts[expected == 0].sum():
        return 0.0
    big = expected >= 5
    c = np.append(counts[big], counts[~big].sum())
    e = np.append(expected[big], expected[~big].sum())
    if e[-1] < 5:
        c, e = np.append(c[:-2], c[-2:].sum()), np.append(e[:-2], e[-2:].sum())
    statistic, freedom = ((c - e) ** 2 / e).sum(), len(c) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2.0)))


def p_values(rule: str, kind: str, params: SamplingParams, draws: int) -> list[float]:
    """p-values of both tokens over `draws` answers with different seeds."""
    backend = TableBackend()
    engine = Engine(backend, byte_tokenizer(), 64)
    speculator = Speculator(TableDrafter(backend.table, kind), Controller(fixed=2), rule)
    branch = engine.branch()
    counts = np.zeros((2, VOCABULARY))
    for seed in range(draws):
        events = engine.generate(branch, PROMPT, params.but(seed=seed), speculator=speculator)
        tokens = [e.token_id for e in events if isinstance(e, TextDelta) and e.token_id is not None]
        counts[0, tokens[0]] += 1
        counts[1, tokens[1]] += 1
    return [chi_square_p(c, e * draws) for c, e in zip(counts, exact(backend.table, params), strict=True)]


PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=3)
SETTINGS = {
    "plain": PLAIN,
    "top-p": PLAIN.but(top_p=0.9),
    "top-k": PLAIN.but(top_k=10),
    "min-p": PLAIN.but(min_p=0.1),
    "penalty": PLAIN.but(repeat_penalty=1.5, presence_penalty=0.5, logit_bias={1: 2}),
}
CASES = list(itertools.product(("coupled", "rejection"), ("good", "bad", "one-hot"), SETTINGS))


@pytest.mark.parametrize(
    ("rule", "kind", "setting"),
    [("coupled", "bad", "top-p"), ("rejection", "bad", "penalty"), ("rejection", "good", "plain")],
)
def test_the_first_two_tokens_have_the_targets_distribution(rule, kind, setting):
    assert min(p_values(rule, kind, SETTINGS[setting], 4000)) > 0.01 / 6


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "kind", "setting"), CASES)
def test_the_first_two_tokens_have_the_targets_distribution_in_every_case(rule, kind, setting):
    assert min(p_values(rule, kind, SETTINGS[setting], 20_000)) > 0.01 / (2 * len(CASES))


def test_a_residual_that_is_not_taken_is_noticed(monkeypatch):
    """The planted bug: after a rejection, draw from p instead of max(0, p − q)."""
    from tinychat.engine import generation

    def broken(logits, drafted, q, params, seed, position, penalties):
        token = acceptance.rejection(logits, drafted, q, params, seed, position, penalties)
        if token == drafted:
            return token
        ids, p = candidates(logits, params, penalties)
        return int(np.random.default_rng(seed * 1000 + position).choice(ids, p=p))

    monkeypatch.setattr(generation, "rejection", broken)
    assert min(p_values("rejection", "bad", PLAIN, 4000)) < 1e-6
