"""What a KV cache in 8 and 4 bits costs against 16: rows of the table in docs/long-chats-figures.md.

    python benchmarks/kv_bits.py perplexity --work DIR [--windows 30] [--model MODEL]
    python benchmarks/kv_bits.py eviction --work DIR [--documents 3]
    python benchmarks/kv_bits.py speed [--context 4000]

perplexity: docutils' specification as in quality.py, windows of 512 tokens, the second half of each scored.
eviction: the first 1,024 tokens of documents as in long_chats.py, with the whole cache and with H2O and a
quarter of it. Activations have 16 bits in both, so that the cache is all that differs; intervals (95 %) are
over windows or documents. speed: a made-up cache, the three in turns.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import long_chats
import numpy as np
from quality import LENGTH, held_out_text

import tinychat
from tinychat.bench import Passes
from tinychat.engine.eviction import EvictionPolicy
from tinychat.engine.sampling import log_softmax

BITS = (16, 8, 4)


def against(nll: np.ndarray, truth: np.ndarray) -> str:
    """By how much a perplexity is larger than another one on the same texts."""
    d = nll - truth
    off = 1.96 * d.std(ddof=1) / np.sqrt(len(d)) if len(d) > 1 else np.nan
    return f"{np.expm1(d.mean()):+.3%} ± {off:.3%}"


def perplexity(o: argparse.Namespace) -> None:
    """One row for each number of bits."""
    found: dict[int, np.ndarray] = {}
    for bits in BITS:
        with tinychat.load(o.model, kv_bits=bits, act_bits=16, draft="none", ctx=LENGTH) as m:
            ids = m.tokenizer.encode(held_out_text(o.work))
            first = [m.tokenizer.bos_id] if m.tokenizer.add_bos else []
            each, half, means = LENGTH - len(first), LENGTH // 2, []
            for i in range(o.first, o.first + o.windows):
                window = np.array([*first, *ids[i * each : (i + 1) * each]])
                log_p = log_softmax(m.logits(window.tolist())[half - 1 : -1])
                means.append(-log_p[np.arange(half), window[half:]].mean())
        found[bits] = np.array(means)
        print(f"{bits} bits: {np.exp(np.mean(means)):.4f}, {against(found[bits], found[16])}", flush=True)


def eviction(o: argparse.Namespace) -> None:
    """One row for each number of bits: the whole cache, and a quarter of it."""
    long_chats.LENGTH = 1024
    found: dict[tuple[int, bool], np.ndarray] = {}
    for bits in (16, 4):
        with tinychat.load(o.model, kv_bits=bits, act_bits=16, draft="none", ctx=long_chats.LENGTH) as m:
            texts = list(long_chats.documents(o.work, m.tokenizer).values())[: o.documents]
            for policy in (None, EvictionPolicy.of("h2o", long_chats.LENGTH // 4)):
                key = bits, policy is not None
                found[key] = np.array([long_chats.nll(m, ids, policy) for ids in texts])
                print(
                    f"{bits} bits, {'H2O' if policy else 'all'}: {np.exp(found[key].mean()):.4f}, "
                    f"{against(found[key], found[16, key[1]])}",
                    flush=True,
                )


def speed(o: argparse.Namespace) -> None:
    """Milliseconds a token behind so many others."""
    passes = {}
    for bits in BITS:
        m = tinychat.load(o.model, kv_bits=bits, draft="none", ctx=256)
        passes[bits] = Passes(m.backend, m.config.vocab_size, o.context + 64)
        passes[bits].fill(o.context)
    times: dict[int, list[float]] = {bits: [] for bits in BITS}
    for _ in range(o.rounds):
        for bits, p in passes.items():
            began = time.perf_counter()
            p.decode(o.context, 8)
            times[bits].append((time.perf_counter() - began) / 8)
    for bits, t in times.items():
        ratio = np.median(np.array(t) / times[8])
        print(f"{bits} bits: {1e3 * np.median(t):.2f} ms (least {1e3 * min(t):.2f}), {ratio:.3f} of 8 bits")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("perplexity")
    p.add_argument("--work", type=Path, required=True, help="Folder for what is downloaded.")
    p.add_argument("--windows", type=int, default=30)
    p.add_argument("--first", type=int, default=0, help="The window to begin with.")
    p.set_defaults(run=perplexity)
    p = commands.add_parser("eviction")
    p.add_argument("--work", type=Path, required=True, help="Folder for what is downloaded.")
    p.add_argument("--documents", type=int, default=3)
    p.set_defaults(run=eviction)
    p = commands.add_parser("speed")
    p.add_argument("--context", type=int, default=4000)
    p.add_argument("--rounds", type=int, default=15)
    p.set_defaults(run=speed)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
