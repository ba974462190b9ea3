"""Answers with drafts by the layer that predicts further, and without."""

from __future__ import annotations

import numpy as np

from tinychat.engine.eviction import EvictionPolicy
from tinychat.engine.speculation.control import Controller
from tinychat.engine.speculation.further import FurtherLayer
from tinychat.engine.speculation.speculator import Speculator


def answer(model, prompt, policy=None, drafts=None, **params):
    """(ids, statistics) of an answer on a branch of its own."""
    speculator = Speculator(FurtherLayer(model.engine), Controller(drafts)) if drafts else None
    branch = model.engine.branch(policy)
    params = model.default_sampling.but(max_tokens=40, **params)
    *_, done = model.engine.generate(branch, prompt, params, speculator=speculator)
    branch.free()
    return done.completion.token_ids, done.stats


def same_text(model, prompts: int, seed: int = 0) -> tuple[int, int, int]:
    """Random prompts, windows, settings and policies; tokens drafted, accepted and given up."""
    rng, drafted, accepted, evicted = np.random.default_rng(seed), 0, 0, 0
    for i in range(prompts):
        prompt = rng.integers(0, 256, int(rng.integers(1, 100))).tolist()
        params = dict(temperature=0.0)
        if i % 2:
            params = dict(temperature=float(rng.uniform(0.3, 1.2)), seed=int(rng.integers(1 << 31)))
        if rng.random() < 0.3:
            params["repeat_penalty"] = 1.15
        policy = EvictionPolicy.of("h2o", 112) if rng.random() < 0.4 else None
        plain, _ = answer(model, prompt, policy, **params)
        ours, stats = answer(model, prompt, policy, drafts=int(rng.integers(1, 9)), **params)
        assert ours == plain
        drafted, accepted = drafted + stats.drafted_tokens, accepted + stats.accepted_tokens
        evicted += stats.evicted_tokens
    return drafted, accepted, evicted
