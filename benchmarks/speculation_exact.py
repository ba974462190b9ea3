"""The same ids with and without speculation: many prompts, each with settings drawn at random.

    python benchmarks/speculation_exact.py [--model smollm2-135m] [--prompts 200] [--tokens 128] [--draft DIR]

Each prompt draws a drafter (n-gram, a draft model, a scripted one that is right at random), a window of 1…8,
greedy or seeded sampling, a repetition penalty or none, keys and values in 16 or 8 bits, and H2O under a
budget that the answer outgrows, or no eviction. The default draft model is a part of the demo model's own
layers. Exits 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

import tinychat
from tinychat.base.events import TextDelta
from tinychat.engine.eviction import EvictionPolicy
from tinychat.engine.speculation import Draft
from tinychat.engine.speculation.control import Controller
from tinychat.engine.speculation.lookup import PromptLookup
from tinychat.engine.speculation.speculator import Speculator

STEMS = [
    "Explain {} to a child.",
    "Write a Python function about {}.",
    "List ten facts about {}.",
    "Translate '{}' into French, German and Spanish.",
    "Repeat this five times: {}, {}, {}.",
    "Écris un court texte sur {}.",
    "用中文介绍一下{}。",
    "Напиши о теме: {}.",
    "def parse_{}(text):\n    ",
    "Compare {} and bread in a Markdown table.",
]
TOPICS = [
    "the moon",
    "rivers",
    "sorting algorithms",
    "tea",
    "gravity",
    "prime numbers",
    "bicycles",
    "cats",
    "JSON",
    "volcanoes",
    "chess",
    "the French Revolution",
    "photosynthesis",
    "Tokyo",
    "recursion",
    "honey",
    "glaciers",
    "jazz",
    "magnets",
    "the alphabet",
]


class Scripted:
    """Knows the answer and is right with a given chance."""

    name, slow = "scripted", False

    def __init__(self, truth: list[int], n_prompt: int, right: float, seed: int):
        self.truth, self.n_prompt, self.right = truth, n_prompt, right
        self.rng = np.random.default_rng(seed)

    def begin(self, context, branch):
        """Nothing to prepare."""

    def propose(self, context, k, params, seed, guide=None):
        """The next k tokens of the truth, some replaced."""
        at = len(context) - self.n_prompt
        return Draft(
            [t if self.rng.random() < self.right else (t + 1) % 1000 for t in self.truth[at : at + k]]
        )


def answer(model, ids: list[int], params, policy, speculator: Speculator | None):
    """(ids, stats) of one answer."""
    branch = model.engine.branch(policy)
    out, done = [], None
    for event in model.engine.generate(branch, ids, params, speculator=speculator):
        if isinstance(event, TextDelta) and event.token_id is not None:
            out.append(event.token_id)
        done = event
    branch.free()
    return out, done.stats


def main() -> None:
    """Run, print one JSON line, exit 1 on a difference."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--prompts", type=int, default=200)
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--draft", default="layers:0-23,28-29", help="the draft model")
    o = p.parse_args()
    rng = np.random.default_rng(o.seed)
    models = [tinychat.load(o.model, draft="none", kv_bits=bits) for bits in (16, 8)]
    drafters = [m.speculator(o.draft).drafter for m in models]
    if drafters[0] is None:
        sys.exit(f"{o.draft} does not draft for {o.model}.")
    different, drafted, accepted, evicted, began = [], 0, 0, 0, time.time()
    for i in range(o.prompts):
        stem, topic = STEMS[i % len(STEMS)], TOPICS[int(rng.integers(len(TOPICS)))]
        which = int(rng.integers(2))
        model = models[which]
        policy = EvictionPolicy.of("h2o", 112) if rng.random() < 0.5 else None
        text = model.template.render([{"role": "user", "content": stem.replace("{}", topic)}])
        ids = model.template.encode(text)
        params = model.default_sampling.but(max_tokens=o.tokens, temperature=0.0)
        if rng.random() < 0.5:
            params = params.but(temperature=float(rng.uniform(0.3, 1.2)), seed=int(rng.integers(1 << 31)))
        if rng.random() < 0.3:
            params = params.but(repeat_penalty=1.15)
        plain, _ = answer(model, ids, params, policy, None)
        kind, k = ("ngram", "scripted", "model")[int(rng.integers(3))], int(rng.integers(1, 9))
        if kind == "ngram":
            drafter = PromptLookup()
        elif kind == "scripted":
            drafter = Scripted(plain, len(ids), float(rng.uniform(0.3, 1.0)), i)
        else:
            drafter = drafters[which]
        got, stats = answer(model, ids, params, policy, Speculator(drafter, Controller(fixed=k)))
        drafted, accepted = drafted + stats.drafted_tokens, accepted + stats.accepted_tokens
        evicted += stats.evicted_tokens
        if got != plain:
            different.append(
                {
                    "prompt": stem.replace("{}", topic),
                    "drafter": kind,
                    "k": k,
                    "kv_bits": (16, 8)[which],
                    "h2o": policy is not None,
                }
            )
    print(
        json.dumps(
            {
                "model": o.model,
                "prompts": o.prompts,
                "tokens": o.tokens,
                "different": different,
                "drafted_tokens": drafted,
                "accepted_tokens": accepted,
                "evicted_tokens": evicted,
                "seconds": round(time.time() - began, 1),
            }
        )
    )
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
