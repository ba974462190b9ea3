"""One decoder block in torch over whole windows, in the pieces that a quantizer needs between its linears.

Shapes: S windows, T tokens each, H hidden, D head_dim, F intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tinychat.base.errors import CheckpointError
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig

if TYPE_CHECKING:
    import torch

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O_PROJ = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
FUSED = {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": GATE_UP}
"""Linears that some families store as one; here each part is a linear of its own."""
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Norms:
    """Names of the norms before and behind attention and MLP, inside a block; None: there is none."""

    attn_in: str | None = "input_layernorm"
    attn_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None


_GEMMA = Norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
NORMS = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "olmo2": Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}


@dataclass
class BlockWeights:
    """Weights of one block in float32, by their names inside the block (`mlp.up_proj`)."""

    linear: dict[str, torch.Tensor]
    bias: dict[str, torch.Tensor] = field(default_factory=dict)
    norm: dict[str, torch.Tensor] = field(default_factory=dict)
    layer: int = 0

    def copy(self) -> BlockWeights:
        return BlockWeights(
            {k: v.clone() for k, v in self.linear.items()},
            {k: v.clone() for k, v in self.bias.items()},
            {k: v.clone() for k, v in self.norm.items()},
            self.layer,
        )


def read_block(checkpoint: Checkpoint, layer: int) -> BlockWeights:
    """Block `layer` of a checkpoint, dequantized where it is quantized, fused linears apart.

    Raises CheckpointError when a weight holds NaN or infinity, by name.
    """
    import torch

    family, cfg, prefix = FAMILIES[checkpoint.config.family], checkpoint.config, f"model.layers.{layer}."
    w = BlockWeights({}, layer=layer)
    for name in family.linears(cfg, layer):
        linear = checkpoint.linear(name)
        short = name.removeprefix(prefix)
        weight = torch.from_numpy(finite(linear.dequantize(), name))
        w.linear |= apart(cfg, short, weight)
        if linear.bias is not None:
            bias = torch.from_numpy(finite(np.array(linear.bias, np.float32), name + ".bias"))
            w.bias |= apart(cfg, short, bias)
    for name in family.norms(cfg, layer):
        w.norm[name.removeprefix(prefix)] = torch.from_numpy(finite(np.array(checkpoint.vector(name)), name))
    return w


def apart(cfg: ModelConfig, name: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a fused linear by their names; any other one as it is. rows: [out, …]."""
    if name not in FUSED:
        return {name: rows}
    if name == "mlp.gate_up_proj":
        sizes = [len(rows) // 2] * 2
    else:
        a = cfg.layers[0].mixer
        sizes = [n * a.head_dim for n in (a.n_heads, a.n_kv_heads, a.n_kv_heads)]
    return dict(zip(FUSED[name], rows.split(sizes), strict=True))


def stored(names: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """A block's linears as its family stores them: name → the parts that it is made of."""
    return {n: FUSED.get(n, (n,)) for n in names}


def finite(a: np.ndarray, name: str) -> np.ndarray:
    """`a` itself. Raises CheckpointError when it holds NaN or infinity."""
    if not np.isfinite(a).all():
        raise CheckpointError(
            f"The weights of {name} hold NaN or infinity.", "The file is damaged; pull or convert it again."
        )
    return a


class Forward:
    """The float32 forward pass of a block over windows [S, T, H]; causal, positions 0…T−1."""

    def __init__(self, config: ModelConfig, length: int):
        self.cfg, self.length = config, length
        self.norms = NORMS.get(config.family, Norms())
        self.gelu = config.family.startswith("gemma")
        self._tables: dict = {}

    def embed(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [S, T] → [S, T, H]."""
        x = table[ids]
        return x if self.cfg.embed_scale == 1 else x * self.cfg.embed_scale

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[…, n] → […, n]."""
        import torch

        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.cfg.norm_eps) * weight

    def linear(self, x: torch.Tensor, w: BlockWeights, name: str) -> torch.Tensor:
        """[S, T, in] → [S, T, out], with the bias where there is one."""
        import torch

        return torch.nn.functional.linear(x, w.linear[name], w.bias.get(name))

    def attention_input(self, x: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        """What q, k and v read: [S, T, H]."""
        return self.norm(x, w.norm[self.norms.attn_in]) if self.norms.attn_in else x

    def mlp_input(self, x: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        """What gate and up read: [S, T, H]."""
        return self.norm(x, w.norm[self.norms.mlp_in]) if self.norms.mlp_in else x

    def attend(self, a: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        """Input of q, k and v [S, T, H] → input of the output projection [S, T, heads·D]."""
        q, k, v = (self.linear(a, w, n) for n in QKV)
        if QK_NORMS[0] in w.norm:
            q, k = (self._norm_heads(x, w.norm[n]) for x, n in zip((q, k), QK_NORMS, strict=True))
        layer = self.cfg.layers[w.layer].mixer
        q, k, v = (x.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for x in (q, k, v))
        if layer.rope is not None:
            q, k = self._rotate(q, layer.rope), self._rotate(k, layer.rope)
        return self._attention(q, k, v, layer).transpose(1, 2).flatten(2)

    def middle(self, m: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        """Input of gate and up [S, T, H] → input of the down projection [S, T, F]."""
        from torch.nn import functional

        gate, up = (self.linear(m, w, n) for n in GATE_UP)
        return (functional.gelu(gate, approximate="tanh") if self.gelu else functional.silu(gate)) * up

    def add_attention(self, x: torch.Tensor, y: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        """The residual behind attention: x and the output projection's y, both [S, T, H]."""
        return self._add(x, y, w, self.norms.attn_out)

    def add_mlp(self, x: torch.Tensor, y: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        """The residual behind the MLP: x and the down projection's y, both [S, T, H]."""
        return self._add(x, y, w, self.norms.mlp_out)

    def block(self, x: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        """[S, T, H] → [S, T, H]."""
        x = self.add_attention(x, self.linear(self.attend(self.attention_input(x, w), w), w, O_PROJ), w)
        return self.add_mlp(x, self.linear(self.middle(self.mlp_input(x, w), w), w, DOWN), w)

    def logits(self, x: torch.Tensor, norm: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """The last block's output […, H] → […, vocab]."""
        import torch

        y, cap = self.norm(x, norm) @ head.T * self.cfg.logit_scale, self.cfg.logit_soft_cap
        return cap * torch.tanh(y / cap) if cap else y

    def _add(self, x, y, w, norm):
        y = self.norm(y, w.norm[norm]) if norm else y
        return x + y if self.cfg.residual_scale == 1 else x + y * self.cfg.residual_scale

    def _norm_heads(self, x, weight):
        return self.norm(x.unflatten(-1, (-1, len(weight))), weight).flatten(-2)

    def _rotate(self, x, rope):
        import torch

        if rope not in self._tables:
            frequencies = torch.from_numpy(rope.frequencies())
            angle = torch.arange(self.length, dtype=torch.float64)[:, None] * frequencies
            self._tables[rope] = tuple((rope.magnitude * f(angle)).float() for f in (torch.cos, torch.sin))
        cos, sin = (table[: x.shape[2]] for table in self._tables[rope])
        half = cos.shape[1]
        a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def _attention(self, q, k, v, layer):
        import torch

        t, cap, scale, window = q.shape[2], layer.soft_cap, layer.scale, layer.window
        sdpa = torch.nn.functional.scaled_dot_product_attention
        if not cap and not 0 < window < t:
            return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        distance = torch.arange(t)[:, None] - torch.arange(t)
        seen = (distance >= 0) & (distance < (window or t))
        if not cap:
            return sdpa(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = cap * torch.tanh(q @ k.transpose(2, 3) * (scale or q.shape[-1] ** -0.5) / cap)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
