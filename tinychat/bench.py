"""How fast a model runs here, and how close to the memory's bandwidth: what `tinychat bench` measures."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinychat.backends.exact_form import ExactForm
from tinychat.backends.interface import BLOCK, Backend, Slots, Span, Step
from tinychat.base.errors import MemoryBudgetError, UsageError
from tinychat.base.events import TextDelta
from tinychat.base.load_options import LoadOptions
from tinychat.base.machine import cache_bytes, human_bytes
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import (
    AttentionConfig,
    DenseConfig,
    ExpertsConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
)
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import DenseLinear, Linear, QuantizedLinear

if TYPE_CHECKING:
    from tinychat.text.tokenizer import Tokenizer


def _shape(hidden, ffn, layers, heads, kv_heads, vocab, tied, bias=False, context=8192) -> ModelConfig:
    d = hidden // heads
    layer = LayerConfig(AttentionConfig(heads, kv_heads, d, RopeConfig(dim=d)), DenseConfig(ffn))
    return ModelConfig(
        family="llama",
        hidden_size=hidden,
        layers=(layer,) * layers,
        vocab_size=vocab,
        context_length=context,
        tie_embeddings=tied,
        attention_bias=bias,
    )


# The real dimensions; the weights are random, so nothing is downloaded.
SHAPES: dict[str, ModelConfig] = {
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "qwen2.5-0.5b": _shape(896, 4864, 24, 14, 2, 151936, tied=True, bias=True),
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "qwen2.5-7b": _shape(3584, 18944, 28, 28, 4, 152064, tied=False, bias=True),
    "llama-2-7b": _shape(4096, 11008, 32, 32, 32, 32000, tied=False),
    "llama-3-8b": _shape(4096, 14336, 32, 32, 8, 128256, tied=False),
}
SHAPES["qwen3-30b-a3b"] = replace(
    _shape(2048, 6144, 48, 32, 4, 151936, tied=False),
    family="qwen3_moe",
    layers=(LayerConfig(AttentionConfig(32, 4, 128, RopeConfig(dim=128)), ExpertsConfig(128, 8, 768)),) * 48,
)


class SyntheticCheckpoint:
    """A shape with random AWQ-like weights: 4-bit, groups of 128 (64 or 32 where 128 does not divide), int8
    head.

    Every layer holds the same random numbers; they are separate bytes once packed, as in a real model.
    """

    def __init__(self, shape: str):
        if shape not in SHAPES:
            raise UsageError(f"The shape {shape!r} is not known.", f"Known: {', '.join(SHAPES)}.")
        self.config = SHAPES[shape]
        self.path = Path(f"synthetic-{shape}")
        self._made: dict[tuple, Linear] = {}
        self._linears = FAMILIES[self.config.family].linears(self.config, 0)

    def has(self, name: str) -> bool:
        """Whether the module exists."""
        return name != "lm_head" or not self.config.tie_embeddings

    def linear(self, name: str) -> Linear:
        """Random codes; weights of about 1/sqrt(in), so that activations stay of order one."""
        c = self.config
        if name in ("lm_head", "model.embed_tokens"):
            n, k, body = c.vocab_size, c.hidden_size, False
        elif name.endswith("mlp.gate"):
            shape = self._linears["model.layers.0.mlp.gate"]
            return DenseLinear(np.random.default_rng(0).normal(0, 1, shape).astype(np.float32))
        else:
            tail = name.split(".", 3)[-1]
            (n, k), body = self._linears[f"model.layers.0.{tail}"], True
        has_bias = c.attention_bias and name.endswith(("q_proj", "k_proj", "v_proj"))
        key = (n, k, body, has_bias)
        if key not in self._made:
            self._made[key] = self._random(n, k, body, has_bias)
        return self._made[key]

    def stored(self, name: str) -> tuple[str, int]:
        """The form of the random numbers, and their bytes."""
        w = self.linear(name)
        return str(w.form), w.form.n_bytes(*w.shape)

    def vector(self, name: str) -> np.ndarray:
        """Ones."""
        c = self.config
        return np.ones(c.head_dim if name.endswith(("q_norm", "k_norm")) else c.hidden_size, np.float32)

    def fingerprint(self, tell: Any = None) -> str:
        """The shape's name says it all."""
        return f"{self.path.name}-1"

    def weight_files(self) -> list:
        """There are none."""
        return []

    def check_unchanged(self) -> None:
        """Random numbers of a fixed seed do not change."""

    def tokenizer(self) -> Tokenizer:
        """One that knows no word: what is said has no text, and no end."""
        import tokenizers

        from tinychat.text.tokenizer import Tokenizer

        words = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
        words.decoder = tokenizers.decoders.ByteLevel()
        return Tokenizer(words, eos_ids=frozenset())

    @staticmethod
    def _random(n: int, k: int, body: bool, bias: bool) -> Linear:
        rng = np.random.default_rng(n * 31 + k)
        raw = np.frombuffer(rng.bytes(n * k), dtype=np.uint8).reshape(n, k)
        if not body:
            scales = np.full((n, k // 32), 0.01 / k**0.5, np.float16)
            return QuantizedLinear(raw.view(np.int8), scales, bits=8)
        group = next(g for g in (128, 64, 32) if k % g == 0)
        return QuantizedLinear(
            raw & 15,
            np.full((n, k // group), 0.2 / k**0.5, np.float16),
            zeros=rng.integers(6, 10, (n, k // group), dtype=np.uint8),
            bias=np.zeros(n, np.float32) if bias else None,
        )


def linear_bytes(w: Linear) -> int:
    """Bytes that one pass over a linear reads, in the form in which backends store it."""
    exact = ExactForm.of(w)
    return exact.form.n_bytes(*exact.shape)


def weight_bytes_per_token(checkpoint: Checkpoint, policy: WeightPolicy) -> int:
    """Bytes that decoding one token reads: every linear of the body and the head (a tied head is the
    embedding); of experts as many as a token takes.
    """
    c = checkpoint.config
    total, by_shape = 0.0, {}
    for i, layer in enumerate(c.layers):
        taken = layer.mlp.taken / layer.mlp.n if isinstance(layer.mlp, ExpertsConfig) else 1
        for name, shape in FAMILIES[c.family].linears(c, i).items():
            read = policy.router if name.endswith("mlp.gate") else policy.linear
            share = taken if ".experts." in name else 1
            if isinstance(checkpoint, SyntheticCheckpoint):  # linears of a shape are alike
                if shape not in by_shape:
                    by_shape[shape] = linear_bytes(read(checkpoint, name))
                total += by_shape[shape] * share
            else:
                total += linear_bytes(read(checkpoint, name)) * share
    head = policy.head(checkpoint, "lm_head") or policy.embedding(checkpoint, "model.embed_tokens")
    return int(total + linear_bytes(head))


def _why_more(bytes_per_token: float) -> str:
    """Why decoding seems to read faster than memory can be read."""
    cache = cache_bytes()
    if cache > bytes_per_token / 8:  # what stays of one pass is not read again in the next
        part = min(1.0, cache / bytes_per_token)
        return f"{part:.0%} of what a token reads has room in the processor's cache of {human_bytes(cache)}"
    return "other programs kept memory busy while its speed was measured: bench again when they rest"


class Passes:
    """Steps of one made-up sequence of n tokens, without an engine."""

    def __init__(self, backend: Backend, vocab_size: int, n: int):
        """Raises MemoryBudgetError if its keys and values have no room."""
        self.backend, n_blocks = backend, -(-n // BLOCK)
        memories = range(len(backend.memories))
        need, free = n_blocks * sum(map(backend.kv_bytes_per_block, memories)), backend.free_memory()
        if need > free:
            raise MemoryBudgetError(
                f"A cache of {n} tokens takes {human_bytes(need)} and {human_bytes(free)} are free.",
                "Use smaller -p, -n and --context.",
            )
        for memory in memories:
            backend.allocate_kv(n_blocks, memory)
        self.table = np.arange(n_blocks, dtype=np.int32)
        self.ids = np.random.default_rng(0).integers(0, vocab_size, n, dtype=np.int32)

    def step(self, at: int, end: int) -> None:
        """Tokens `at` … end − 1; the last one gets logits."""
        memories = tuple(Slots(self.table, at) for _ in self.backend.memories)
        self.backend.step_greedy(Step((Span(self.ids[at:end], at, end - at - 1, memories),)))

    def fill(self, n: int) -> float:
        """Prefill n tokens from the beginning. Returns tokens a second."""
        began = time.perf_counter()
        for at in range(0, n, self.backend.max_rows):
            self.step(at, min(at + self.backend.max_rows, n))
        return n / (time.perf_counter() - began)

    def decode(self, start: int, n: int) -> float:
        """Decode n tokens behind `start` others. Returns tokens a second."""
        began = time.perf_counter()
        for at in range(start, start + n):
            self.step(at, at + 1)
        return n / (time.perf_counter() - began)

    def kv_bytes(self, n: int) -> float:
        """Bytes of keys and values that attention reads behind n tokens."""
        seen = (min(n, spec.window or n) for spec in self.backend.memories)
        blocks = map(self.backend.kv_bytes_per_block, range(len(self.backend.memories)))
        return sum(size / BLOCK * slots for size, slots in zip(blocks, seen, strict=True))


def _spread(rates: list[float]) -> float:
    return max(rates) / min(rates) - 1


def measure(
    backend: Backend,
    config: ModelConfig,
    weight_bytes: int,
    bandwidth: Callable[[], float],
    *,
    n_prompt: int = 512,
    n_gen: int = 128,
    contexts: tuple[int, ...] = (0,),
    rounds: int = 3,
) -> dict[str, Any]:
    """Prefill and decode rates: warm-up, then `rounds` of each; medians, with the spread (max/min − 1).

    bandwidth: a plain multi-threaded read (on a GPU: a copy), GB/s; taken before, between and after, and the
    best one counts.
    """
    passes = Passes(backend, config.vocab_size, max(n_prompt, max(contexts) + n_gen))
    reads = [bandwidth()]
    passes.fill(min(64, n_prompt))
    passes.decode(0, min(8, n_gen))
    prefill = []
    if n_prompt:
        rates = [passes.fill(n_prompt) for _ in range(rounds)]
        prefill = [{"n_tokens": n_prompt, "tok_s": statistics.median(rates), "spread": _spread(rates)}]
    reads.append(bandwidth())
    results = []
    for context in contexts:
        passes.fill(context)
        results.append((context, [passes.decode(context, n_gen) for _ in range(rounds)]))
        reads.append(bandwidth())
    rows = []
    for context, rates in results:
        rate = statistics.median(rates)
        bytes_per_token = weight_bytes + passes.kv_bytes(context + n_gen // 2)
        share = rate * bytes_per_token / 1e9 / max(reads)
        rows.append(
            {
                "context": context,
                "tok_s": rate,
                "gb_s": rate * bytes_per_token / 1e9,
                "fraction_of_bandwidth": share,
                "more_than_memory": _why_more(bytes_per_token) if share > 1 else None,
                "spread": _spread(rates),
            }
        )
    return {"read_bandwidth_gb_s": max(reads), "prefill": prefill, "decode": rows}


def measure_together(
    backend: Backend, tokenizer: Tokenizer, vocab_size: int, counts: tuple[int, ...], n_gen: int, rounds: int
) -> list[dict[str, Any]]:
    """Decode rates of so many answers at once, each asked for by a thread of its own, as `Model.chat` from
    several threads is: tokens a second of all of them together, and how many times those of one. One and
    many are measured in turns; medians, with the spread (max/min − 1).
    """
    from tinychat.engine.engine import Engine
    from tinychat.engine.sampling import SamplingParams

    tokenizer.eos_ids = frozenset()
    n_prompt = 32
    engine = Engine(backend, tokenizer, n_prompt + n_gen + 2, more_bytes=backend.free_memory)
    rng = np.random.default_rng(0)

    def rate(n: int, n_gen: int = n_gen) -> float:
        """Tokens a second of n answers, from when all of them have begun until all have ended."""
        prompts = rng.integers(0, vocab_size, (n, n_prompt)).tolist()
        params = SamplingParams(temperature=0, max_tokens=n_gen + 1)
        began: list[float] = []
        ready = threading.Barrier(n, lambda: began.append(time.perf_counter()))

        def answer(prompt: list[int]) -> None:
            said = (e for e in engine.generate(engine.branch(), prompt, params) if isinstance(e, TextDelta))
            try:
                next(said)
                ready.wait()
            except BaseException:
                ready.abort()
                raise
            for _ in said:
                pass

        with ThreadPoolExecutor(n) as pool:
            for done in [pool.submit(answer, prompt) for prompt in prompts]:
                done.result()
            return n * n_gen / (time.perf_counter() - began[0])

    for n in (1, *counts):
        rate(n, min(8, n_gen))
    rates: dict[int, list[float]] = {n: [] for n in (1, *counts)}
    for _ in range(rounds):
        for n, seen in rates.items():
            seen.append(rate(n))
    one = statistics.median(rates[1])
    return [
        {
            "sequences": n,
            "tok_s": statistics.median(rates[n]),
            "times_one": statistics.median(rates[n]) / one,
            "spread": _spread(rates[n]),
        }
        for n in (1, *counts)
    ]


def run(
    model: str | None,
    synthetic: str | None,
    *,
    options: LoadOptions,
    progress: Callable[[str], None] | None = None,
    parallel: tuple[int, ...] = (),
    n_gen: int = 128,
    rounds: int = 3,
    **sizes: Any,
) -> dict[str, Any]:
    """Load and measure; the JSON that `tinychat bench --json` prints (fields in docs/performance.md)."""
    from tinychat.base.machine import peak_rss
    from tinychat.formats import open_checkpoint
    from tinychat.hub import store
    from tinychat.loading import make_backend

    policy = WeightPolicy(options.quantize, options.head_bits)
    if synthetic is not None:
        checkpoint: Checkpoint = SyntheticCheckpoint(synthetic)
    elif model is not None:
        checkpoint = open_checkpoint(store.resolve(model, offline=options.offline))
    else:
        raise UsageError("Nothing is named to be measured.", "Give a model or a shape.")
    began = time.perf_counter()
    backend = make_backend(checkpoint, options, progress)
    load_s = time.perf_counter() - began
    try:
        weight_bytes = weight_bytes_per_token(checkpoint, policy)
        result = measure(
            backend,
            checkpoint.config,
            weight_bytes,
            backend.bandwidth,
            n_gen=n_gen,
            rounds=rounds,
            **sizes,
        )
        if parallel:
            tokenizer = checkpoint.tokenizer()
            result["parallel"] = measure_together(
                backend, tokenizer, checkpoint.config.vocab_size, parallel, n_gen, rounds
            )
        facts = backend.describe()
    finally:
        backend.close()
    return {
        "model": model or synthetic,
        **{k: facts[k] for k in ("backend", "isa", "act_bits", "kv_bits", "threads")},
        "weight_bytes_per_token": weight_bytes,
        **result,
        "load_s": load_s,
        "peak_rss_bytes": peak_rss(),
    }
