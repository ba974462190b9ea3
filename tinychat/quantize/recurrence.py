"""Recurrent layers over whole windows [S, T, …] that begin with empty states: many tokens at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinychat.network.ops import MambaWeights
from tinychat.network.recurrence import DeltaConfig, MambaConfig

if TYPE_CHECKING:
    import torch

CHUNK = 64  # tokens whose changes to the states are found together


def conv_over(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A causal convolution of each channel: [S, T, C]; weight: [C, width]."""
    from torch.nn import functional

    c, width = weight.shape
    padded = functional.pad(x.transpose(1, 2), (width - 1, 0))
    return functional.conv1d(padded, weight[:, None], groups=c).transpose(1, 2)


def delta_over(
    qkv: torch.Tensor,
    beta: torch.Tensor,
    alpha: torch.Tensor,
    conv: torch.Tensor,
    decay: torch.Tensor,
    dt: torch.Tensor,
    delta: DeltaConfig,
) -> torch.Tensor:
    """`Ops.delta_rule` in chunks: [S, T, values] (Yang et al., Gated Delta Networks, 2024, section 3.3)."""
    import torch
    from torch.nn import functional

    q, k, v = _heads(functional.silu(conv_over(qkv, conv)), delta)  # [S, heads, T, dim]
    beta, log = (x.transpose(1, 2) for x in (beta.sigmoid(), decay * functional.softplus(alpha + dt)))
    state, out = q.new_zeros(*q.shape[:2], delta.key_dim, delta.value_dim), []
    for start in range(0, q.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        qc, kc, vc, bc = q[:, :, part], k[:, :, part], v[:, :, part], beta[:, :, part, None]
        since = log[:, :, part].cumsum(-1)[..., None]  # of the chunk's beginning, in logarithms
        between = (since - since.transpose(-1, -2)).tril().exp().tril()
        # Each token changes the state by what the others before it have left to change.
        system = ((bc * kc) @ kc.transpose(-1, -2) * between).tril(-1)
        wanted = bc * (vc - since.exp() * (kc @ state))
        change = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        out.append(since.exp() * (qc @ state) + (qc @ kc.transpose(-1, -2) * between) @ change)
        last = since[..., -1:, :]
        state = last.exp() * state + (kc * (last - since).exp()).transpose(-1, -2) @ change
    return torch.cat(out, dim=2).transpose(1, 2).flatten(2)


def mamba_over(x: torch.Tensor, w: MambaWeights, m: MambaConfig, eps: float) -> torch.Tensor:
    """`Ops.mamba` in chunks: [S, T, values] (Dao & Gu, Transformers are SSMs, 2024, section 6)."""
    import torch
    from torch.nn import functional

    z, xbc, steps = x.split([m.values, m.channels, m.n_heads], dim=-1)
    y = conv_over(xbc, w.conv)
    shared = m.groups * m.state
    v, b, c = functional.silu(y if w.bias is None else y + w.bias).split([m.values, shared, shared], dim=-1)
    v = v.unflatten(-1, (-1, m.head_dim)).transpose(1, 2)  # [S, heads, T, dim]
    b, c = (a.unflatten(-1, (m.groups, -1)).transpose(1, 2) for a in (b, c))
    b, c = (a.repeat_interleave(m.n_heads // m.groups, dim=1) for a in (b, c))
    steps = functional.softplus(steps + w.dt).clamp(m.least, m.most)
    given, log = steps.transpose(1, 2)[..., None] * v, (w.decay * steps).transpose(1, 2)
    state, out = v.new_zeros(*v.shape[:2], m.state, m.head_dim), []
    for start in range(0, v.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        bc, cc, gc = b[:, :, part], c[:, :, part], given[:, :, part]
        since = log[:, :, part].cumsum(-1)[..., None]  # of the chunk's beginning, in logarithms
        between = (since - since.transpose(-1, -2)).tril().exp().tril()
        out.append(since.exp() * (cc @ state) + (cc @ bc.transpose(-1, -2) * between) @ gc)
        last = since[..., -1:, :]
        state = last.exp() * state + (bc * (last - since).exp()).transpose(-1, -2) @ gc
    y = (torch.cat(out, dim=2) + w.skip[:, None, None] * v).transpose(1, 2).flatten(2)
    y = y * functional.silu(z) if m.gated or w.norm is None else y
    if w.norm is None:
        return y
    y = y.unflatten(-1, (m.groups, -1))
    y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2) * w.norm
    return y if m.gated else y * functional.silu(z)


def _heads(qkv: torch.Tensor, delta: DeltaConfig) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values for each value head: [S, n_values, T, dim]."""
    import torch

    keys, each = delta.n_keys * delta.key_dim, delta.n_values // delta.n_keys
    q, k, v = qkv.split([keys, keys, delta.values], dim=-1)

    def unit(x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(-1, (-1, delta.key_dim)).transpose(1, 2)
        x = x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)
        return x.repeat(1, each, 1, 1) if delta.tiled else x.repeat_interleave(each, dim=1)

    return unit(q) * delta.key_dim**-0.5, unit(k), v.unflatten(-1, (-1, delta.value_dim)).transpose(1, 2)
