"""One layer of experts in every kind of weights, and what it should give."""

from __future__ import annotations

import numpy as np
from programs import CODED, random_coded, random_dense, random_linear

EXPERTS, TAKEN, HIDDEN, SIZE = 7, 3, 64, 96


def layer(rng: np.random.Generator, kind: str):
    """Gate, up and down of each expert, in a kind of weights; and the group."""
    out = []
    for e in range(EXPERTS):
        shapes = ((SIZE, HIDDEN), (SIZE, HIDDEN), (HIDDEN, SIZE))
        if kind == "mixed":  # each expert its own: 4 bits, 8 bits, fp32
            make = (
                lambda n, k: random_linear(rng, "zeros", n, k, 32),
                lambda n, k: random_linear(rng, "int8", n, k, 32),
                lambda n, k: random_dense(rng, "fp32", n, k),
            )[e % 3]
            out.append([make(n, k) for n, k in shapes])
        elif kind == "act-order":
            w = [random_linear(rng, "zeros", n, k, 32) for n, k in shapes]
            orders = [rng.permutation(k).astype(np.int32) for _, k in shapes]
            if e % 2:  # gate and up of one order, as GPTQ makes them
                orders[1] = orders[0].copy()
            out.append([type(a)(**{**vars(a), "perm": p}) for a, p in zip(w, orders, strict=True)])
        elif kind in CODED:
            out.append([random_coded(rng, kind, n, k, bias=True) for n, k in shapes])
        elif kind in ("fp32", "bf16"):
            out.append([random_dense(rng, kind, n, k) for n, k in shapes])
        else:
            out.append([random_linear(rng, kind, n, k, 32, bias=True) for n, k in shapes])
    return out


def truth(weights, x, scores, seen, normalize=True):
    """What the experts of a layer give, in float64, row by row. seen(w, v): v as the linear w sees it."""

    def linear(w, v):
        y = w.dequantize().astype(np.float64) @ seen(w, v.astype(np.float32)).astype(np.float64)
        return y if w.bias is None else y + w.bias

    out = np.zeros((len(x), HIDDEN))
    for i, row in enumerate(x):
        p = np.exp(scores[i].astype(np.float64) - scores[i].max())
        p /= p.sum()
        taken = np.argsort(-p, kind="stable")[:TAKEN]
        for e in taken:
            gate, up, down = weights[e]
            g, u = linear(gate, row), linear(up, row)
            y = linear(down, g / (1 + np.exp(-g)) * u)
            out[i] += y * p[e] / (p[taken].sum() if normalize else 1)
    return out
