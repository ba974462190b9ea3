"""The torch reference: fp32 on dequantized weights, plain, slow, obviously right. The truth for every other
backend.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tinychat.backends.guessed import spread
from tinychat.backends.interface import (
    BLOCK,
    STRETCH,
    Slots,
    Step,
    Tails,
    memories_of,
    place_of,
    tail_of,
    with_tails,
)
from tinychat.backends.reference_experts import ExpertOps
from tinychat.backends.reference_kv4 import Kv4Pool
from tinychat.backends.reference_latent import LatentOps
from tinychat.backends.reference_memory import KvPool, StatePool, pool_slots, rotate
from tinychat.backends.reference_state import StateOps
from tinychat.base import machine
from tinychat.kernels_cpu import _native
from tinychat.models import FAMILIES, predictor
from tinychat.network import eagle
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import AttentionConfig, ModelConfig, RopeConfig
from tinychat.network.eagle import Head
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import Linear


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


class ReferenceBackend(ExpertOps, LatentOps, StateOps):
    """Implements `Backend` and, eagerly, `Ops`."""

    name = "reference"
    row_independent = False  # torch chooses another matmul for another row count
    max_rows = 512
    max_spans = 512
    survives_fork = False  # torch's threads are lost in a fork
    step_largest = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        policy: WeightPolicy | None = None,
        threads: int | None = None,
        kv_bits: int = 32,
        predicts: bool = False,
        head: Head | None = None,
    ):
        """kv_bits: 32, or 16, 8 or 4 to keep keys and values as the fast backends do.
        predicts: have the layer that predicts further, if there is one. head: have this one in its place.
        """
        if threads:
            torch.set_num_threads(threads)
        self.cfg: ModelConfig = checkpoint.config if predicts else checkpoint.config.without_further
        self._guessed = head.ids if head else None  # what the head's outputs stand for
        if head is not None:
            self.cfg = head.onto(checkpoint.config)
        self.predicts = self.cfg.further is not None
        self._of_head: dict[str, Any] = {}
        self.memories = memories_of(self.cfg)
        if kv_bits == 4:
            self.memories = with_tails(self.memories)
        self.family = FAMILIES[self.cfg.family]
        policy = policy or WeightPolicy()
        self.weights = self.family.load(_Loader(checkpoint, policy), self.cfg)
        if head is not None:
            self.weights = replace(self.weights, further=eagle.load(_Loader(head, policy), self.cfg))
            self._of_head["head"] = head.fingerprint()
        self.kv_bits = kv_bits
        tails = {spec.of: KvPool(spec, 16) for spec in self.memories if spec.kind == "tail"}
        self.pools: list[Any] = []
        for m, spec in enumerate(self.memories):
            if spec.kind == "state":
                self.pools.append(StatePool(spec))
            elif spec.kind == "tail":
                self.pools.append(tails[spec.of])
            else:
                self.pools.append(Kv4Pool(spec, tails[m]) if m in tails else KvPool(spec, kv_bits))
        self._rope: dict[RopeConfig, torch.Tensor] = {}
        self.sources = {a.source for a in self.cfg.attentions}
        self.exact: dict[
            tuple[int, int], torch.Tensor
        ] = {}  # of a step's spans, for layers without their own

    # Backend

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "isa": "torch",
            "act_bits": 32,
            "kv_bits": self.kv_bits,
            "threads": torch.get_num_threads(),
            **({"predicts": True, **self._of_head} if self.predicts else {}),
        }

    def kv_heads(self, memory: int = 0) -> tuple[int, int]:
        spec = self.memories[memory]
        return len(spec.layers), spec.kv_heads

    def kv_bytes_per_block(self, memory: int = 0) -> int:
        return self.pools[memory].bytes_per_block

    def allocate_kv(self, n_blocks: int, memory: int = 0) -> None:
        self.pools[memory].allocate(n_blocks)

    def copy_block(self, src: int, dst: int, memory: int = 0) -> None:
        self.pools[memory].copy(src, dst)

    def read_blocks(self, block_table: np.ndarray, memory: int = 0) -> np.ndarray:
        return self.pools[memory].read(block_table)

    def write_blocks(self, block_table: np.ndarray, data: np.ndarray, memory: int = 0) -> None:
        self.pools[memory].write(block_table, data)

    def move_slots(
        self,
        block_table: np.ndarray,
        src: np.ndarray,
        dst: np.ndarray,
        memory: int = 0,
        slots: int = 0,
        exact: np.ndarray | None = None,
        fresh: np.ndarray | None = None,
    ) -> None:
        self.pools[memory].move_slots(block_table, src, dst, slots, exact)
        if fresh is not None:
            self.pools[memory].open_blocks(block_table[fresh >= 0], fresh[fresh >= 0])

    def value_spread(
        self, block_table: np.ndarray, weights: np.ndarray, memory: int = 0, exact: np.ndarray | None = None
    ) -> np.ndarray:
        return self.pools[memory].value_spread(block_table, weights, exact)

    def turn_keys(
        self, block_table: np.ndarray, delta: np.ndarray, memory: int = 0, exact: np.ndarray | None = None
    ) -> None:
        ropes = [self.cfg.all_layers[layer].attention.rope for layer in self.memories[memory].layers]
        self.pools[memory].turn_keys(block_table, delta, ropes, exact)

    @torch.inference_mode()
    def step(self, step: Step) -> np.ndarray:
        self._begin(step)
        if step.further:
            logits = predictor(self.cfg)(self, self.cfg, self.weights, step.few).numpy()
            return spread(logits, self.cfg.vocab_size, self._guessed)
        return self.family.forward(self, self.cfg, self.weights).numpy()

    def step_greedy(self, step: Step) -> np.ndarray:
        # numpy's argmax takes the first (lowest id) on a tie; torch promises nothing.
        logits = self.step(step)
        best = logits.argmax(axis=1)  # NaN wins it
        chosen = np.isfinite(logits[np.arange(len(best)), best])
        return np.where(chosen, best, -1).astype(np.int32)

    def free_memory(self) -> int:
        return machine.available_memory()

    def bandwidth(self) -> float:
        return _native.read_bandwidth(machine.cpu_count(), 1 << 29, 3)

    def close(self) -> None:
        self.weights, self.pools = None, []

    def _begin(self, step: Step) -> None:
        ends = np.cumsum([len(span.token_ids) for span in step.spans])
        self.rows = [slice(end - len(s.token_ids), end) for s, end in zip(step.spans, ends, strict=True)]
        self.spans, self.exact = step.spans, {}
        self.ids = torch.from_numpy(np.concatenate([s.token_ids for s in step.spans]).astype(np.int64))
        positions = [s.position + np.arange(len(s.token_ids)) for s in step.spans]
        self.positions = torch.from_numpy(np.concatenate(positions).astype(np.float64))
        spans = zip(self.rows, step.spans, strict=True)
        self.asked = np.concatenate([np.arange(r.start + s.logits_from, r.stop) for r, s in spans])

    def _frequencies(self, rope: RopeConfig) -> torch.Tensor:
        if rope not in self._rope:
            self._rope[rope] = torch.from_numpy(rope.frequencies())
        return self._rope[rope]

    # Ops

    def embed(self, weight, scale=1.0, norm_eps=0.0):
        x = weight[0][self.ids] * scale
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm_eps) if norm_eps else x

    def rms_norm(self, x, weight, eps, add_to=None):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
        return y if add_to is None else add_to + y

    def linear(self, x, weight, add_to=None):
        y = F.linear(x, *weight)
        return y if add_to is None else add_to + y

    def split_heads(self, qkv, attention):
        a = attention
        parts = [
            t.unflatten(-1, (-1, a.head_dim))
            for t in qkv.split([n * a.head_dim for n in a.projected if n], -1)
        ]
        q, k, v = [*parts, parts[-1]][:3] if len(parts) > 1 else (*parts, None, None)
        return q, k, v

    def gated_heads(self, qkv, attention):
        a = attention
        q, kv = qkv.split([2 * a.n_heads * a.head_dim, 2 * a.n_kv_heads * a.head_dim], dim=-1)
        q, gate = q.unflatten(-1, (-1, 2, a.head_dim)).unbind(-2)
        k, v = kv.unflatten(-1, (2, -1, a.head_dim)).unbind(-3)
        return q, k, v, gate.flatten(1)

    def norm_heads(self, q, k, q_weight, k_weight, eps):
        def norm(x, weight):
            if weight is None:
                weight = torch.ones(x.shape[-1])
            spans = x.flatten(1).unflatten(1, (-1, len(weight)))
            return self.rms_norm(spans, weight, eps).reshape(x.shape)

        return norm(q, q_weight), None if k is None else norm(k, k_weight)

    def norm_values(self, v, eps):
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)

    def rope(self, q, k, rope):
        angle = self.positions[:, None] * self._frequencies(rope)  # float64: exact enough at any position
        cos, sin = ((rope.magnitude * f(angle)).float()[:, None] for f in (torch.cos, torch.sin))
        return rotate(q, cos, sin), None if k is None else rotate(k, cos, sin)

    def attention(self, q, k, v, attention, layer, sinks=None):
        """Write the step's keys and values, attend to all that are visible: [rows, heads · head_dim]."""
        memory, index = place_of(self.memories, attention.kept_by(layer))
        pool, tail = self.pools[memory], tail_of(self.memories, memory)
        parts = []
        if attention.slope:
            far = torch.log1p(torch.floor(self.positions / attention.original))
            q = q * (1 + attention.slope * far).float()[:, None, None]
        self.sinks = sinks
        for rows, span in zip(self.rows, self.spans, strict=True):
            kv = [None if x is None else x[rows] for x in (k, v)]
            what = q[rows], *kv, attention, span.memories[memory], pool, index
            parts.append(self._attend(*what) if tail is None else self._attend_4(*what, span.memories[tail]))
        return torch.cat(parts)

    def keep(self, k, v, attention, layer):
        memory, index = place_of(self.memories, layer)
        pool, tail = self.pools[memory], tail_of(self.memories, memory)
        for rows, span in zip(self.rows, self.spans, strict=True):
            slots, end = span.memories[memory], span.memories[memory].length + len(span.token_ids)
            if tail is not None:
                pool.keep(index, k[rows], v[rows], slots, span.memories[tail])
            else:
                where = pool_slots(slots.table)[slots.length : end]
                pool.kv[:, index, where] = pool.stored(torch.stack([k[rows], v[rows]]))

    def _attend(self, q, k, v, attention: AttentionConfig, slots: Slots, pool: KvPool, layer: int):
        """One span's attention. Slots that none of its rows sees are not read."""
        t, end = q.shape[0], slots.length + q.shape[0]
        first = max(0, slots.length + 1 - attention.window) if attention.window else 0
        where = pool_slots(slots.table)[first:end]
        if k is not None:
            for side, x in enumerate((k,) if v is None else (k, v)):
                pool.kv[side, layer, where[-t:]] = pool.stored(x)
        return self._attend_to(
            q, pool.kv[:, layer, where], attention, slots, layer, slots.scored_rows - t, end
        )

    def _attend_4(
        self, q, k, v, attention: AttentionConfig, slots: Slots, pool: Kv4Pool, layer: int, tails: Tails
    ):
        """The same with keys and values in 4 bits: rows read what is near them as it is."""
        end, began = slots.length + q.shape[0], slots.length // STRETCH * STRETCH
        if k is None:  # what the layer that wrote it read exactly
            exact = self.exact[id(tails), layer]
        else:
            exact = pool.keep(layer, k, v, slots, tails)
            if pool.spec.layers[layer] in self.sources:
                self.exact[id(tails), layer] = exact
        stored, out = pool_slots(slots.table), []
        for start in range(began, end, STRETCH):
            own, last = exact[:, start - began :][:, :STRETCH], min(end, start + STRETCH)
            rows = slice(max(0, start - slots.length), last - slots.length)
            first = max(0, max(start, slots.length) + 1 - attention.window) if attention.window else 0
            before = pool.kv[:, layer, stored[first:start]]
            if pool.reads_first and start:
                before[:, :BLOCK] = pool.exact(layer, tails.blocks[:1]) if began else exact[:, :BLOCK]
            kv = torch.cat([before, own[:, max(0, first - start) :]], dim=1)
            scored = rows.start - (q.shape[0] - slots.scored_rows)
            out.append(self._attend_to(q[rows], kv, attention, slots, layer, scored, last))
        return torch.cat(out)

    def _attend_to(self, q, kv, attention: AttentionConfig, slots: Slots, layer: int, scored: int, end: int):
        """Attention of rows of one span over keys and values [2, slots, kv_heads, dim] before `end`, where
        the last row's own slot is. scored: the number of the first of them among the scored rows, negative
        before these.
        """
        keys, values = kv[0].transpose(0, 1)[None], kv[-1].transpose(0, 1)[None]
        if attention.latent is not None:
            values = values[..., attention.latent.rotated :]
        own, first = torch.arange(end - q.shape[0], end)[:, None], end - kv.shape[1]
        there = torch.arange(first, end)
        mask = there <= own
        if attention.window:
            mask &= there > own - attention.window
        mask &= there >= attention.skipped
        self._score(q, keys[0], mask, attention, slots, layer, scored, first)
        if attention.soft_cap or self.sinks is not None:
            p = self._probabilities(q, keys[0], mask, attention)  # [kv_heads, heads of each, rows, slots]
            return torch.einsum("gjrs,gsd->rgjd", p, values[0]).flatten(1)
        y = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values, attn_mask=mask, scale=attention.scale, enable_gqa=True
        )
        return y[0].transpose(0, 1).flatten(1)

    def _score(self, q, keys, mask, attention, slots: Slots, layer: int, scored: int, first: int):
        """Add what those of these rows attended to in a layer that are scored, for eviction. first: slot of
        the first key.
        """
        if slots.scores is None:
            return
        skip = max(0, -scored)
        p = self._probabilities(q[skip:], keys, mask[skip:], attention).sum(1)  # [kv_heads, rows, slots]
        for i, row in enumerate(p.transpose(0, 1).numpy(), max(0, scored)):
            at = i if len(slots.scores) == slots.scored_rows else 0
            slots.scores[at, layer, :, first : first + p.shape[2]] += row

    def _probabilities(self, q, keys, mask, attention):
        """softmax(scale · q kᵀ) with soft cap and sinks: [kv_heads, heads of each, rows, slots]."""
        scale, cap = attention.scale or q.shape[-1] ** -0.5, attention.soft_cap
        groups = q.shape[1] // keys.shape[0]
        logits = torch.einsum("rgjd,gsd->gjrs", q.unflatten(1, (-1, groups)), keys) * scale
        if cap:
            logits = cap * torch.tanh(logits / cap)
        logits = logits.masked_fill(~mask, -torch.inf)
        if self.sinks is None:
            return logits.softmax(-1)
        sink = self.sinks.view(keys.shape[0], -1, 1, 1).expand(-1, -1, q.shape[0], 1)
        return torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]

    def silu_mul(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_mul(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    def relu_square(self, up):
        return F.relu(up).square()

    def gelu_columns(self, gate, x, first):
        return F.gelu(gate, approximate="tanh") * x[:, first : first + gate.shape[1]]

    def norm_columns(self, x, weight, eps):
        return self.rms_norm(x.unflatten(-1, (-1, len(weight))), weight, eps).flatten(1)

    def embed_onto(self, x, weight, scale, factor):
        rows = weight[0][torch.where(self.ids < len(weight[0]), self.ids, 0)]
        return (x + rows * scale) * factor

    def tanh(self, x):
        return torch.tanh(x)

    def times(self, x, weight):
        return x * weight

    def summed(self, xs, factor):
        return torch.stack(list(xs)).sum(0) * factor

    def resized(self, x, like):
        size, now = (t.pow(2).mean(-1, keepdim=True) for t in (like, x))
        return x * size.sqrt() / now.clamp(min=1e-5).sqrt()

    def mix_streams(self, xs, factors):
        n, streams = len(xs), torch.stack(list(xs), 1)
        return list((streams + factors.unflatten(1, (n, n)) @ streams).unbind(1))

    def correct_streams(self, xs, x, factors):
        return [old + (1 + by[:, None]) * (x - xs[0]) for old, by in zip(xs, factors.unbind(1), strict=True)]

    def cut_gates(self, gate_up, deviations):
        gate, up = gate_up.chunk(2, dim=-1)
        cutoff = gate.mean(-1, keepdim=True) + gate.std(-1, keepdim=True, unbiased=False) * deviations
        return torch.cat([F.relu(gate - cutoff), up], -1)

    def scaled(self, x, weight):
        return x * weight

    def clamped_mul(self, gate_up, limit, alpha):
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)

    def lm_head(self, x, weight, scale=1.0, soft_cap=0.0, first=0):
        y = F.linear(x[self.asked], *weight) * scale
        if first:
            y[:, first:] = -torch.inf
        return soft_cap * torch.tanh(y / soft_cap) if soft_cap else y
