"""What a long prompt does to an answer that is running: the gaps between its tokens.

    python benchmarks/parallel.py [--shape llama-3.2-1b] [--prompt 2000] [--threads N] [--json OUT.json]

One thread reads an answer token by token. When it has said some, another asks for an answer to a prompt of
--prompt tokens. The gaps between two tokens of the first are printed: alone, and while the prompt is read;
and how long the prompt's chunks took, which a step beside the answer may last at least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path

import numpy as np

from tinychat.base.events import TextDelta
from tinychat.base.load_options import LoadOptions
from tinychat.base.machine import available_memory
from tinychat.engine.engine import Engine
from tinychat.engine.sampling import SamplingParams
from tinychat.loading import make_backend
from tinychat.synthetic import SyntheticCheckpoint

BEFORE = 12  # tokens that the answer says alone, first and last


def measure(engine: Engine, vocab: int, n_prompt: int) -> dict[str, float]:
    """Seconds: gaps of an answer alone and beside a prompt, the prompt's chunks, and its first token."""
    ids = np.random.default_rng(0).integers(0, vocab, n_prompt + 32).tolist()
    steps: list[tuple[float, int]] = []  # seconds and rows of those that read the prompt
    execute = engine.scheduler._execute

    def timed(parts) -> None:
        began = time.perf_counter()
        execute(parts)
        chunk = sum(n for rows, n in parts if rows.prompt)
        if chunk and at:
            steps.append((time.perf_counter() - began, chunk))

    engine.scheduler._execute = timed
    at: list[float] = []  # when the running answer's tokens came
    first: list[float] = []
    ask, answered = threading.Event(), threading.Event()

    def other() -> None:
        ask.wait()
        began = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=1)
        for event in engine.generate(engine.branch(), ids[32:], params):
            if isinstance(event, TextDelta):
                first.append(time.perf_counter() - began)
        answered.set()

    thread = threading.Thread(target=other)
    thread.start()
    left = BEFORE
    for event in engine.generate(engine.branch(), ids[:32], SamplingParams(temperature=0)):
        if isinstance(event, TextDelta):
            at.append(time.perf_counter())
            if len(at) == BEFORE:
                ask.set()
            left -= answered.is_set()
            if not left:
                break
    thread.join()
    gaps = np.diff(at)
    beside = gaps[BEFORE - 1 : -BEFORE]
    return {
        "prompt_tokens": n_prompt,
        "gap_alone": statistics.median(gaps[: BEFORE - 1]),
        "gap_beside_median": statistics.median(beside),
        "gap_beside_largest": float(max(beside)),
        "tokens_said_beside": len(beside),
        "step_with_chunk_median": statistics.median(s for s, _ in steps),
        "step_with_chunk_largest": max(s for s, _ in steps),
        "chunk_rows_median": statistics.median(n for _, n in steps),
        "prompt_first_token": first[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    checkpoint = SyntheticCheckpoint(args.shape)
    backend = make_backend(checkpoint, LoadOptions(device="cpu", threads=args.threads))
    engine = Engine(backend, checkpoint.tokenizer(), args.prompt + 512, more_bytes=available_memory)
    for _ in engine.generate(engine.branch(), [1] * 64, SamplingParams(temperature=0, max_tokens=4)):
        pass  # warm
    result = {"shape": args.shape, **measure(engine, checkpoint.config.vocab_size, args.prompt)}
    backend.close()
    for name, value in result.items():
        shown = f"{value * 1000:.0f} ms" if isinstance(value, float) and "rows" not in name else value
        print(f"{name.replace('_', ' '):<26}{shown}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
