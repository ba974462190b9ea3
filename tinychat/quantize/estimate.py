"""Estimates of what quantizing takes: memory, by what is kept; time, by what is multiplied and swept."""

from __future__ import annotations

import time

from tinychat.models import FAMILIES
from tinychat.network.config import ModelConfig

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
    a, h, f = cfg.attentions[0], cfg.hidden_size, max(layer.mlp.size for layer in cfg.layers)
    block = 4 * (h * a.head_dim * (2 * a.n_heads + 2 * a.n_kv_heads) + 3 * h * f)
    kept = 2 * h + f if method == "gptq" else 3 * h  # activations of a token
    return 4 * block + 4 * kept * n_tokens + 8 * 4 * max(h, f) ** 2 + 4 * cfg.vocab_size * h


def seconds(cfg: ModelConfig, n_tokens: int, length: int, method: str) -> float:
    """Seconds for all blocks, if the machine stays as busy as it is now. length: tokens of a window."""
    weights = products = 0
    for layer in range(cfg.n_layers):
        shapes = FAMILIES[cfg.family].linears(cfg, layer).values()
        weights += sum(n * k for n, k in shapes)
        products += sum(k * k for k in {k for _, k in shapes})
    if not n_tokens:
        return PLAIN * weights / 1e6
    passes, sums, swept = WORK[method]
    a = cfg.attentions[0]
    attention = 2 * length * a.n_heads * a.head_dim * cfg.n_layers
    work = n_tokens * (passes * (2 * weights + attention) + 2 * sums * 1.5 * products)
    return work / rate() + swept * weights / 1e6


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
