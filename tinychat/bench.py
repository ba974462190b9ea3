"""How fast a model runs here, and how close to the memory's bandwidth: what `tinychat bench` measures."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tinychat.backends.cpu_pack import KERNELS
from tinychat.backends.exact_form import ExactForm, Kernels
from tinychat.backends.interface import BLOCK, STRETCH, Backend, MemorySpec, Slots, Span, States, Step, Tails
from tinychat.backends.plan import plan
from tinychat.base.errors import MemoryBudgetError, UsageError
from tinychat.base.events import TextDelta
from tinychat.base.load_options import LoadOptions
from tinychat.base.machine import cache_bytes, human_bytes
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import Linear
from tinychat.synthetic import DEFAULT, SyntheticCheckpoint

if TYPE_CHECKING:
    from tinychat.text.tokenizer import Tokenizer


def linear_bytes(w: Linear) -> int:
    """Bytes that one pass over a linear reads, in the form in which the CPU backend stores it."""
    exact = ExactForm.of(w, KERNELS)
    return exact.form.n_bytes(*exact.shape)


@dataclass
class FormBytes:
    """Weights of one form that decoding a token reads: the form as it is given and as it runs, the bytes of
    both, and whether the one was rounded to the other, for want of kernels.
    """

    given: str
    given_bytes: float
    runs_as: str
    bytes: float
    rounded: bool


def forms_per_token(
    checkpoint: Checkpoint, policy: WeightPolicy, kernels: Kernels = KERNELS
) -> list[FormBytes]:
    """What decoding one token reads, by form, the most bytes first: every linear of the body and the head (a
    tied head is the embedding); of experts as many as a token takes. Reads no weight. kernels: those of the
    backend.
    """
    total: dict[tuple[str, str], FormBytes] = {}
    for w in plan(checkpoint, policy, kernels):
        if not w.share:
            continue
        given, runs = str(w.form), str(w.runs)
        have = total.setdefault((given, runs), FormBytes(given, 0, runs, 0, rounded=False))
        have.given_bytes += w.stored_bytes * w.share
        have.bytes += w.runs_bytes * w.share
        have.rounded |= w.for_want_of_kernels
    return sorted(total.values(), key=lambda one: -one.bytes)


def _kernels_of(backend: Backend) -> Kernels:
    if backend.name != "cuda":
        return KERNELS
    from tinychat.backends import cuda_pack

    return cuda_pack.KERNELS


def weight_bytes_per_token(checkpoint: Checkpoint, policy: WeightPolicy) -> int:
    """Bytes of weights that decoding one token reads. Reads none of them."""
    return int(sum(w.runs_bytes * w.share for w in plan(checkpoint, policy, KERNELS)))


def _why_more(bytes_per_token: float) -> str:
    """Why decoding seems to read faster than memory can be read."""
    cache = cache_bytes()
    if cache > bytes_per_token / 8:  # what stays of one pass is not read again in the next
        part = min(1.0, cache / bytes_per_token)
        return f"{part:.0%} of what a token reads has room in the processor's cache of {human_bytes(cache)}"
    return "other programs kept memory busy while its speed was measured: bench again when they rest"


TAILS = 3 * STRETCH // BLOCK  # blocks of a tail: the first stretch, and two that take turns
STATES = 2  # slots of states, in turn


class Passes:
    """Steps of one made-up sequence of n tokens, without an engine."""

    def __init__(self, backend: Backend, vocab_size: int, n: int, rows: int = 0):
        """rows: of the largest step that checks drafts, each of which keeps its state.

        Raises MemoryBudgetError if its keys and values have no room.
        """
        self.backend, n_blocks = backend, -(-n // BLOCK)
        few = {"tail": TAILS, "state": STATES + rows}
        blocks = [few.get(spec.kind, n_blocks) for spec in backend.memories]
        need = sum(each * backend.kv_bytes_per_block(memory) for memory, each in enumerate(blocks))
        if need > (free := backend.free_memory()):
            raise MemoryBudgetError(
                f"A cache of {n} tokens takes {human_bytes(need)} and {human_bytes(free)} are free.",
                "Use smaller -p, -n and --context.",
            )
        for memory, each in enumerate(blocks):
            backend.allocate_kv(each, memory)
        self._state = 0  # slot of the state behind the last step
        self.table = np.arange(n_blocks, dtype=np.int32)
        self.ids = np.random.default_rng(0).integers(0, vocab_size, n, dtype=np.int32)

    def step(self, at: int, end: int) -> None:
        """Tokens `at` … end − 1; the last one gets logits."""
        memories = tuple(self._place(spec, at, end) for spec in self.backend.memories)
        self.backend.step_greedy(Step((Span(self.ids[at:end], at, end - at - 1, memories),)))
        self._state = 1 - self._state

    def _place(self, spec: MemorySpec, at: int, end: int, each: bool = False) -> Slots | States | Tails:
        """each: of drafts, any of which may be the last one that stays."""
        if spec.kind == "state":
            kept = np.full(end - at, -1, np.int32)
            kept[-1] = 1 - self._state
            if each:
                kept = np.arange(STATES, STATES + end - at, dtype=np.int32)
            return States(self._state if at else -1, kept)
        if spec.kind != "tail":
            return Slots(self.table, at)
        wide, blocks = STRETCH // BLOCK, np.arange(-(-end // BLOCK), dtype=np.int32)
        left = np.where(blocks < wide, blocks, wide + blocks % (2 * wide)).astype(np.int32)
        stretch = blocks // wide * STRETCH  # those that are begun before this step, or not complete behind it
        left[(stretch > 0) & (stretch + STRETCH <= at // STRETCH * STRETCH)] = -1
        left[(stretch >= max(at, 1)) & (stretch + STRETCH <= end)] = -1
        return Tails(left)

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

    def check(self, start: int, rows: int, times: int) -> float:
        """Steps of so many rows behind `start` tokens, all with logits, as drafts are checked. Returns
        seconds a step.
        """
        memories = tuple(self._place(spec, start, start + rows, rows > 1) for spec in self.backend.memories)
        step = Step((Span(self.ids[start : start + rows], start, 0, memories),))
        began = time.perf_counter()
        for _ in range(times):
            self.backend.step_greedy(step)
        return (time.perf_counter() - began) / times

    def kv_bytes(self, n: int) -> float:
        """Bytes of keys and values that attention reads behind n tokens, and of states, read and written."""
        total = 0.0
        for memory, spec in enumerate(self.backend.memories):
            seen = STRETCH / 2 if spec.kind == "tail" else min(n, spec.window or n)
            share = 2 if spec.kind == "state" else seen / BLOCK
            total += share * self.backend.kv_bytes_per_block(memory)
        return total


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
    rows: tuple[int, ...] = (),
    rounds: int = 3,
) -> dict[str, Any]:
    """Prefill and decode rates: warm-up, then `rounds` of each; medians, with the spread (max/min − 1).

    bandwidth: a plain multi-threaded read (on a GPU: a copy), GB/s; taken before, between and after, and the
    best one counts. rows: of steps that check drafts, each timed in turns with steps of one.
    """
    passes = Passes(
        backend, config.vocab_size, max(n_prompt, max(contexts) + n_gen, *rows), max(rows, default=0)
    )
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
    decode = []
    for context, rates in results:
        rate = statistics.median(rates)
        bytes_per_token = weight_bytes + passes.kv_bytes(context + n_gen // 2)
        share = rate * bytes_per_token / 1e9 / max(reads)
        decode.append(
            {
                "context": context,
                "tok_s": rate,
                "gb_s": rate * bytes_per_token / 1e9,
                "fraction_of_bandwidth": share,
                "more_than_memory": _why_more(bytes_per_token) if share > 1 else None,
                "spread": _spread(rates),
            }
        )
    result = {"read_bandwidth_gb_s": max(reads), "prefill": prefill, "decode": decode}
    return result | ({"rows": _measure_rows(passes, rows, n_gen, rounds)} if rows else {})


def _measure_rows(passes: Passes, counts: tuple[int, ...], times: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of steps of so many rows against steps of one, in turns: medians, with the spread."""
    seconds: dict[int, list[float]] = {n: [] for n in (1, *counts)}
    for _ in range(rounds):
        for n, seen in seconds.items():
            seen.append(passes.check(0, n, times))
    one = statistics.median(seconds[1])
    return [
        {"rows": n, "step_s": (s := statistics.median(seen)), "times_one": s / one, "spread": _spread(seen)}
        for n, seen in seconds.items()
    ]


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


def measured(model: str | None, synthetic: str | None, form: str, offline: bool) -> Checkpoint:
    """The model or the shape that is to be measured."""
    from tinychat.formats import open_checkpoint
    from tinychat.hub import store

    if synthetic is not None:
        return SyntheticCheckpoint(synthetic, form)
    if model is None:
        raise UsageError("Nothing is named to be measured.", "Give a model or a shape.")
    return open_checkpoint(store.resolve(model, offline=offline))


def run(
    model: str | None,
    synthetic: str | None,
    form: str = DEFAULT,
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
    from tinychat.loading import make_backend

    policy = WeightPolicy(options.quantize, options.head_bits)
    checkpoint = measured(model, synthetic, form, offline=bool(options.offline))
    began = time.perf_counter()
    backend = make_backend(checkpoint, options, progress)
    load_s = time.perf_counter() - began
    try:
        forms = forms_per_token(checkpoint, policy, _kernels_of(backend))
        weight_bytes = int(sum(one.bytes for one in forms))
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
        "form": form if synthetic else None,
        "forms": [asdict(one) for one in forms],
        "weight_bytes_per_token": weight_bytes,
        **result,
        "load_s": load_s,
        "peak_rss_bytes": peak_rss(),
    }
