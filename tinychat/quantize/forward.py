"""One decoder block in torch over whole windows, in the pieces that a quantizer needs between its linears.

Shapes: S windows, T tokens each, H hidden, D head_dim, F intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tinychat.config import ModelConfig
from tinychat.errors import CheckpointError
from tinychat.formats import Checkpoint
from tinychat.models.llama import linears

if TYPE_CHECKING:
    import torch

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O_PROJ = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
ATTN_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"


@dataclass
class BlockWeights:
    """Weights of one block in float32, by their names inside the block (`mlp.up_proj`)."""

    linear: dict[str, torch.Tensor]
    bias: dict[str, torch.Tensor] = field(default_factory=dict)
    norm: dict[str, torch.Tensor] = field(default_factory=dict)

    def copy(self) -> BlockWeights:
        return BlockWeights(
            {k: v.clone() for k, v in self.linear.items()},
            {k: v.clone() for k, v in self.bias.items()},
            {k: v.clone() for k, v in self.norm.items()},
        )


def read_block(checkpoint: Checkpoint, layer: int) -> BlockWeights:
    """Block `layer` of a checkpoint, dequantized where it is quantized.

    Raises CheckpointError when a weight holds NaN or infinity, by name.
    """
    import torch

    prefix = f"model.layers.{layer}."
    w = BlockWeights({})
    for name in linears(checkpoint.config, layer):
        linear = checkpoint.linear(name)
        short = name.removeprefix(prefix)
        w.linear[short] = torch.from_numpy(finite(linear.dequantize(), name))
        if linear.bias is not None:
            w.bias[short] = torch.from_numpy(finite(np.array(linear.bias, np.float32), name + ".bias"))
    for short in (ATTN_NORM, MLP_NORM):
        w.norm[short] = torch.from_numpy(finite(np.array(checkpoint.vector(prefix + short)), prefix + short))
    return w


def finite(a: np.ndarray, name: str) -> np.ndarray:
    """`a` itself. Raises CheckpointError when it holds NaN or infinity."""
    if not np.isfinite(a).all():
        raise CheckpointError(
            f"The weights of {name} hold NaN or infinity.", "The file is damaged; pull or convert it again."
        )
    return a


class Forward:
    """The float32 forward pass of a Llama block over windows [S, T, H]; causal, positions 0…T−1."""

    def __init__(self, config: ModelConfig, length: int):
        import torch

        self.cfg = config
        angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.from_numpy(
            config.rope.frequencies()
        )
        self.cos, self.sin = angle.cos().float(), angle.sin().float()

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[S, T, H] → [S, T, H]."""
        import torch

        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.cfg.norm_eps) * weight

    def linear(self, x: torch.Tensor, w: BlockWeights, name: str) -> torch.Tensor:
        """[S, T, in] → [S, T, out], with the bias where there is one."""
        import torch

        return torch.nn.functional.linear(x, w.linear[name], w.bias.get(name))

    def attend(self, a: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        """Normed input [S, T, H] → input of the output projection [S, T, heads·D]."""
        import torch

        q, k, v = (self.linear(a, w, n).unflatten(-1, (-1, self.cfg.head_dim)).transpose(1, 2) for n in QKV)
        y = torch.nn.functional.scaled_dot_product_attention(
            self._rotate(q), self._rotate(k), v, is_causal=True, enable_gqa=True
        )
        return y.transpose(1, 2).flatten(2)

    def middle(self, m: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        """Normed input [S, T, H] → input of the down projection [S, T, F]."""
        import torch

        gate, up = (self.linear(m, w, n) for n in GATE_UP)
        return torch.nn.functional.silu(gate) * up

    def block(self, x: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        """[S, T, H] → [S, T, H]."""
        x = x + self.linear(self.attend(self.norm(x, w.norm[ATTN_NORM]), w), w, O_PROJ)
        return x + self.linear(self.middle(self.norm(x, w.norm[MLP_NORM]), w), w, DOWN)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        half = self.cfg.rope.dim // 2
        a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        t = x.shape[2]
        cos, sin = self.cos[:t], self.sin[:t]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
