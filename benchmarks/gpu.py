"""The CUDA engine on this machine's GPU, against the bandwidth of a device copy in the same run.

    python benchmarks/gpu.py [--shape llama-3-8b ...] [--form q4_k ...] [--torch] [--out benchmarks/results]

For each shape and form (real dimensions, random weights: 4-bit in groups of 128, or a form of `tinychat
bench`): load time; a token at several contexts and its share of the copy's bandwidth, bytes counted as
`tinychat bench` does; a token of which the argmax, the largest logits or all come back; one whose kernels do
not overlap, where they do; steps of 2 to 16 rows against one; prefill; each linear alone.
--torch adds what torch's fp16 needs for the matrix products alone, in a CUDA graph: a floor for any fp16
engine. Raw figures, with the GPU's and the driver's name, go to a JSON file; nothing is measured without a
GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from dataclasses import astuple
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.backends.interface import BLOCK, Step
from tinychat.base.errors import TinychatError
from tinychat.bench import weight_bytes_per_token
from tinychat.kernels_cuda import linear
from tinychat.models import FAMILIES
from tinychat.network.weight_policy import WeightPolicy
from tinychat.synthetic import DEFAULT, FORMS, SHAPES, SyntheticCheckpoint

ROUNDS = 5
LINEAR_ROWS = (1, 5, 16, 512)
REPEAT = 20  # launches of a linear in a graph
WARM_UP = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="*", default=["llama-2-7b", "llama-3-8b"], choices=SHAPES)
    parser.add_argument("--form", nargs="*", default=[DEFAULT], choices=[DEFAULT, *FORMS])
    parser.add_argument("--context", nargs="*", type=int, default=[0, 2000, 8000])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--kv-bits", type=int, choices=[16, 8], default=16)
    parser.add_argument("--torch", action="store_true", help="torch's fp16 products too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    o = parser.parse_args()
    try:
        from tinychat.backends.cuda import CudaBackend
        from tinychat.backends.cuda_device import open_modules

        modules = open_modules()
        for shape, form in product(o.shape, o.form):
            checkpoint = SyntheticCheckpoint(shape, form)
            began = time.perf_counter()
            backend = CudaBackend(checkpoint, WeightPolicy(), kv_bits=o.kv_bits, modules=modules)
            result = {
                "shape": shape,
                "form": form,
                "date": time.strftime("%Y-%m-%d %H:%M"),
                "load_s": time.perf_counter() - began,
                **measure(
                    backend, weight_bytes_per_token(checkpoint, WeightPolicy()), o.context, o.prompt, BLOCK
                ),
            }
            backend.close()
            if o.torch:
                result["torch_fp16"] = torch_products(SHAPES[shape], (1, o.prompt))
            o.out.mkdir(parents=True, exist_ok=True)
            gpu = re.sub(r"\W+", "-", result["gpu"]).strip("-").lower()
            path = o.out / f"gpu-{gpu}-{shape}-{form}-kv{o.kv_bits}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps(result, indent=1))
            print(f"written to {path}", file=sys.stderr)
    except TinychatError as e:
        print(f"{e.what}\n{e.todo}", file=sys.stderr)
        return e.exit_code
    return 0


def measure(
    backend: Any, weight_bytes: int, contexts: list[int], n_prompt: int, n_steps: int
) -> dict[str, Any]:
    """Every figure of a loaded CudaBackend; seconds are medians of ROUNDS."""
    c, device = backend.cfg, backend._device
    reach = max(n_prompt, max(contexts) + 16 * (ROUNDS + WARM_UP) + n_steps * ROUNDS)
    n_blocks = -(-reach // BLOCK)
    backend.allocate_kv(n_blocks)
    table = np.arange(n_blocks, dtype=np.int32)
    ids = np.random.default_rng(0).integers(0, c.vocab_size, reach, dtype=np.int32)
    kv_bytes = backend.kv_bytes_per_block() / BLOCK
    bandwidth = [backend.bandwidth()]

    ways = {
        "argmax": backend.step_greedy,
        "largest": lambda s: backend.step_largest(s, 0.7),
        "whole row": backend.step,
    }

    def step(at: int, rows: int, logits: int = 1, way: str = "argmax") -> None:
        ways[way](Step.of(ids[at : at + rows], at, at, table, rows - logits))

    def fill(end: int) -> float:
        began = time.perf_counter()
        for at in range(0, end, backend.max_rows):
            step(at, min(backend.max_rows, end - at))
        return time.perf_counter() - began

    def steps(at: int, rows: int, way: str = "argmax") -> float:
        """Seconds a step, over n_steps at nearly the same place; the graph exists by then."""
        for _ in range(WARM_UP):
            step(at, rows, rows, way)
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for _ in range(n_steps):
                step(at, rows, rows, way)
            times.append((time.perf_counter() - began) / n_steps)
        return statistics.median(times)

    fill(n_prompt)
    prefill = statistics.median(fill(n_prompt) for _ in range(ROUNDS))
    decode = []
    for context in contexts:
        fill(context)
        seconds = steps(context, 1)
        moved = weight_bytes + kv_bytes * context
        decode.append({"context": context, "ms": 1e3 * seconds, "gb_s": moved / seconds / 1e9})
    one = steps(contexts[0], 1)
    apart = None
    if device.overlaps:
        try:
            device.overlaps = False
            backend._steps.graphs.clear()
            apart = 1e3 * steps(contexts[0], 1)
        finally:
            device.overlaps = True
            backend._steps.graphs.clear()
    several = {str(rows): 1e3 * steps(contexts[0], rows) for rows in (2, 3, 4, 5, 8, 9, 16)}
    bandwidth.append(backend.bandwidth())
    best = max(bandwidth)
    for row in decode:
        row["fraction_of_bandwidth"] = row["gb_s"] / best
    return {
        "gpu": device.name,
        "capability": device.capability,
        "driver": "CUDA {}.{}".format(*device.driver_version),
        "compiler": backend._modules.cache.compiler.name,
        "kv_bits": backend.kv_bits,
        "copy_bandwidth_gb_s": bandwidth,
        "weight_bytes_per_token": weight_bytes,
        "decode": decode,
        "step_ms_with_kernels_one_after_the_other": apart,  # null: on this GPU they always are
        "step_ms_by_rows": {"1": 1e3 * one, **several},
        "five_rows_against_one": several["5"] / (1e3 * one),
        "token_ms_by_what_is_copied_back": {w: 1e3 * steps(contexts[0], 1, w) for w in ways},
        "prefill": {"n_tokens": n_prompt, "ms": 1e3 * prefill, "tok_s": n_prompt / prefill},
        "linears": linears(backend),
    }


def linears(backend: Any) -> list[dict[str, Any]]:
    """Each distinct linear alone, on the device's clock: GB/s of its packed bytes. Every layer's weight is
    read in turn, so that no cache holds it. Many rows: in both variants.
    """
    found: dict[Any, list[Any]] = {}
    for w in backend._steps.program.weights:
        found.setdefault(w.shape, []).append(w)
    rows_out, device = [], backend._device
    for shape, weights in found.items():
        narrow = "linear_1x64" if shape.form.bits == 32 else "linear_2x64"
        for rows, name in [
            (r, n) for r in LINEAR_ROWS for n in ((None, narrow) if r > linear.MANY else (None,))
        ]:
            x = device.allocate(2 * rows * linear.row_length(shape.k))
            y = device.allocate(4 * rows * shape.n)
            device.clear(x)

            def work(weights=weights, x=x, y=y, rows=rows, shape=shape, name=name) -> None:
                for i in range(REPEAT):
                    w = weights[i % len(weights)]
                    linear.launch(backend._modules, w, x, y, rows, shape.n, name=name)

            work()
            graph = device.capture(work)
            graph.replay()
            seconds = min(device.seconds(graph.replay) for _ in range(ROUNDS)) / REPEAT
            form = " ".join(map(str, astuple(shape.form)))
            rows_out.append(
                {
                    "form": form, "n": shape.n, "k": shape.k, "rows": rows,
                    "variant": name or linear.variant(shape, rows, device.processors)[0], "us": 1e6 * seconds,
                    "gb_s": sum(shape.sizes) / seconds / 1e9,
                    "tflop_s": 2 * rows * shape.n * shape.k / seconds / 1e12,
                }
            )  # fmt: skip
    return rows_out


def torch_products(cfg: Any, rows: tuple[int, ...], device: str = "cuda", dtype: str = "float16") -> dict:
    """Milliseconds of one pass of the model's matrix products alone, as torch does them."""
    import torch

    kind = getattr(torch, dtype)
    shapes = list(FAMILIES[cfg.family].linears(cfg, 0).values())
    layers = [[torch.randn(n, k, device=device, dtype=kind) for n, k in shapes] for _ in range(cfg.n_layers)]
    head = torch.randn(cfg.vocab_size, cfg.hidden_size, device=device, dtype=kind)
    result = {}
    for m in rows:
        inputs = {k: torch.randn(m, k, device=device, dtype=kind) for _, k in shapes}

        def products(inputs=inputs) -> None:
            for layer in layers:
                for w in layer:
                    torch.nn.functional.linear(inputs[w.shape[1]], w)
            torch.nn.functional.linear(inputs[cfg.hidden_size][-1:], head)

        run = products
        products()
        if device == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                products()
            run = graph.replay
        times = []
        for _ in range(WARM_UP + ROUNDS):
            began = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
        result[str(m)] = statistics.median(times[WARM_UP:])
    return result


if __name__ == "__main__":
    sys.exit(main())
