"""The torch reference: fp32 on dequantized weights, plain, slow, obviously right. The truth for every other
backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tinychat.backends import BLOCK, Step
from tinychat.config import ModelConfig, RopeConfig
from tinychat.formats import Checkpoint
from tinychat.models import FAMILIES
from tinychat.prepare import WeightPolicy


class _Loader:
    """Gives a model file its weights as torch tensors (weight, bias)."""

    def __init__(self, checkpoint: Checkpoint, policy: WeightPolicy):
        self.checkpoint, self.policy = checkpoint, policy

    def vector(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.checkpoint.vector(name)))

    def linear(self, *names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts = [self.policy.linear(self.checkpoint, n) for n in names]
        weight = torch.cat([torch.from_numpy(p.dequantize()) for p in parts])
        if all(p.bias is None for p in parts):
            return weight, None
        bias = [np.zeros(p.shape[0], np.float32) if p.bias is None else p.bias for p in parts]
        return weight, torch.from_numpy(np.concatenate(bias).astype(np.float32))

    def embedding(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.from_numpy(self.policy.embedding(self.checkpoint, name).dequantize()), None

    def head(self, name: str, tied_to: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        head = self.policy.head(self.checkpoint, name)
        if head is None:
            return tied_to
        bias = None if head.bias is None else torch.from_numpy(head.bias)
        return torch.from_numpy(head.dequantize()), bias


class ReferenceBackend:
    """Implements `Backend` and, eagerly, `Ops`."""

    name = "reference"
    row_independent = False  # torch chooses another matmul for another row count
    max_rows = 512

    def __init__(
        self, checkpoint: Checkpoint, policy: WeightPolicy | None = None, threads: int | None = None
    ):
        if threads:
            torch.set_num_threads(threads)
        self.cfg: ModelConfig = checkpoint.config
        self.family = FAMILIES[self.cfg.family]
        self.weights = self.family.load(_Loader(checkpoint, policy or WeightPolicy()), self.cfg)
        self.kv = torch.empty(0)
        self._rope: dict[RopeConfig, torch.Tensor] = {}

    # Backend

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "isa": "torch",
            "act_bits": 32,
            "kv_bits": 32,
            "threads": torch.get_num_threads(),
        }

    def kv_bytes_per_block(self) -> int:
        return self.cfg.n_layers * 2 * BLOCK * self.cfg.n_kv_heads * self.cfg.head_dim * 4

    def allocate_kv(self, n_blocks: int) -> None:
        c = self.cfg
        self.kv = torch.empty((2, c.n_layers, n_blocks * BLOCK, c.n_kv_heads, c.head_dim))

    def copy_block(self, src: int, dst: int) -> None:
        self.kv[:, :, dst * BLOCK : (dst + 1) * BLOCK] = self.kv[:, :, src * BLOCK : (src + 1) * BLOCK]

    @torch.inference_mode()
    def step(self, step: Step) -> np.ndarray:
        self._begin(step)
        return self.family.forward(self, self.cfg, self.weights).numpy()

    def step_greedy(self, step: Step) -> np.ndarray:
        # numpy's argmax takes the first (lowest id) on a tie; torch promises nothing.
        return self.step(step).argmax(axis=1).astype(np.int32)

    def close(self) -> None:
        self.weights, self.kv = None, torch.empty(0)

    def _begin(self, step: Step) -> None:
        self.current = step
        end = step.length + len(step.token_ids)
        table = torch.from_numpy(step.block_table.astype(np.int64))
        slots = (table[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:end]
        self.read_slots, self.write_slots = slots, slots[step.length :]
        self.ids = torch.from_numpy(step.token_ids.astype(np.int64))
        self.positions = step.position + torch.arange(len(step.token_ids), dtype=torch.float64)

    # Ops

    def embed(self, weight, scale=1.0):
        return weight[0][self.ids] * scale

    def rms_norm(self, x, weight, eps, add_to=None):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
        return y if add_to is None else add_to + y

    def linear(self, x, weight, add_to=None):
        y = F.linear(x, *weight)
        return y if add_to is None else add_to + y

    def split_heads(self, qkv, cfg):
        q, k, v = qkv.split([n * cfg.head_dim for n in (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)], dim=-1)
        return tuple(t.unflatten(-1, (-1, cfg.head_dim)) for t in (q, k, v))

    def norm_heads(self, q, k, q_weight, k_weight, eps):
        def norm(x, weight):
            spans = x.flatten(1).unflatten(1, (-1, len(weight)))
            return self.rms_norm(spans, weight, eps).reshape(x.shape)

        return norm(q, q_weight), norm(k, k_weight)

    def rope(self, q, k, rope):
        if rope not in self._rope:
            self._rope[rope] = torch.from_numpy(rope.frequencies())
        angle = self.positions[:, None] * self._rope[rope]  # float64: exact enough at any position
        cos, sin = ((rope.magnitude * f(angle)).float()[:, None] for f in (torch.cos, torch.sin))

        def rotate(x):
            a, b, rest = x.split([rope.dim // 2, rope.dim // 2, x.shape[-1] - rope.dim], dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

        return rotate(q), rotate(k)

    def attention(self, q, k, v, layer):
        self.kv[0, layer, self.write_slots] = k
        self.kv[1, layer, self.write_slots] = v
        keys, values = (self.kv[i, layer, self.read_slots].transpose(0, 1)[None] for i in (0, 1))
        t, end = q.shape[0], keys.shape[2]
        own = (end - t + torch.arange(t))[:, None]
        mask = torch.arange(end) <= own
        if window := self.cfg.window_of(layer):
            mask &= torch.arange(end) > own - window
        q, cap = q.transpose(0, 1)[None], self.cfg.attn_soft_cap
        if cap:
            scale = self.cfg.attn_scale or q.shape[-1] ** -0.5
            per_kv = q.shape[1] // keys.shape[1]
            keys, values = (x.repeat_interleave(per_kv, dim=1) for x in (keys, values))
            scores = cap * torch.tanh(q @ keys.transpose(2, 3) * scale / cap)
            y = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ values
        else:
            y = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, scale=self.cfg.attn_scale, enable_gqa=True
            )
        return y[0].transpose(0, 1).flatten(1)

    def silu_mul(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_mul(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    def lm_head(self, x, weight, scale=1.0):
        y, cap = F.linear(x[self.current.logits_from :], *weight) * scale, self.cfg.logit_soft_cap
        return cap * torch.tanh(y / cap) if cap else y
