"""Speculation against its theory: random-weight shapes, a scripted acceptance α, windows of k drafts.

    python benchmarks/speculation.py [--target llama-2-7b --draft qwen2.5-0.5b] [--tokens 64] [--markdown
    OUT.md]

The draft model really runs (its time is real); which of its tokens are right is scripted, so that α is known.
For each α and k: realised tokens a step against (1 − α^(k+1)) / (1 − α), and the measured speed-up over plain
decoding against tokens a step / (k·c + v(k)), with c (one draft step) and v(k) (a step over k + 1 rows)
measured in the same run, in units of one plain target step (Leviathan et al. 2023, theorem 3.8, with a
verification that is not free).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from tinychat.backends.interface import BLOCK, Step
from tinychat.base.load_options import LoadOptions
from tinychat.loading import make_backend
from tinychat.synthetic import SyntheticCheckpoint

ALPHAS, WINDOWS = (0.5, 0.7, 0.8, 0.9), (1, 2, 3, 4, 5, 6, 8)


class Runner:
    """A random-weight model that is stepped by hand."""

    def __init__(self, shape: str, threads: int | None, n_ctx: int):
        checkpoint = SyntheticCheckpoint(shape)
        self.vocab = checkpoint.config.vocab_size
        self.backend = make_backend(checkpoint, LoadOptions(device="cpu", threads=threads))
        n_blocks = -(-n_ctx // BLOCK)
        self.backend.allocate_kv(n_blocks)
        self.table = np.arange(n_blocks, dtype=np.int32)
        self.ids = np.random.default_rng(0).integers(0, min(self.vocab, 30000), n_ctx, dtype=np.int32)

    def step(self, at: int, rows: int) -> float:
        """Seconds of a step over `rows` rows at context `at`."""
        began = time.perf_counter()
        self.backend.step_greedy(Step.of(self.ids[at : at + rows], at, at, self.table, 0))
        return time.perf_counter() - began


def main() -> None:
    """Measure and print a Markdown table; the last line is JSON."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--target", default="llama-2-7b")
    p.add_argument("--draft", default="qwen2.5-0.5b")
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--threads", type=int)
    p.add_argument("--markdown", type=Path)
    o = p.parse_args()
    n_ctx = o.tokens + 64
    target, draft = Runner(o.target, o.threads, n_ctx), Runner(o.draft, o.threads, n_ctx)
    rng = np.random.default_rng(1)
    for r in (target, draft):
        for at in range(4):
            r.step(at, 1)  # pages in, threads up
    rows = []
    for k in WINDOWS:
        for alpha in ALPHAS:
            # Plain steps, draft steps and windows alternate, so that drift meets all of them.
            at = decided = steps = 0
            plain, single, window = [], [], []
            while decided < o.tokens:
                plain.append(target.step(at, 1))
                single += [draft.step(at + i, 1) for i in range(k)]
                window.append(target.step(at, k + 1))
                accepted = 0
                while accepted < k and rng.random() < alpha:
                    accepted += 1
                decided, steps, at = decided + accepted + 1, steps + 1, (at + accepted + 1) % o.tokens
            one = statistics.median(plain)
            c, v = statistics.median(single) / one, statistics.median(window) / one
            realised = decided / steps
            speed_up = decided * statistics.mean(plain) / (sum(single) + sum(window))
            rows.append(
                {
                    "k": k,
                    "alpha": alpha,
                    "c": c,
                    "v": v,
                    "tokens_per_step": realised,
                    "expected_tokens": (1 - alpha ** (k + 1)) / (1 - alpha),
                    "speed_up": speed_up,
                    "theory": realised / (k * c + v),
                }
            )
    lines = [
        "| k | α | c | v(k) | tokens a step (theory) | speed-up | of theory |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['k']} | {r['alpha']} | {r['c']:.3f} | {r['v']:.2f} | {r['tokens_per_step']:.2f} "
            f"({r['expected_tokens']:.2f}) | {r['speed_up']:.2f} | {r['speed_up'] / r['theory']:.2f} |"
        )
    text = "\n".join(lines)
    print(text)
    if o.markdown:
        o.markdown.write_text(text + "\n")
    print(json.dumps({"target": o.target, "draft": o.draft, "rows": rows}))


if __name__ == "__main__":
    main()
