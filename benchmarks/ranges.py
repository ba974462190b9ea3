"""What rounding costs in single linears, on text that calibration never saw: errors of outputs, in minutes.

    python benchmarks/ranges.py --work DIR                    # layers 1 and 4 of the demo model
    python benchmarks/ranges.py --work DIR --layers 0 --windows 8

A change of how ranges, scales or codes are chosen shows here long before perplexity does (`quality.py`). For
each linear the inputs of the float network are multiplied with themselves over the calibration text, and over
the first 20 windows of `quality.py`'s text. A weight W is rounded by the former; printed is the energy of
(W - Ŵ)·x over that of W·x by the latter, in 10⁻⁴, as the geometric mean over linears.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from quality import LENGTH, held_out_text

from tinychat.formats import open_checkpoint
from tinychat.hub import store
from tinychat.network.checkpoint import Checkpoint
from tinychat.quantize import calibration
from tinychat.quantize.block import ALPHAS, SCALE_LIMIT, Options
from tinychat.quantize.forward import Forward, read_block
from tinychat.quantize.grids import Grid
from tinychat.quantize.rounding import Metric, Rounded, compensated, nearest, refine

ROWS = 256  # of each weight
HELD_OUT = 20  # windows
GRIDS = {
    "4 bits g32": Grid(4, 32),
    "4 bits g64": Grid(4, 64),
    "3 bits g64": Grid(3, 64),
    "2 bits g64": Grid(2, 64),
}


def moments(
    checkpoint: Checkpoint, windows: torch.Tensor, layers: list[int]
) -> dict[tuple[int, str], torch.Tensor]:
    """Mean xxᵀ of each linear's inputs in the float network: (layer, name) → [in, in]."""
    f, found = Forward(checkpoint.config), {}
    x = f.embed(torch.from_numpy(checkpoint.linear("model.embed_tokens").dequantize()), windows)
    for layer in range(max(layers) + 1):
        w = read_block(checkpoint, layer)
        for at in range(0, len(x), 8):
            part = x[at : at + 8]
            for half in f.halves(layer):
                known = {half.start: part}
                for group in half.groups if layer in layers else ():
                    known[group.input] = read = f.value(group.input, w, known)
                    products = read.flatten(0, 1).T @ read.flatten(0, 1) / windows.numel()
                    for name in group.names:
                        found[layer, name] = found.get((layer, name), 0) + products
                part = f.value(half.end, w, known)
            x[at : at + 8] = part
    return found


def plain(w: torch.Tensor, h: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round to nearest on whole ranges."""
    return nearest(w, grid).dequantize()


def searched(w: torch.Tensor, h: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round to nearest on ranges that the inputs' squares choose."""
    metric = Metric.diagonal(h.diagonal())
    return refine(w, metric, compensated(w, metric, grid)).dequantize()


def scaled(w: torch.Tensor, h: torch.Tensor, grid: Grid) -> torch.Tensor:
    """AWQ's scales and what follows them, judged by the error on the calibration text."""
    metric, best = Metric.of(h, grid, Options(lambda k: grid).damp), None
    for alpha in ALPHAS:
        s = h.diagonal().sqrt().clamp_min(1e-5).pow(alpha)
        s = (s / (s.max() * s.min()).sqrt()).clamp(1 / SCALE_LIMIT, SCALE_LIMIT)
        trial: Rounded = compensated(w * s, metric.scaled(s), grid)
        error = metric.scaled(s).loss(w * s, trial)
        if best is None or error < best[0]:
            best = error, trial, s
    _, trial, s = best
    return refine(w * s, metric.scaled(s), trial).dequantize() / s


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="Folder for what is downloaded.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--windows", type=int, default=calibration.COUNT, help="Windows to calibrate on.")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(store.resolve(args.model))
    ids = np.asarray(checkpoint.tokenizer().encode(held_out_text(args.work)))
    held_out = torch.from_numpy(ids[: HELD_OUT * LENGTH].reshape(-1, LENGTH))
    fitted = torch.from_numpy(calibration.windows(checkpoint.tokenizer(), count=args.windows))
    by, truth = (moments(checkpoint, w, args.layers) for w in (fitted, held_out))
    weights = {
        (layer, n): w for layer in args.layers for n, w in read_block(checkpoint, layer).linear.items()
    }
    print("| grid | RTN | RTN, ranges searched | AWQ |")
    print("|---|---|---|---|")
    for name, grid in GRIDS.items():
        cells = []
        for way in (plain, searched, scaled):
            logs = []
            for key, whole in weights.items():
                w, h = whole[:: max(1, len(whole) // ROWS)][:ROWS].contiguous(), truth[key]
                d = w - way(w, by[key], grid)
                logs.append(math.log(float(((d @ h) * d).sum() / ((w @ h) * w).sum())))
            cells.append(f"{1e4 * math.exp(sum(logs) / len(logs)):.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
