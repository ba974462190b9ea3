"""Mixtures of experts in the torch reference."""

from __future__ import annotations

import torch


class ExpertOps:
    """A part of the reference's `Ops`."""

    def linear(self, x, weight, add_to=None):
        raise NotImplementedError  # the backend's

    def route(self, scores, n, normalize, sigmoid=False, bias=None, scale=1.0, each=None, groups=(1, 1)):
        weights = scores.sigmoid() if sigmoid else scores.softmax(-1)
        # sorted rather than topk, which promises nothing on a tie
        chosen = weights if bias is None else weights + bias
        if groups[0] > 1:
            chosen = _within(chosen, *groups, best=1 if bias is None else 2)
        experts = chosen.sort(dim=-1, descending=True, stable=True).indices[:, :n]
        weights = weights.gather(-1, experts)
        total = weights.sum(-1, keepdim=True) + (1e-6 if sigmoid else 0.0)
        weights = (weights / total if normalize else weights) * scale
        return experts, weights if each is None else weights * each[experts]

    def expert_linear(self, x, weights, routes):
        experts, _ = routes
        x = x[:, None].expand(-1, experts.shape[1], -1) if x.dim() == 2 else x
        y = x.new_empty(*experts.shape, weights[0][0].shape[0])
        for e in experts.unique().tolist():
            y[experts == e] = self.linear(x[experts == e], weights[e])
        return y

    def expert_sum(self, x, routes, add_to=None):
        y = (x * routes[1][..., None]).sum(1)
        return y if add_to is None else add_to + y


def _within(chosen: torch.Tensor, n: int, taken: int, best: int) -> torch.Tensor:
    """What experts [T, experts] are chosen by, minus infinity outside of the `taken` best of n groups: those
    with the largest sum of `best` of their experts.
    """
    each = chosen.unflatten(-1, (n, -1))
    sums = each.sort(dim=-1, descending=True).values[..., :best].sum(-1)
    groups = sums.sort(dim=-1, descending=True, stable=True).indices[:, :taken]
    seen = torch.zeros_like(sums, dtype=torch.bool).scatter(1, groups, True)
    return each.masked_fill(~seen[..., None], -torch.inf).flatten(1)
