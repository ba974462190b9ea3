"""Which number of threads is the best for a model on this machine: `tinychat bench --threads auto`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tinychat.backends.interface import Backend
from tinychat.base.cores import Cores
from tinychat.bench import Passes

NEAR = 0.97  # of the best rate: fewer threads that reach it leave more to other programs


def try_threads(
    load: Callable[[int], Backend], cores: Cores, vocab_size: int, n_prompt: int, n_gen: int, rounds: int
) -> dict[str, Any]:
    """Prefill and decode rates of each number of threads that may be the best, in turns: medians, and the
    smallest number that answers nearly as fast as any.

    load: a backend with so many threads. Every one is held until all are measured.
    """
    backends: dict[int, Backend] = {}
    try:
        passes = {}
        for n in cores.candidates():
            backends[n] = load(n)
            passes[n] = Passes(backends[n], vocab_size, max(n_prompt, n_gen, 64))
            passes[n].fill(min(64, n_prompt or 64))
        prefill: dict[int, list[float]] = {n: [] for n in passes}
        decode: dict[int, list[float]] = {n: [] for n in passes}
        for _ in range(rounds):
            for n, one in passes.items():
                if n_prompt:
                    prefill[n].append(one.fill(n_prompt))
                one.fill(16)
                decode[n].append(one.decode(16, n_gen - 16))
    finally:
        for backend in backends.values():
            backend.close()
    rows = [
        {
            "threads": n,
            "prefill_tok_s": statistics.median(prefill[n]) if n_prompt else None,
            "decode_tok_s": statistics.median(decode[n]),
        }
        for n in passes
    ]
    return {
        "cores": cores.sentence(),
        "default": cores.threads,
        "best": best([(n, statistics.median(rates)) for n, rates in decode.items()]),
        "tried": rows,
    }


def best(rates: Sequence[tuple[int, float]]) -> int:
    """Of (threads, tokens a second) the fewest threads that come near the fastest."""
    fastest = max(rate for _, rate in rates)
    return min(n for n, rate in rates if rate >= NEAR * fastest)
