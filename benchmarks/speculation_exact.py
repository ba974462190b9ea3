"""The same ids with and without speculation: many prompts, each with settings drawn at random.

    python benchmarks/speculation_exact.py [--model smollm2-135m] [--prompts 200] [--tokens 128] [--draft DIR]

Each prompt draws a drafter (n-gram, a draft model if one is given, a scripted one that is right at random), a
window of 1…8, greedy or seeded sampling, with and without a repetition penalty. Exits 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

import tinychat
from tinychat.events import TextDelta
from tinychat.speculation import Draft
from tinychat.speculation.control import Controller
from tinychat.speculation.draft_model import DraftModel
from tinychat.speculation.lookup import PromptLookup
from tinychat.speculation.speculator import Speculator

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

    name = "scripted"

    def __init__(self, truth: list[int], n_prompt: int, right: float, seed: int):
        self.truth, self.n_prompt, self.right = truth, n_prompt, right
        self.rng = np.random.default_rng(seed)

    def begin(self, context):
        """Nothing to prepare."""

    def propose(self, context, k, params, seed):
        """The next k tokens of the truth, some replaced."""
        at = len(context) - self.n_prompt
        return Draft(
            [t if self.rng.random() < self.right else (t + 1) % 1000 for t in self.truth[at : at + k]]
        )


def answer(model, ids: list[int], params, speculator: Speculator | None):
    """(ids, stats) of one answer, on an empty cache half of the time."""
    branch = model.engine.branch()
    out, done = [], None
    for event in model.engine.generate(branch, ids, params, speculator=speculator):
        if isinstance(event, TextDelta):
            if event.token_id is not None:
                out.append(event.token_id)
        else:
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
    p.add_argument("--draft", help="a draft model to draw too")
    o = p.parse_args()
    rng = np.random.default_rng(o.seed)
    model = tinychat.load(o.model, draft="none")
    drafts = ["ngram", "scripted"] + ([o.draft] if o.draft else [])
    other = tinychat.load(o.draft, draft="none") if o.draft else None
    different, drafted, accepted, began = [], 0, 0, time.time()
    for i in range(o.prompts):
        stem, topic = STEMS[i % len(STEMS)], TOPICS[int(rng.integers(len(TOPICS)))]
        text = model.template.render([{"role": "user", "content": stem.replace("{}", topic)}])
        ids = model.template.encode(text)
        params = model.default_sampling.but(max_tokens=o.tokens, temperature=0.0)
        if rng.random() < 0.5:
            params = params.but(temperature=float(rng.uniform(0.3, 1.2)), seed=int(rng.integers(1 << 31)))
        if rng.random() < 0.3:
            params = params.but(repeat_penalty=1.15)
        plain, _ = answer(model, ids, params, None)
        kind, k = drafts[int(rng.integers(len(drafts)))], int(rng.integers(1, 9))
        if kind == "ngram":
            drafter = PromptLookup()
        elif kind == "scripted":
            drafter = Scripted(plain, len(ids), float(rng.uniform(0.3, 1.0)), i)
        else:
            drafter = DraftModel(other.engine, kind)
        got, stats = answer(model, ids, params, Speculator(drafter, Controller(fixed=k)))
        drafted, accepted = drafted + stats.drafted_tokens, accepted + stats.accepted_tokens
        if got != plain:
            different.append({"prompt": stem.replace("{}", topic), "drafter": kind, "k": k})
    print(
        json.dumps(
            {
                "model": o.model,
                "prompts": o.prompts,
                "tokens": o.tokens,
                "different": different,
                "drafted_tokens": drafted,
                "accepted_tokens": accepted,
                "seconds": round(time.time() - began, 1),
            }
        )
    )
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
