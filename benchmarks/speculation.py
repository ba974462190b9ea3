"""Speculation against its theory: random-weight shapes, a scripted acceptance α, windows of k drafts.

    python benchmarks/speculation.py [--target llama-2-7b --draft qwen2.5-0.5b] [--tokens 64] [--markdown
    OUT.md]
    python benchmarks/speculation.py --heads [--target qwen3.5-4b] [--layers 12]
    python benchmarks/speculation.py --eagle [--target llama-3.2-1b]

With --heads the target drafts by its own layer that predicts further; plain steps are those of a target
without that layer, so what the layer costs in each step counts against it. --layers takes the first so many
of its layers, where all of them do not fit in memory. --eagle puts an EAGLE-3 head with random weights and
32,000 tokens in the place of that layer, for a target without one. Otherwise:

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
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinychat.backends.interface import BLOCK, Step
from tinychat.base.load_options import LoadOptions
from tinychat.base.sampling_params import SamplingParams
from tinychat.engine.engine import Engine
from tinychat.engine.speculation.further import FurtherLayer
from tinychat.loading import make_backend
from tinychat.network import eagle
from tinychat.network.config import ModelConfig
from tinychat.network.head_config import HeadConfig
from tinychat.network.weights import DenseLinear
from tinychat.synthetic import SHAPES, SyntheticCheckpoint

ALPHAS, WINDOWS = (0.5, 0.7, 0.8, 0.9), (1, 2, 3, 4, 5, 6, 8)
HEAD_ALPHAS, HEAD_WINDOWS = (0.6, 0.75, 0.9), (1, 2, 3, 4, 5)
PROMPT = 16  # tokens before the first step with heads
KNOWN = 32000  # tokens of a head's vocabulary


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


class RandomHead:
    """An EAGLE-3 head of a shape like its model's, for no more than its time."""

    def __init__(self, name: str):
        self.path, self.ids = Path(f"synthetic-head-of-{name}"), np.arange(KNOWN, dtype=np.int64)
        self.rng = np.random.default_rng(0)

    def onto(self, model: ModelConfig) -> ModelConfig:
        """The model's config with the head."""
        n, last = model.n_layers, model.layers[-1]
        layer = replace(last, mixer=replace(last.attention, skipped=1))
        head = HeadConfig(model.hidden_size, KNOWN, (2, n // 2, n - 3))
        onto = replace(model, further=layer, head=head)
        self.config = replace(onto, tie_embeddings=False)  # its own tables are two
        return onto

    @property
    def n_weights(self) -> int:
        """Numbers in its linears."""
        return sum(n * k for n, k in eagle.linears(self.config).values())

    def has(self, name: str) -> bool:
        """It has all but an embedding."""
        return name != "embed_tokens"

    def linear(self, name: str) -> DenseLinear:
        """Random float16."""
        n, k = eagle.linears(self.config)[name]
        return DenseLinear((self.rng.standard_normal((n, k), np.float32) * k**-0.5).astype(np.float16))

    def vector(self, name: str) -> np.ndarray:
        """A norm that leaves things as they are."""
        return np.ones(self.config.hidden_size, np.float32)

    def fingerprint(self, tell: object = None) -> str:
        """Its name."""
        return str(self.path)

    def check_unchanged(self) -> None:
        """There is no file."""


class Pair:
    """A target without and with the layer that predicts further, or a head, over one pack of weights."""

    def __init__(
        self, shape: str, threads: int | None, n_ctx: int, layers: int | None = None, head: bool = False
    ):
        whole = SHAPES[shape]
        first = shape if layers is None else replace(whole, layers=whole.layers[:layers])
        checkpoint = SyntheticCheckpoint(first, further=not head)
        self.greedy = SamplingParams(temperature=0.0)
        self.engines = []
        for draft in ("none", "mtp"):
            options = LoadOptions(device="cpu", threads=threads, draft=draft)
            of = RandomHead(shape) if head and draft == "mtp" else None
            if of is not None:
                of.onto(checkpoint.config)
            backend = make_backend(checkpoint, options, None, of)
            self.engines.append(Engine(backend, checkpoint.tokenizer(), n_ctx))
        vocab = min(checkpoint.config.vocab_size, 30000)
        self.ids = np.random.default_rng(0).integers(0, vocab, n_ctx).tolist()
        self.layer = FurtherLayer(self.engines[1])

    def begin(self) -> None:
        """Both read the same prompt."""
        self.branches = [engine.branch() for engine in self.engines]
        for engine, branch in zip(self.engines, self.branches, strict=True):
            engine.run(branch, self.ids[:PROMPT], PROMPT)
        self.layer.begin(self.ids[: PROMPT + 1], self.branches[1])

    def plain(self) -> float:
        """Seconds of a plain step without the layer."""
        branch, began = self.branches[0], time.perf_counter()
        self.engines[0].run(branch, [self.ids[len(branch)]], 0, self.greedy)
        return time.perf_counter() - began

    def draft(self, k: int) -> float:
        """Seconds of drafting k tokens."""
        at, began = len(self.branches[1]), time.perf_counter()
        draft = self.layer.propose(self.ids[: at + 1], k, self.greedy, 0)
        assert len(draft.tokens) == k
        return time.perf_counter() - began

    def verify(self, k: int, accepted: int) -> float:
        """Seconds of a step over k + 1 rows, of which accepted + 1 stay."""
        branch, began = self.branches[1], time.perf_counter()
        window = self.ids[len(branch) :][: k + 1]
        self.engines[1].run(branch, window, 0, self.greedy, accept=lambda rows: accepted + 1)
        return time.perf_counter() - began


def with_heads(
    target: str, tokens: int, threads: int | None, layers: int | None, head: bool = False
) -> list[dict]:
    """A row of figures for each window and acceptance."""
    pair, rng, rows = Pair(target, threads, 2 * tokens + 64, layers, head), np.random.default_rng(1), []
    for k in HEAD_WINDOWS:
        for alpha in HEAD_ALPHAS:
            pair.begin()
            plain, drafts, window, decided = [], [], [], 0
            for _ in range(2):  # pages in, threads up
                pair.plain(), pair.draft(k), pair.verify(k, 0)
            while decided < tokens:
                accepted = 0
                while accepted < k and rng.random() < alpha:
                    accepted += 1
                plain.append(pair.plain())
                drafts.append(pair.draft(k))
                window.append(pair.verify(k, accepted))
                decided += accepted + 1
            rows.append(row_of(k, alpha, decided, plain, [s / k for s in drafts for _ in range(k)], window))
    return rows


def row_of(
    k: int, alpha: float, decided: int, plain: list[float], single: list[float], window: list[float]
) -> dict:
    """Figures of one cell. single: seconds of each draft."""
    one, realised = statistics.median(plain), decided / len(window)
    c, v = statistics.median(single) / one, statistics.median(window) / one
    return {
        "k": k,
        "alpha": alpha,
        "c": c,
        "v": v,
        "tokens_per_step": realised,
        "expected_tokens": (1 - alpha ** (k + 1)) / (1 - alpha),
        "speed_up": decided * statistics.mean(plain) / (sum(single) + sum(window)),
        "theory": realised / (k * c + v),
    }


def with_draft(target_shape: str, draft_shape: str, tokens: int, threads: int | None) -> list[dict]:
    """A row of figures for each window and acceptance, a smaller model drafting."""
    n_ctx = tokens + 64
    target, draft = Runner(target_shape, threads, n_ctx), Runner(draft_shape, threads, n_ctx)
    rng = np.random.default_rng(1)
    for r in (target, draft):
        for at in range(4):
            r.step(at, 1)  # pages in, threads up
    rows = []
    for k in WINDOWS:
        for alpha in ALPHAS:
            # Plain steps, draft steps and windows alternate, so that drift meets all of them.
            at = decided = 0
            plain, single, window = [], [], []
            while decided < tokens:
                plain.append(target.step(at, 1))
                single += [draft.step(at + i, 1) for i in range(k)]
                window.append(target.step(at, k + 1))
                accepted = 0
                while accepted < k and rng.random() < alpha:
                    accepted += 1
                decided, at = decided + accepted + 1, (at + accepted + 1) % tokens
            rows.append(row_of(k, alpha, decided, plain, single, window))
    return rows


def show(rows: list[dict], markdown: Path | None) -> None:
    """Print a Markdown table, and write it where it is wanted."""
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
    if markdown:
        markdown.write_text(text + "\n")


def main() -> None:
    """Measure and print a Markdown table; the last line is JSON."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--target")
    p.add_argument("--draft", default="qwen2.5-0.5b")
    p.add_argument("--heads", action="store_true", help="the target drafts by itself")
    p.add_argument("--eagle", action="store_true", help="an EAGLE-3 head drafts")
    p.add_argument("--layers", type=int, help="with --heads: the first so many layers of the target")
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--threads", type=int)
    p.add_argument("--markdown", type=Path)
    o = p.parse_args()
    target = o.target or ("qwen3.5-4b" if o.heads else "llama-3.2-1b" if o.eagle else "llama-2-7b")
    if o.heads or o.eagle:
        rows = with_heads(target, o.tokens, o.threads, o.layers, o.eagle)
    else:
        rows = with_draft(target, o.draft, o.tokens, o.threads)
    show(rows, o.markdown)
    draft = "mtp" if o.heads else "eagle3" if o.eagle else o.draft
    print(json.dumps({"target": target, "draft": draft, "rows": rows}))


if __name__ == "__main__":
    main()
