"""Which layers of a model draft best for it: a greedy search that drops the least missed layer each time.

    python benchmarks/draft_layers.py [--model smollm2-135m] [--keep 8] [--tokens 256]

Text: answers that the model itself gives. Score: the share of positions where the argmax is the same.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

import tinychat
from tinychat.backends.interface import BLOCK, Step

PROMPTS = (
    "Explain how a bicycle works.",
    "Write a Python function that counts words in a file.",
    "List five facts about the moon.",
    "What should I cook tonight?",
)


def main() -> None:
    """Search and print the best subset of each size."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--keep", type=int, default=8)
    p.add_argument("--tokens", type=int, default=256)
    o = p.parse_args()
    ids: list[int] = []
    with tinychat.load(o.model, draft="none") as m:
        for prompt in PROMPTS:
            session = m.session(temperature=0.7, seed=1, max_tokens=o.tokens // len(PROMPTS))
            for _ in session.send(prompt):
                pass
            answer = session.nodes[-1]
            ids += answer.prompt_ids + answer.ids
    model = tinychat.load(o.model, device="reference")
    backend, whole = model.backend, model.backend.weights
    n_blocks = -(-len(ids) // BLOCK)
    backend.allocate_kv(n_blocks)
    step = Step.of(np.asarray(ids, np.int32), 0, 0, np.arange(n_blocks, dtype=np.int32), 0)

    def argmax(layers: list[int]) -> np.ndarray:
        backend.weights = replace(whole, blocks=[whole.blocks[i] for i in layers])
        return backend.step_greedy(step)

    kept = list(range(model.config.n_layers))
    truth = argmax(kept)
    while len(kept) > o.keep:
        scores = {i: float((argmax([j for j in kept if j != i]) == truth).mean()) for i in kept}
        dropped = max(scores, key=scores.get)
        kept.remove(dropped)
        print(
            f"{len(kept)} layers  agree {scores[dropped]:.3f}  layers:{','.join(map(str, kept))}", flush=True
        )


if __name__ == "__main__":
    main()
