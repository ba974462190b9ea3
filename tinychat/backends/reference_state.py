"""Verbs of layers with a state, on the torch reference: fp32, row by row in the order of a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tinychat.backends.interface import MemorySpec, Span, state_place
from tinychat.network.recurrence import DeltaConfig, MambaConfig


class StateOps:
    """Part of `ReferenceBackend`: `rows`, `spans` are those of the step."""

    memories: tuple[MemorySpec, ...]
    pools: list[Any]
    rows: list[slice]
    spans: tuple[Span, ...]

    def short_conv(self, bcx, weight, conv, layer):
        b, c, x = bcx.chunk(3, dim=-1)
        x, out = b * x, []
        for rows, state, kept in self._passes(layer):
            y, seen = convolved(x[rows], state, weight)
            for i, to in kept:
                to.copy_(seen[i + 1 : i + conv.width].flatten())
            out.append(y)
        return c * torch.cat(out)

    def delta_rule(self, qkv, beta, alpha, weights, delta, layer):
        out = []
        beta, decay = beta.sigmoid(), torch.exp(weights.decay * F.softplus(alpha + weights.dt))
        for rows, state, kept in self._passes(layer):
            heads, before = state.split([delta.values * delta.key_dim, (delta.width - 1) * delta.channels])
            y, seen = convolved(qkv[rows], before, weights.conv)
            q, k, v = delta_heads(F.silu(y), delta)
            heads, to = heads.view(-1, delta.key_dim, delta.value_dim), dict(kept)
            for i in range(len(y)):
                heads = heads * decay[rows][i, :, None, None]
                change = (v[i] - torch.einsum("hkv,hk->hv", heads, k[i])) * beta[rows][i, :, None]
                heads = heads + k[i][..., None] * change[:, None]
                out.append(torch.einsum("hkv,hk->hv", heads, q[i]).flatten())
                if i in to:
                    to[i].copy_(torch.cat([heads.flatten(), seen[i + 1 : i + delta.width].flatten()]))
        return torch.stack(out)

    def mamba(self, x, weights, mamba, layer, eps):
        m, w, out = mamba, weights, []
        gate, xbc, steps = x.split([m.values, m.channels, m.n_heads], dim=-1)
        steps = F.softplus(steps + w.dt).clamp(m.least, m.most)
        for rows, state, kept in self._passes(layer):
            heads, before = state.split([m.values * m.state, (m.width - 1) * m.channels])
            y, seen = convolved(xbc[rows], before, w.conv)
            v, b, c = mamba_heads(F.silu(y if w.bias is None else y + w.bias), m)
            heads, to = heads.view(-1, m.state, m.head_dim), dict(kept)
            decay, change = torch.exp(w.decay * steps[rows]), steps[rows][..., None] * v
            for i in range(len(v)):
                heads = heads * decay[i, :, None, None] + b[i][..., None] * change[i][:, None]
                y = torch.einsum("hsd,hs->hd", heads, c[i]) + w.skip[:, None] * v[i]
                out.append(y.flatten())
                if i in to:
                    to[i].copy_(torch.cat([heads.flatten(), seen[i + 1 : i + m.width].flatten()]))
        return gated(torch.stack(out), gate, w.norm, m, eps)

    def multiplied(self, x, sizes, factors):
        return x * torch.cat([torch.full((n,), f) for n, f in zip(sizes, factors, strict=True)])

    def behind(self, x, layer):
        out = torch.empty_like(x)
        for rows, state, kept in self._passes(layer):
            out[rows] = torch.cat([state[None], x[rows][:-1]])
            for i, to in kept:
                to.copy_(x[rows][i])
        return out

    def recall(self, layer, size):
        out = torch.empty(self.rows[-1].stop, size)
        for rows, state, _ in self._passes(layer):
            out[rows] = state
        return out

    def leave(self, x, layer):
        for rows, _, kept in self._passes(layer):
            for i, to in kept:
                to.copy_(x[rows][i])

    def join(self, a, b):
        return torch.cat([a, b], dim=-1)

    def norm_gated(self, x, weight, gate, eps):
        heads = x.unflatten(-1, (-1, len(weight)))
        return (heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + eps) * weight).flatten(1) * F.silu(
            gate
        )

    def sigmoid_mul(self, x, gate):
        return (x.unflatten(-1, (gate.shape[-1], -1)) * gate.sigmoid()[..., None]).flatten(1)

    def _passes(self, layer: int) -> Iterator[tuple[slice, torch.Tensor, list[tuple[int, torch.Tensor]]]]:
        """Rows of each span, the layer's state before them, and where the states behind rows are kept."""
        memory, index = state_place(self.memories, layer)
        pool = self.pools[memory].states
        for rows, span in zip(self.rows, self.spans, strict=True):
            states: Any = span.memories[memory]
            before = pool[states.source, index].clone() if states.source >= 0 else torch.zeros(pool.shape[2])
            slots = enumerate(states.kept.tolist())
            yield rows, before, [(i, pool[slot, index]) for i, slot in slots if slot >= 0]


def convolved(
    x: torch.Tensor, before: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [T, C] behind those before them through a causal convolution: [T, C], and all rows that it saw."""
    seen = torch.cat([before.view(-1, x.shape[1]), x])
    return sum(
        (w * seen[i : i + len(x)] for i, w in enumerate(weight.view(x.shape[1], -1).T)), torch.zeros(())
    ), seen


def mamba_heads(xbc: torch.Tensor, m: MambaConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values of each head [..., n_heads, head_dim], and its group's B and C: [..., n_heads, state]."""
    v, b, c = xbc.split([m.values, m.groups * m.state, m.groups * m.state], dim=-1)
    b, c = (x.unflatten(-1, (m.groups, -1)).repeat_interleave(m.n_heads // m.groups, dim=-2) for x in (b, c))
    return v.unflatten(-1, (-1, m.head_dim)), b, c


def gated(
    y: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, m: MambaConfig, eps: float
) -> torch.Tensor:
    """What a state-space layer gives [..., values], with its gate and norm."""
    if m.gated or weight is None:
        y = y * F.silu(gate)
    if weight is None:
        return y
    groups = y.unflatten(-1, (m.groups, -1))
    y = (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    return y if m.gated else y * F.silu(gate)


def delta_heads(qkv: torch.Tensor, delta: DeltaConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of each value head: [..., n_values, key_dim or value_dim]."""
    keys = delta.n_keys * delta.key_dim
    q, k, v = qkv.split([keys, keys, delta.values], dim=-1)
    each = delta.n_values // delta.n_keys

    def unit(x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(-1, (-1, delta.key_dim))
        x = x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)
        return torch.cat([x] * each, dim=-2) if delta.tiled else x.repeat_interleave(each, dim=-2)

    return unit(q) * delta.key_dim**-0.5, unit(k), v.unflatten(-1, (-1, delta.value_dim))
