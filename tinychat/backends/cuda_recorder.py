"""A model's ops, written down as kernel launches in a `Program`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat.backends import cuda_recurrence as recurrence
from tinychat.backends.interface import MemorySpec, place_of, state_place
from tinychat.base.errors import UnsupportedModelError
from tinychat.kernels_cuda import experts, layout
from tinychat.kernels_cuda.linear import DeviceLinear
from tinychat.kernels_cuda.program import Buffer, Program
from tinychat.network.config import AttentionConfig, ModelConfig, RopeConfig
from tinychat.network.family import Family


@dataclass(eq=False)
class Value:
    """A handle: `floats` holds it in fp32, `halves` as linears read it; either may be missing. A token has
    `each` rows of it: one, or one with each expert that it takes.
    """

    cols: int
    floats: Buffer | None = None
    halves: Buffer | None = None
    each: int = 1


@dataclass(eq=False)
class Heads:
    """A part of a qkv value, and how it is to be rotated."""

    qkv: Value
    attention: AttentionConfig
    rope: RopeConfig | None = None


class Recorder:
    """Implements `Ops` by writing down what to launch."""

    def __init__(self, program: Program, memories: tuple[MemorySpec, ...]):
        self.program, self.memories = program, memories
        self.tables: dict[RopeConfig, Buffer] = {}

    def embed(self, weight, scale=1.0, norm_eps=0.0):
        (w,) = weight
        return Value(w.shape.k, floats=self.program.embed(w, scale))

    def rms_norm(self, x, weight, eps, add_to=None):
        if add_to is not None:
            self.program.rms_norm_add(x.floats, weight, x.cols, eps, add_to.floats)
            return Value(x.cols, floats=add_to.floats)
        return Value(x.cols, halves=self.program.rms_norm(x.floats, weight, x.cols, eps))

    def linear(self, x, weight, add_to=None):
        cols = sum(w.shape.n for w in weight)
        out = self.program.floats(cols) if add_to is None else add_to.floats
        column = 0
        for w in weight:
            self.program.linear(w, self._input(x, w), out, column, cols, add_to is not None)
            column += w.shape.n
        return Value(cols, floats=out)

    def split_heads(self, qkv, attention):
        return Heads(qkv, attention), Heads(qkv, attention), Heads(qkv, attention)

    def norm_heads(self, q, k, q_weight, k_weight, eps):
        c, qkv = q.attention, q.qkv
        offset = 0
        for weight, heads in ((q_weight, c.n_heads), (k_weight, c.n_kv_heads)):
            n = weight.size // 4  # a head's, or all heads' as one
            self.program.norm_heads(qkv.floats, weight, n, offset, heads * c.head_dim // n, qkv.cols, eps)
            offset += heads * c.head_dim
        return q, k

    def rope(self, q, k, rope):
        if rope not in self.tables:
            self.tables[rope] = self.program.rope_table(rope.frequencies(), rope.magnitude)
        return Heads(q.qkv, q.attention, rope), Heads(k.qkv, k.attention, rope)

    def attention(self, q, k, v, attention, layer, sinks=None):
        table = self.tables[q.rope] if q.rope else None
        pairs = len(q.rope.frequencies()) if q.rope else 0
        memory, place = place_of(self.memories, layer)
        a = attention
        out = self.program.attend(
            q.qkv.floats, table, pairs, memory, place, a.window, a.scale or a.head_dim**-0.5, a.soft_cap,
            sinks, a.slope, a.original,
        )  # fmt: skip
        return Value(a.n_heads * a.head_dim, halves=out)

    def _missing(self, *args):
        raise NotImplementedError  # `check` refuses models with these before

    norm_values = gelu_columns = norm_columns = embed_onto = scaled = _missing
    behind = recall = leave = join = keep = _missing  # `CudaBackend` runs no layer that predicts further
    tanh = times = summed = resized = mix_streams = correct_streams = cut_gates = _missing

    def short_conv(self, bcx, weight, conv, layer):
        out = recurrence.short_conv(self._layer(conv, layer), bcx.floats, weight)
        return Value(conv.channels, halves=out)

    def delta_rule(self, qkv, beta, alpha, weights, delta, layer):
        w, inputs = weights, [v.floats for v in (qkv, beta, alpha)]
        out = recurrence.delta_rule(self._layer(delta, layer), *inputs, w.conv, w.decay, w.dt)
        return Value(delta.values, floats=out)

    def mamba(self, x, weights, mamba, layer, eps):
        w, m = weights, mamba
        y = recurrence.state_space(self._layer(m, layer), x.floats, w.conv, w.bias, w.decay, w.dt, w.skip)
        each = m.values // m.groups
        out = self.program.norm_gated(y, w.norm, x.floats, each, m.groups, x.cols, eps, m.gated)
        return Value(m.values, halves=out)

    def norm_gated(self, x, weight, gate, eps):
        n = weight.size // 4
        out = self.program.norm_gated(x.floats, weight, gate.floats, n, x.cols // n, gate.cols, eps)
        return Value(x.cols, halves=out)

    def multiplied(self, x, sizes, factors):
        columns = self.program.upload(np.repeat(np.array(factors, np.float32), sizes))
        if x.floats is not None:
            self.program.multiply(x.floats, columns, x.cols)
        else:
            self.program.multiply_halves(x.halves, columns, x.cols)
        return x

    def _layer(self, config, layer):
        return recurrence.Layer(self.program, config, *state_place(self.memories, layer))

    def gated_heads(self, qkv, attention):
        queries = attention.n_heads * attention.head_dim
        heads, gates = self.program.split_gates(qkv.floats, qkv.cols, queries, attention.head_dim)
        q, k, v = self.split_heads(Value(qkv.cols - queries, floats=heads), attention)
        return q, k, v, Value(queries, floats=gates)

    def sigmoid_mul(self, x, gate):
        self.program.sigmoid_mul(x.halves, gate.floats, x.cols, gate.cols)
        return x

    def relu_square(self, up):
        return Value(up.cols, halves=self.program.relu_square(up.floats, up.cols, up.each), each=up.each)

    def silu_mul(self, gate_up):
        return self._gate("silu_mul", gate_up)

    def gelu_mul(self, gate_up):
        return self._gate("gelu_mul", gate_up)

    def head_linear(self, x, weight, heads):
        raise NotImplementedError  # `_Trial` refuses it first

    def latent_attention(self, q, absorbed, row, norm, eps, attention, layer):
        raise NotImplementedError

    def route(self, scores, n, normalize, sigmoid=False, bias=None, scale=1.0, each=None, groups=(1, 1)):
        rule = experts.Rule(normalize, sigmoid, bias, scale, each, groups)
        return experts.route(self.program, scores.floats, scores.cols, n, rule)

    def expert_linear(self, x, weights, routes):
        alike: dict[tuple[int, layout.Shape], dict[int, DeviceLinear]] = {}  # a launch each
        for e, linears in enumerate(weights):
            column = 0
            for w in linears:
                alike.setdefault((column, w.shape), {})[e] = w
                column += w.shape.n
        out = self.program.floats(column * routes.taken)
        for (first, _), members in alike.items():
            share = routes.taken // x.each
            experts.products(self.program, routes, members, x.halves, share, out, first, column)
        return Value(column, floats=out, each=routes.taken)

    def expert_sum(self, x, routes, add_to=None):
        experts.add(self.program, routes, x.floats, x.cols, add_to.floats)
        return Value(x.cols, floats=add_to.floats)

    def lm_head(self, x, weight, scale=1.0, soft_cap=0.0, first=0):
        (w,) = weight
        self.program.head(w, self._input(x, w), scale, soft_cap)

    def clamped_mul(self, gate_up, limit, alpha):
        return self._gate("clamped_mul", gate_up, float(limit), float(alpha))

    def _gate(self, name, gate_up, *how):
        n, each = gate_up.cols // 2, gate_up.each
        return Value(n, halves=self.program.gate(name, gate_up.floats, n, *how, each=each), each=each)

    def _input(self, x: Value, w: DeviceLinear) -> Buffer:
        """`x` as halves, in the order of the weight's inputs."""
        if x.halves is not None:
            return x.halves if w.perm is None else self.program.reorder(x.halves, x.cols, w.perm)
        assert x.floats is not None  # a value has one or the other
        halves = self.program.halve(x.floats, x.cols, w.perm)
        if w.perm is None:
            x.halves = halves
        return halves


class _Trial:
    """Weights and `Ops` that are names and nothing: a forward pass with them raises UnsupportedModelError for
    what `Recorder` has no kernels for.
    """

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        return lambda *given, **also: given[0] if given else None

    def split_heads(self, qkv, attention):
        return None, None, None

    def rope(self, q, k, rope):
        return rope, rope

    def norm_values(self, v, eps):
        raise _not_yet("norms of values")

    def norm_heads(self, q, k, q_weight, k_weight, eps):
        if q is not None:
            raise _not_yet("norms of queries and keys behind their rotation")
        return q, k

    def attention(self, q, k, v, attention, layer, sinks=None):
        if attention.source >= 0:
            raise _not_yet("layers that attend to another's keys and values")

    def embed_onto(self, x, weight, scale, factor):
        raise _not_yet("an embedding for each layer")

    def head_linear(self, x, weight, heads):
        raise _not_yet("latent attention")

    def gated_heads(self, qkv, attention):
        return None, None, None, None

    def route(self, scores, n, normalize, sigmoid=False, bias=None, scale=1.0, each=None, groups=(1, 1)):
        if groups[0] > experts.MOST_GROUPS:
            raise _not_yet(f"{groups[0]} groups of experts")


def check(family: Family, cfg: ModelConfig) -> None:
    """Raises UnsupportedModelError for a model with parts that there are no kernels for, by their names."""
    trial: Any = _Trial()
    family.forward(trial, cfg, family.load(trial, cfg))


def _not_yet(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"The model has {what}, which a GPU does not run yet.", "Use --device cpu.")
