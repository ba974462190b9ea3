"""Estimates of what quantizing takes: memory, by what is kept; time, by what is multiplied and swept."""

from __future__ import annotations

import time

from tinychat.network.config import ModelConfig
from tinychat.quantize.linears import quantized, share

# For each method: passes of the calibration text through a block, sums of products of inputs, and seconds in
# which one thread rounds a million weights (measured on SmolLM2: an EPYC of Zen 4, ranges searched).
WORK = {
    "awq": (3.3, 2, 2.0),
    "gptq": (2.0, 1, 0.3),
    "rtn": (1.0, 0, 0.7),
    "smoothquant": (2.0, 0, 0.1),
}
PLAIN = 0.05  # of a million weights rounded to nearest
PROBE = 768  # rows and columns of the product that is timed


def memory(cfg: ModelConfig, n_tokens: int, method: str) -> int:
    """Bytes of one block and the calibration activations."""
    h, f = cfg.hidden_size, max(layer.mlp.size for layer in cfg.layers)
    block = 4 * max(sum(n * k for n, k in quantized(cfg, i).values()) for i in range(cfg.n_layers))
    kept = 2 * h + f if method == "gptq" else 3 * h  # activations of a token
    kept += 2 * h if cfg.n_experts else 0  # what experts are given
    return 4 * block + 4 * kept * n_tokens + 8 * 4 * max(h, f) ** 2 + 4 * cfg.vocab_size * h


def seconds(cfg: ModelConfig, n_tokens: int, length: int, method: str) -> float:
    """Seconds for all blocks, if the machine stays as busy as it is now. length: tokens of a window."""
    weights, seen, products = 0, 0.0, 0.0
    for layer in range(cfg.n_layers):
        linears = quantized(cfg, layer)
        weights += sum(n * k for n, k in linears.values())
        part = {name: share(cfg, layer, name) for name in linears}
        seen += sum(part[name] * n * k for name, (n, k) in linears.items())
        inputs = {(_owner(name), k): part[name] for name, (_, k) in linears.items()}
        products += sum(of * k * k for (_, k), of in inputs.items())
    if not n_tokens:
        return PLAIN * weights / 1e6
    passes, sums, swept = WORK[method]
    a = cfg.attentions[0]
    attention = 2 * length * a.n_heads * a.head_dim * cfg.n_layers
    work = n_tokens * (passes * (2 * seen + attention) + 2 * sums * 1.5 * products)
    return work / rate() + swept * weights / 1e6


def _owner(name: str) -> str:
    """The expert that a linear is of; nothing for others, of which those of a size share an input."""
    return name.rpartition(".")[0] if ".mlp.experts." in name else ""


def rate() -> float:
    """Float operations a second of a matrix product, tried for some hundredths of a second."""
    import torch

    a = torch.ones(PROBE, PROBE)
    a @ a  # the first one starts threads
    started, n = time.monotonic(), 0
    while n < 3 or time.monotonic() - started < 0.05:
        a @ a
        n += 1
    return n * 2 * PROBE**3 / (time.monotonic() - started)


def in_words(bytes_: str, seconds_: float) -> str:
    """Such as "about 9 minutes and 1.1 GB of memory"."""
    minutes = seconds_ / 60
    if minutes < 1.5:
        said = "a minute" if minutes > 0.5 else "less than a minute"
    elif minutes < 90:
        said = f"{minutes:.0f} minutes"
    else:
        said = f"{minutes / 60:.0f} hours"
    about = "" if said.startswith("less") else "about "
    return f"{about}{said} and {bytes_} of memory"
