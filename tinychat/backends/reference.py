"""The torch reference: fp32 on dequantized weights, plain, slow, obviously right. The truth for every other
backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tinychat.backends.interface import BLOCK, Span, Step, memories_of
from tinychat.base.errors import MemoryBudgetError
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig, RopeConfig
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import Linear


def quantize_kv(x: torch.Tensor) -> torch.Tensor:
    """Keys or values [..., head_dim] as an 8-bit cache gives them back: int8 with an fp16 scale for each 32
    channels.
    """
    parts = []
    for g in x.split(32, dim=-1):
        scale = (g.abs().amax(-1, keepdim=True) * np.float32(1 / 127)).half().float()
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        parts.append((g * inverse).round().clamp(-128, 127) * scale)
    return torch.cat(parts, dim=-1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Halves convention, over the first dimensions that cos and sin have pairs for."""
    n = cos.shape[-1]
    a, b, rest = x.split([n, n, x.shape[-1] - 2 * n], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class _Loader:
    """Gives a model file its weights as torch tensors (weight, bias)."""

    def __init__(self, checkpoint: Checkpoint, policy: WeightPolicy):
        self.checkpoint, self.policy = checkpoint, policy

    def vector(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.checkpoint.vector(name)))

    def linear(self, *names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._stacked([self.policy.linear(self.checkpoint, n) for n in names])

    @staticmethod
    def _stacked(parts: list[Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = torch.cat([torch.from_numpy(p.dequantize()) for p in parts])
        if all(p.bias is None for p in parts):
            return weight, None
        bias = [np.zeros(p.shape[0], np.float32) if p.bias is None else p.bias for p in parts]
        return weight, torch.from_numpy(np.concatenate(bias).astype(np.float32))

    def router(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._stacked([self.policy.router(self.checkpoint, name)])

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
    max_spans = 1

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: WeightPolicy | None = None,
        threads: int | None = None,
        kv_bits: int = 32,
    ):
        """kv_bits: 32, or 16 or 8 to keep keys and values as the fast backends do."""
        if threads:
            torch.set_num_threads(threads)
        self.cfg: ModelConfig = checkpoint.config
        self.memories = memories_of(self.cfg)
        self.family = FAMILIES[self.cfg.family]
        self.weights = self.family.load(_Loader(checkpoint, policy or WeightPolicy()), self.cfg)
        self.kv_bits = kv_bits
        self.kv = torch.empty(0)
        self._rope: dict[RopeConfig, torch.Tensor] = {}

    # Backend

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "isa": "torch",
            "act_bits": 32,
            "kv_bits": self.kv_bits,
            "threads": torch.get_num_threads(),
        }

    def kv_heads(self, memory: int = 0) -> tuple[int, int]:
        spec = self.memories[memory]
        return len(spec.layers), spec.kv_heads

    def kv_bytes_per_block(self, memory: int = 0) -> int:
        return self.cfg.n_layers * 2 * BLOCK * self.cfg.n_kv_heads * self.cfg.head_dim * 4

    def allocate_kv(self, n_blocks: int, memory: int = 0) -> None:
        c, before = self.cfg, self.kv
        try:
            self.kv = torch.empty((2, c.n_layers, n_blocks * BLOCK, c.n_kv_heads, c.head_dim))
        except RuntimeError as e:  # what torch says where memory ends
            raise MemoryBudgetError("There is no memory for the KV cache.", "Ask for a smaller --ctx.") from e
        if before.numel() and before.shape[2] < self.kv.shape[2]:
            self.kv[:, :, : before.shape[2]] = before

    def copy_block(self, src: int, dst: int, memory: int = 0) -> None:
        self.kv[:, :, dst * BLOCK : (dst + 1) * BLOCK] = self.kv[:, :, src * BLOCK : (src + 1) * BLOCK]

    def read_blocks(self, block_table: np.ndarray, memory: int = 0) -> np.ndarray:
        blocks = self.kv.unflatten(2, (-1, BLOCK)).permute(2, 0, 1, 3, 4, 5)[block_table.tolist()]
        return blocks.contiguous().numpy().reshape(len(block_table), -1).view(np.uint8)

    def write_blocks(self, block_table: np.ndarray, data: np.ndarray, memory: int = 0) -> None:
        c = self.cfg
        shape = (len(block_table), 2, c.n_layers, BLOCK, c.n_kv_heads, c.head_dim)
        blocks = torch.from_numpy(data.view(np.float32).reshape(shape).copy())
        self.kv.unflatten(2, (-1, BLOCK))[:, :, block_table.tolist()] = blocks.permute(1, 2, 0, 3, 4, 5)

    def move_slots(self, block_table: np.ndarray, src: np.ndarray, dst: np.ndarray, memory: int = 0) -> None:
        layer, head, i = np.nonzero(src >= 0)
        to, from_ = (self._slots(block_table)[a[layer, head, i]] for a in (dst, src))
        self.kv[:, layer, to, head] = self.kv[:, layer, from_, head]

    def value_spread(self, block_table: np.ndarray, weights: np.ndarray, memory: int = 0) -> np.ndarray:
        n = weights.shape[2]
        values = self.kv[1, :, self._slots(block_table)[:n]].transpose(1, 2)  # [layers, kv_heads, n, dim]
        w = torch.from_numpy(weights)
        w = torch.where(w.sum(2, keepdim=True) > 0, w, 1.0)
        mean = (w[..., None] * values).sum(2, keepdim=True) / w.sum(2)[..., None, None]
        return (values - mean).norm(dim=3).numpy()

    def turn_keys(self, block_table: np.ndarray, delta: np.ndarray, memory: int = 0) -> None:
        slots = self._slots(block_table)[: delta.shape[2]]
        for layer in range(self.cfg.n_layers):
            rope = self.cfg.layers[layer].mixer.rope
            if rope is None:
                continue
            keys = self.kv[0, layer, slots]  # [slots, kv_heads, dim]
            angle = torch.from_numpy(delta[layer]).double().T[..., None] * self._frequencies(rope)
            turned = _rotate(keys, angle.cos().float(), angle.sin().float())
            self.kv[0, layer, slots] = self._stored(turned)

    @torch.inference_mode()
    def step(self, step: Step) -> np.ndarray:
        (span,) = step.spans
        self._begin(span)
        return self.family.forward(self, self.cfg, self.weights).numpy()

    def step_greedy(self, step: Step) -> np.ndarray:
        # numpy's argmax takes the first (lowest id) on a tie; torch promises nothing.
        logits = self.step(step)
        best = logits.argmax(axis=1)  # NaN wins it
        chosen = np.isfinite(logits[np.arange(len(best)), best])
        return np.where(chosen, best, -1).astype(np.int32)

    def close(self) -> None:
        self.weights, self.kv = None, torch.empty(0)

    def _begin(self, span: Span) -> None:
        self.current, (self.slots,) = span, span.memories
        slots = self._slots(self.slots.table)[: self.slots.length + len(span.token_ids)]
        self.read_slots, self.write_slots = slots, slots[self.slots.length :]
        self.ids = torch.from_numpy(span.token_ids.astype(np.int64))
        self.positions = span.position + torch.arange(len(span.token_ids), dtype=torch.float64)

    @staticmethod
    def _slots(block_table: np.ndarray) -> torch.Tensor:
        """Pool slots of the logical ones."""
        table = torch.from_numpy(block_table.astype(np.int64))
        return (table[:, None] * BLOCK + torch.arange(BLOCK)).flatten()

    def _frequencies(self, rope: RopeConfig) -> torch.Tensor:
        if rope not in self._rope:
            self._rope[rope] = torch.from_numpy(rope.frequencies())
        return self._rope[rope]

    def _stored(self, x: torch.Tensor) -> torch.Tensor:
        """What the cache gives back of keys or values [..., head_dim]."""
        if self.kv_bits == 32:
            return x
        x = x.clamp(-65504, 65504).half().float()
        return x if self.kv_bits == 16 else quantize_kv(x)

    # Ops

    def embed(self, weight, scale=1.0):
        return weight[0][self.ids] * scale

    def rms_norm(self, x, weight, eps, add_to=None):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
        return y if add_to is None else add_to + y

    def linear(self, x, weight, add_to=None):
        y = F.linear(x, *weight)
        return y if add_to is None else add_to + y

    def split_heads(self, qkv, attention):
        a = attention
        q, k, v = qkv.split([n * a.head_dim for n in (a.n_heads, a.n_kv_heads, a.n_kv_heads)], dim=-1)
        return tuple(t.unflatten(-1, (-1, a.head_dim)) for t in (q, k, v))

    def norm_heads(self, q, k, q_weight, k_weight, eps):
        def norm(x, weight):
            spans = x.flatten(1).unflatten(1, (-1, len(weight)))
            return self.rms_norm(spans, weight, eps).reshape(x.shape)

        return norm(q, q_weight), norm(k, k_weight)

    def rope(self, q, k, rope):
        angle = self.positions[:, None] * self._frequencies(rope)  # float64: exact enough at any position
        cos, sin = ((rope.magnitude * f(angle)).float()[:, None] for f in (torch.cos, torch.sin))
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def attention(self, q, k, v, attention, layer):
        """Write the step's keys and values, attend to all that are visible: [rows, heads · head_dim]."""
        self.kv[0, layer, self.write_slots] = self._stored(k)
        self.kv[1, layer, self.write_slots] = self._stored(v)
        keys, values = (self.kv[i, layer, self.read_slots].transpose(0, 1)[None] for i in (0, 1))
        t, end = q.shape[0], keys.shape[2]
        own = (end - t + torch.arange(t))[:, None]
        mask = torch.arange(end) <= own
        if attention.window:
            mask &= torch.arange(end) > own - attention.window
        self._score(q, keys[0], mask, attention, layer)
        if attention.soft_cap:
            p = self._probabilities(q, keys[0], mask, attention)  # [kv_heads, heads of each, rows, slots]
            return torch.einsum("gjrs,gsd->rgjd", p, values[0]).flatten(1)
        y = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values, attn_mask=mask, scale=attention.scale, enable_gqa=True
        )
        return y[0].transpose(0, 1).flatten(1)

    def _score(self, q, keys, mask, attention, layer):
        """What the step's last rows attended to in one layer, for eviction."""
        slots = self.slots
        if slots.scores is None:
            return
        r = slots.scored_rows
        p = self._probabilities(q[-r:], keys, mask[-r:], attention).sum(1)  # [kv_heads, rows, slots]
        for i, row in enumerate(p.transpose(0, 1).numpy()):
            slots.scores[i if len(slots.scores) == r else 0, layer, :, : p.shape[2]] += row

    def _probabilities(self, q, keys, mask, attention):
        """softmax(scale · q kᵀ) with soft cap, written out: [kv_heads, heads of each, rows, slots]."""
        scale, cap = attention.scale or q.shape[-1] ** -0.5, attention.soft_cap
        groups = q.shape[1] // keys.shape[0]
        logits = torch.einsum("rgjd,gsd->gjrs", q.unflatten(1, (-1, groups)), keys) * scale
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return logits.masked_fill(~mask, -torch.inf).softmax(-1)

    def silu_mul(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_mul(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    def route(self, scores, n, normalize):
        # sorted rather than topk, which promises nothing on a tie
        weights, experts = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        weights, experts = weights[:, :n], experts[:, :n]
        return experts, weights / weights.sum(-1, keepdim=True) if normalize else weights

    def expert_linear(self, x, weights, routes):
        experts, _ = routes
        x = x[:, None].expand(-1, experts.shape[1], -1) if x.dim() == 2 else x
        y = x.new_empty(*experts.shape, weights[0][0].shape[0])
        for e in experts.unique().tolist():
            y[experts == e] = self.linear(x[experts == e], weights[e])
        return y

    def expert_sum(self, x, routes, add_to):
        return add_to + (x * routes[1][..., None]).sum(1)

    def lm_head(self, x, weight, scale=1.0, soft_cap=0.0):
        y = F.linear(x[self.current.logits_from :], *weight) * scale
        return soft_cap * torch.tanh(y / soft_cap) if soft_cap else y
