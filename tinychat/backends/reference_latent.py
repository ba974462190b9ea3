"""Latent attention in the torch reference."""

from __future__ import annotations

import torch


class LatentOps:
    """A part of the reference's `Ops`."""

    def rms_norm(self, x, weight, eps, add_to=None):
        raise NotImplementedError  # the backend's

    def rope(self, q, k, rope):
        raise NotImplementedError

    def attention(self, q, k, v, attention, layer, sinks=None):
        raise NotImplementedError

    def head_linear(self, x, weight, heads):
        each = weight[0].unflatten(0, (heads, -1))  # [heads, out, in]
        x = x.unflatten(-1, (heads, -1))[..., : each.shape[-1]]
        return torch.einsum("thi,hoi->tho", x, each).flatten(1)

    def latent_attention(self, q, absorbed, row, norm, eps, attention, layer):
        a, parts = attention, attention.latent
        order = torch.from_numpy(parts.rotation())
        turned = q.unflatten(-1, (a.n_heads, -1))[..., parts.plain :][..., order]
        compressed, rotated = row.split([parts.rank, parts.rotated], dim=-1)
        q = torch.cat([turned, absorbed.unflatten(-1, (a.n_heads, -1))], dim=-1)
        k = torch.cat([rotated[:, order], self.rms_norm(compressed, norm, eps)], dim=-1)[:, None]
        return self.attention(*self.rope(q, k, a.rope), None, a, layer)
