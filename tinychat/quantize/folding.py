"""Scales of input channels, folded into what lies before: the norm, or the rows of v and of up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinychat.models import FAMILIES
from tinychat.network.config import ModelConfig
from tinychat.network.family import kept
from tinychat.quantize.forward import Group
from tinychat.quantize.linears import stays
from tinychat.quantize.nodes import BlockWeights

if TYPE_CHECKING:
    import torch


def norm16(name: str, v: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    """A norm's weight (or what else is kept) as a file in fp16 gives it back."""
    import torch

    if any(stays(cfg, layer, name) for layer in (0, cfg.n_layers - 1)):
        return v
    own = kept(FAMILIES[cfg.family], name)
    stored = torch.from_numpy(own.write(v.detach().numpy())).half().float()
    return torch.from_numpy(own.read(stored.numpy().reshape(v.shape)))


def bounded(s: torch.Tensor, group: Group, limit: float) -> torch.Tensor:
    """Scales s [in] > 0, moved together so that they lie around 1, within 1/limit…limit, so that folded norms
    and rows keep their place in fp16; and one for each channel of a KV head, since all query heads of its
    group read the same v.
    """
    s = (s / (s.max() * s.min()).sqrt()).clamp(1 / limit, limit)
    a = group.heads
    if a is None:
        return s
    per_group = s.view(a.n_kv_heads, a.n_heads // a.n_kv_heads, a.head_dim)
    return per_group.log().mean(1, keepdim=True).exp().expand_as(per_group).flatten()


def exact_in_norm(group: Group, w: BlockWeights, s: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    """`s` moved by what fp16 rounds off the folded norm, so that the folding is exact."""
    if group.norm is None:
        return s
    norm = w.norm[group.norm]
    folded = norm16(group.norm, norm / s, cfg)
    usable = (folded != 0) & (norm != 0)
    return (norm / folded).where(usable, s)


def of_rows(s: torch.Tensor, group: Group) -> torch.Tensor:
    """The scales of the rows of `group.rows`, from those of the inputs that they make."""
    a = group.heads
    return s if a is None else s.view(a.n_kv_heads, -1, a.head_dim)[:, 0].flatten()
