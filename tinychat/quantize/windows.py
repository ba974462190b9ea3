"""Norm, rope and attention in float32 over whole windows: S windows of T tokens, positions 0…T - 1."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from tinychat.network.config import AttentionConfig, RopeConfig

if TYPE_CHECKING:
    import torch


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last axis."""
    import torch

    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@lru_cache(maxsize=8)
def _turns(rope: RopeConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the positions 0…length - 1: each [length, D / 2]."""
    import torch

    with torch.inference_mode(False):  # kept for those who want gradients through them
        angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.from_numpy(rope.frequencies())
        return (rope.magnitude * torch.cos(angle)).float(), (rope.magnitude * torch.sin(angle)).float()


def rotated(x: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """[S, heads, T, D] at the positions 0…T - 1."""
    import torch

    cos, sin = _turns(rope, x.shape[2])
    half = cos.shape[1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionConfig, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention within each window; q, k, v and result [S, heads, T, D]. sinks: [heads]."""
    import torch

    t, cap, window = q.shape[2], a.soft_cap, a.window
    if a.slope:
        far = torch.log1p(torch.floor(torch.arange(t, dtype=torch.float64) / a.original))
        q = q * (1 + a.slope * far).float()[:, None]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if not cap and sinks is None and not 0 < window < t:
        return sdpa(q, k, v, is_causal=True, scale=a.scale, enable_gqa=True)
    distance = torch.arange(t)[:, None] - torch.arange(t)
    seen = (distance >= 0) & (distance < (window or t))
    if not cap and sinks is None:
        return sdpa(q, k, v, attn_mask=seen, scale=a.scale, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (a.scale or q.shape[-1] ** -0.5)
    scores = (cap * torch.tanh(scores / cap) if cap else scores).masked_fill(~seen, -torch.inf)
    if sinks is None:
        return scores.softmax(-1) @ v
    one_more = sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, one_more], dim=-1).softmax(-1)[..., :-1] @ v


def attended_latent(
    q: torch.Tensor,
    absorbed: torch.Tensor,
    row: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    a: AttentionConfig,
) -> torch.Tensor:
    """Attention over compressed rows, as `Ops.latent_attention` has it, over windows [S, T, …]."""
    import torch

    latent, rope = a.latent, a.rope
    assert latent is not None
    assert rope is not None
    order = torch.from_numpy(latent.rotation())
    turned = q.unflatten(-1, (a.n_heads, -1))[..., latent.plain :][..., order]
    compressed, position = row.split([latent.rank, latent.rotated], dim=-1)
    queries = torch.cat([turned, absorbed.unflatten(-1, (a.n_heads, -1))], -1).transpose(1, 2)
    keys = torch.cat([position[..., order], rms(compressed, norm, eps)], -1)[:, None]
    keys = rotated(keys, rope)
    y = attended(rotated(queries, rope), keys, keys[..., latent.rotated :], a)
    return y.transpose(1, 2).flatten(2)
