"""Recorder of a model's ops as a program of SIMD kernels; ops that do not overlap share their buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinychat.backends.cpu_latent import LatentOps
from tinychat.backends.cpu_pack import PackedLinear
from tinychat.backends.cpu_streams import StreamOps
from tinychat.backends.cpu_values import Buffer, Heads, Record, Routes, Value
from tinychat.backends.interface import MemorySpec, place_of, state_place, tail_of
from tinychat.kernels_cpu import _native
from tinychat.network.config import AttentionConfig, RopeConfig


@dataclass
class Recorder(LatentOps, StreamOps):
    """Implements `Ops` by writing down what to run. Norms and activations take the form that is read."""

    memories: tuple[MemorySpec, ...]
    act_bits: int
    sources: tuple[int, ...] = ()  # layers whose keys and values others read behind them
    records: list[Record] = field(default_factory=list)
    tables: dict[RopeConfig, Buffer] = field(default_factory=dict)
    kept: list[Buffer] = field(default_factory=list)  # tables of earlier parts

    # Ops

    def embed(self, weight, scale=1.0, norm_eps=0.0):
        (w,) = weight
        out = Buffer(w.shape[1])
        self._record([out], lambda p: p.embed(w.native, out.native, scale))
        if norm_eps:
            ones = np.ones(out.cols, np.float32)
            self._record([out], lambda p: p.rms_norm_rows(out.native, ones, norm_eps))
        return Value(out.cols, floats=out)

    def rms_norm(self, x, weight, eps, add_to=None):
        if add_to is not None:
            x, y = x.floats, add_to.floats
            self._record([x, y], lambda p: p.rms_norm_add(x.native, weight, eps, y.native))
            return Value(y.cols, floats=y)
        out, source = Value(x.cols, rows=Buffer(x.cols, rows=True)), x.floats
        self._record(
            [source, out.rows],
            lambda p: p.rms_norm(source.native, weight, eps, out.rows.native, out.tail),
        )
        return out

    def linear(self, x, weight, add_to=None):
        parts, column = [], 0
        for w in weight:
            parts.append((w.native, self._input(x, w, self.act_bits), column))
            column += w.shape[0]
        out = Buffer(column) if add_to is None else add_to.floats
        add = None if add_to is None else out
        self._record(
            [b for _, b, _ in parts] + [out],
            lambda p: p.linear([(w, b.native, c) for w, b, c in parts], out.native, add and add.native),
        )
        return Value(column, floats=out)

    def split_heads(self, qkv, attention):
        if attention.source >= 0:
            return Heads(qkv, attention), None, None
        if attention.tied:
            x, out = qkv.floats, Buffer(qkv.cols + attention.n_kv_heads * attention.head_dim)
            self._record([x, out], lambda p: p.repeat_columns(x.native, out.native))
            qkv = Value(out.cols, floats=out)
        return Heads(qkv, attention), Heads(qkv, attention), Heads(qkv, attention)

    def gated_heads(self, qkv, attention):
        a, x = attention, qkv.floats
        heads, gates = Buffer((a.n_heads + 2 * a.n_kv_heads) * a.head_dim), Buffer(a.n_heads * a.head_dim)
        self._record(
            [x, heads, gates], lambda p: p.split_gates(x.native, a.head_dim, heads.native, gates.native)
        )
        return *self.split_heads(Value(heads.cols, floats=heads), a), Value(gates.cols, floats=gates)

    def norm_heads(self, q, k, q_weight, k_weight, eps):
        a, qkv = q.attention, q.qkv.floats
        one = np.ones(a.head_dim, np.float32)
        q_weight, k_weight = (one if w is None else w for w in (q_weight, k_weight))
        if q.rope is not None:  # normed behind the rope, so that attention must not rotate
            at, table = _native.Attention(a.n_heads, a.n_kv_heads, a.head_dim), self.tables[q.rope]
            self._record([qkv, table], lambda p: p.rotate(at, qkv.native, table.native))
            q, k = Heads(q.qkv, a), k and Heads(k.qkv, a)
        cols = [n * a.head_dim for n in a.projected[:2]]
        self._record([qkv], lambda p: p.norm_heads(qkv.native, q_weight, k_weight, *cols, eps))
        return q, k

    def norm_values(self, v, eps):
        a, qkv = v.attention, v.qkv.floats
        one, cols = np.ones(a.head_dim, np.float32), a.n_kv_heads * a.head_dim
        self._record([qkv], lambda p: p.norm_heads(qkv.native, one, one, 0, cols, eps, qkv.cols - cols))
        return v

    def rope(self, q, k, rope):
        if rope not in self.tables:
            table = self.tables[rope] = Buffer(rope.dim)
            frequencies = [float(f) for f in rope.frequencies()]

            def emit(p):
                table.native = p.rope_table(frequencies, rope.magnitude)

            self._record([table], emit)
        return Heads(q.qkv, q.attention, rope), k and Heads(k.qkv, k.attention, rope)

    def attention(self, q, k, v, attention, layer, sinks=None):
        c, qkv = attention, q.qkv.floats
        table = self.tables[q.rope] if q.rope else Buffer(0)  # nothing is rotated
        out = Buffer(c.n_heads * (c.latent.rank if c.latent else c.head_dim))
        at = self._place(c, layer, sinks)
        self._record([qkv, table], lambda p: p.rope_kv(at, qkv.native, table.native))
        self._record([qkv, out], lambda p: p.attention(at, qkv.native, out.native))
        return Value(out.cols, floats=out)

    def keep(self, k, v, attention, layer):
        qkv, table = k.qkv.floats, self.tables[k.rope] if k.rope else Buffer(0)
        at = self._place(attention, layer)
        self._record([qkv, table], lambda p: p.rope_kv(at, qkv.native, table.native))

    def behind(self, x, layer):
        x, out, at = self.as_floats(x), Buffer(x.cols), state_place(self.memories, layer)
        self._record([x, out], lambda p: p.carry(*at, floats_of(x), out.native))
        return Value(out.cols, floats=out)

    def recall(self, layer, size):
        out, at = Buffer(size), state_place(self.memories, layer)
        self._record([out], lambda p: p.carry(*at, None, out.native))
        return Value(size, floats=out)

    def leave(self, x, layer):
        x, at = self.as_floats(x), state_place(self.memories, layer)
        self._record([x], lambda p: p.carry(*at, floats_of(x), None))

    def join(self, a, b):
        out, a, b = Buffer(a.cols + b.cols), self.as_floats(a), self.as_floats(b)
        self._record([a, b, out], lambda p: p.join(floats_of(a), floats_of(b), out.native))
        return Value(out.cols, floats=out)

    def short_conv(self, bcx, weight, conv, layer):
        x, out = bcx.floats, Buffer(conv.channels)
        at, taps = state_place(self.memories, layer), _taps_first(weight, conv.channels)
        self._record([x, out], lambda p: p.short_conv(*at, x.native, taps, conv.width, out.native))
        return Value(out.cols, floats=out)

    def delta_rule(self, qkv, beta, alpha, weights, delta, layer):
        d, inputs = delta, [qkv.floats, beta.floats, alpha.floats]
        at, vectors = state_place(self.memories, layer), [_taps_first(weights.conv, d.channels)]
        vectors += [np.ascontiguousarray(v) for v in (weights.decay, weights.dt)]
        heads = [d.n_keys, d.n_values, d.key_dim, d.value_dim]
        used, gates, out = Buffer(d.channels), Buffer(2 * d.n_values), Buffer(d.values)

        def emit(p):
            given, to = [b.native for b in inputs], (used.native, gates.native, out.native)
            p.delta_rule(*at, heads, d.tiled, given, vectors, d.width, *to)

        self._record([*inputs, used, gates, out], emit)
        return Value(out.cols, floats=out)

    def mamba(self, x, weights, mamba, layer, eps):
        m, w, source = mamba, weights, x.floats
        at, heads = state_place(self.memories, layer), [m.n_heads, m.head_dim, m.state, m.groups]
        vectors = [_taps_first(w.conv, m.channels), w.bias, w.decay, w.dt, w.skip]
        used, gates, out = Buffer(m.channels), Buffer(2 * m.n_heads), Buffer(m.values)
        limits, width = [m.least, m.most], m.values // m.groups

        def emit(p):
            to = (used.native, gates.native, out.native)
            p.mamba(*at, heads, source.native, vectors, m.width, limits, *to)
            p.norm_gated(out.native, w.norm, source.native, eps, width, m.gated or w.norm is None)

        self._record([source, used, gates, out], emit)
        return Value(out.cols, floats=out)

    def multiplied(self, x, sizes, factors):
        return self.times(x, np.repeat(np.float32(factors), sizes))

    def norm_gated(self, x, weight, gate, eps):
        x, gate = x.floats, gate.floats
        self._record([x, gate], lambda p: p.norm_gated(x.native, weight, gate.native, eps))
        return Value(x.cols, floats=x)

    def sigmoid_mul(self, x, gate):
        floats, rows, gate = x.floats, x.rows, gate.floats
        if rows is None:
            self._record([floats, gate], lambda p: p.sigmoid_mul(floats.native, gate.native))
            return Value(x.cols, floats=floats)
        rows.as_float, x.consumed = True, True
        self._record([rows, gate], lambda p: p.sigmoid_mul(rows.native.floats, gate.native))
        return Value(x.cols, rows=rows, changed=True)

    def silu_mul(self, gate_up):
        return self._gate(gate_up, "silu_mul")

    def gelu_mul(self, gate_up):
        return self._gate(gate_up, "gelu_mul")

    def relu_square(self, up):
        source, routes = up.floats, up.floats.routes
        rows, uses = Buffer(up.cols, rows=True, routes=routes), [routes] if routes else []
        self._record(
            [*uses, source, rows],
            lambda p: p.relu_square(source.native, rows.native, routes and routes.native),
        )
        return Value(rows.cols, rows=rows)

    def gelu_columns(self, gate, x, first):
        source, beside, rows = gate.floats, x.floats, Buffer(gate.cols, rows=True)
        self._record(
            [source, beside, rows], lambda p: p.gelu_columns(source.native, beside.native, first, rows.native)
        )
        return Value(rows.cols, rows=rows)

    def norm_columns(self, x, weight, eps):
        floats = x.floats
        self._record([floats], lambda p: p.norm_heads(floats.native, weight, weight, floats.cols, 0, eps))
        return x

    def embed_onto(self, x, weight, scale, factor):
        (w,), source, out = weight, x.floats, Buffer(x.cols)
        self._record(
            [source, out], lambda p: p.embed_onto(source.native, w.native, out.native, scale, factor)
        )
        return Value(out.cols, floats=out)

    def scaled(self, x, weight):
        floats = x.floats
        self._record([floats], lambda p: p.scale_rows(floats.native, weight))
        return x

    def clamped_mul(self, gate_up, limit, alpha):
        return self._gate(gate_up, "clamped_mul", limit, alpha)

    def _gate(self, gate_up, op, *numbers):
        source, routes = gate_up.floats, gate_up.floats.routes
        rows = Buffer(gate_up.cols // 2, rows=True, routes=routes)
        if routes is None:
            self._record([source, rows], lambda p: getattr(p, op)(source.native, rows.native, *numbers))
        else:
            self._record(
                [routes, source, rows],
                lambda p: getattr(p, f"expert_{op}")(routes.native, source.native, rows.native, *numbers),
            )
        return Value(rows.cols, rows=rows)

    def route(self, scores, n, normalize, sigmoid=False, bias=None, scale=1.0, each=None, groups=(1, 1)):
        source, routes = scores.floats, Routes(scores.cols, n)
        rule = (normalize, sigmoid, bias, scale, each, groups)
        self._record([source, routes], lambda p: p.route(source.native, routes.native, *rule))
        return routes

    def expert_linear(self, x, weights, routes):
        columns = [sum(w.shape[0] for w in weights[0][:i]) for i in range(len(weights[0]) + 1)]
        inputs = self._expert_inputs(x, weights, routes)
        out = Buffer(columns[-1], routes=routes)
        used = list({id(b): b for expert in inputs for b in expert}.values())

        def emit(p):
            experts = zip(weights, inputs, strict=True)
            parts = [[(w.native, b.native, c) for w, b, c in zip(*e, columns)] for e in experts]  # noqa: B905
            p.expert_linear(routes.native, parts, out.native)

        self._record([routes, *used, out], emit)
        return Value(out.cols, floats=out)

    def expert_sum(self, x, routes, add_to=None):
        source, out = x.floats, Buffer(x.cols) if add_to is None else add_to.floats
        onto = add_to is not None
        self._record(
            [routes, source, out], lambda p: p.expert_sum(routes.native, source.native, out.native, onto)
        )
        return Value(out.cols, floats=out)

    def lm_head(self, x, weight, scale=1.0, soft_cap=0.0, first=0):
        (w,) = weight
        w = w.first(first) if first else w
        if x.consumed:
            raise NotImplementedError("the head's input is read by another op too")
        x.tail = True
        # The head always reads 16-bit activations: the demo model meets the reference argmax at 97.4 % of
        # positions instead of 96.5 %, and its weights take as long to read (docs/performance.md).
        rows = self._input(x, w, 16)
        self._record([rows], lambda p: p.lm_head(w.native, rows.native, scale, soft_cap))
        return None

    # Building

    def next_part(self) -> None:
        """What is recorded from here on runs in steps of its own."""
        self.records.append(Record([], lambda p: p.next_part()))
        self.kept += self.tables.values()
        self.tables = {}

    def hold(self, b: Buffer) -> None:
        """A buffer is written or read from outside, between what stands before here and what comes behind."""
        self._record([b], lambda p: None)

    def build(self, program: Any) -> Any:
        """Give every buffer memory, reusing what is no longer read, and emit the ops."""
        for i, r in enumerate(self.records):
            for b in r.uses:
                b.first = i if b.first < 0 else b.first
                b.last = i
        tables = set(map(id, [*self.tables.values(), *self.kept]))
        free: dict[tuple, list[Any]] = {}
        for i, r in enumerate(self.records):
            for b in r.uses:
                if b.first == i and b.native is None and id(b) not in tables:
                    spare = free.get(b.key())
                    b.native = spare.pop() if spare else b.allocate(program)
            r.emit(program)
            for b in {id(b): b for b in r.uses}.values():
                if b.last == i and id(b) not in tables:
                    free.setdefault(b.key(), []).append(b.native)
        return program

    def _record(self, uses: list[Buffer | Routes], emit: Callable[[Any], None]) -> None:
        self.records.append(Record(uses, emit))

    def _place(self, c: AttentionConfig, layer: int, sinks: np.ndarray | None = None) -> Any:
        memory, place = place_of(self.memories, c.kept_by(layer))
        tail = tail_of(self.memories, memory)
        return _native.Attention(
            c.n_heads,
            c.n_kv_heads,
            c.head_dim,
            memory,
            place,
            scale=c.scale or 0.0,
            window=c.window,
            cap=c.soft_cap,
            tail=-1 if tail is None else tail,
            sinks=sinks,
            slope=c.slope,
            original=c.original,
            shared=c.source >= 0,
            latent=c.latent.rank if c.latent else 0,
            skipped=c.skipped,
            exact=1 + self.sources.index(c.kept_by(layer)) if c.kept_by(layer) in self.sources else 0,
        )

    @staticmethod
    def as_floats(x: Value) -> Buffer:
        """The buffer that has `x` in fp32 too."""
        if x.floats is not None:
            return x.floats
        assert x.rows is not None
        x.rows.as_float, x.consumed = True, True
        return x.rows

    def _input(self, x: Value, w: PackedLinear, bits: int) -> Buffer:
        """`x` in the form that `w` reads: integers if it is quantized, in the order of its inputs."""
        quantized, group = w.native.quantized, w.native.group
        taken = x.rows is not None and x.rows.bits and (x.rows.bits, x.rows.group) != (bits, group)
        taken = taken or x.changed
        if x.rows is not None and w.perm is None and not (quantized and taken):
            self._want(x.rows, w, bits)  # a norm or activation: its own op writes the form
            x.consumed = True
            return x.rows
        out = Buffer(x.cols, rows=True)
        self._want(out, w, bits)
        perm, tail = w.perm, x.tail
        if x.rows is not None:
            x.rows.as_float = True
            x.consumed = True
            rows = x.rows
            self._record([rows, out], lambda p: p.quantize(rows.native.floats, perm, out.native, False))
        else:
            floats = x.floats
            assert floats is not None  # a value has one form at least
            self._record([floats, out], lambda p: p.quantize(floats.native, perm, out.native, tail))
        return out

    def _expert_inputs(self, x: Value, weights: Any, routes: Routes) -> list[list[Buffer]]:
        """Inputs of each expert's linears: `x` in their form and order, a row for each slot."""
        forms = {(w.native.quantized, w.native.group, w.perm is None) for expert in weights for w in expert}
        x.consumed = True
        source = x.rows
        assert source is not None  # a norm or an activation is what experts read
        if source.routes and len(forms) == 1 and weights[0][0].perm is None:
            self._want(source, weights[0][0], self.act_bits)  # silu_mul writes the form
            return [[source] * len(expert) for expert in weights]
        buffers: dict[tuple, Buffer] = {}
        inputs, orders = [], []
        for expert in weights:
            mine, order = [], {}
            for w in expert:
                same = (i for i, other in enumerate(expert) if _same_order(other.perm, w.perm))
                key = w.native.quantized, w.native.group, next(same)
                if key not in buffers:
                    buffers[key] = Buffer(x.cols, rows=True, routes=routes)
                    self._want(buffers[key], w, self.act_bits)
                mine.append(buffers[key])
                order[id(buffers[key])] = buffers[key], w.perm
            inputs.append(mine)
            orders.append(list(order.values()))
        source.as_float = True
        self._record(
            [routes, source, *buffers.values()],
            lambda p: p.expert_input(
                routes.native, source.native.floats, [[(b.native, perm) for b, perm in o] for o in orders]
            ),
        )
        return inputs


def floats_of(b: Buffer) -> Any:
    """What a buffer holds in fp32."""
    return b.native.floats if b.rows else b.native


def _taps_first(weight: np.ndarray, channels: int) -> np.ndarray:
    """A convolution's [channels, width] with channels side by side: [width, channels]."""
    return np.ascontiguousarray(weight.reshape(channels, -1).T, np.float32)


def _same_order(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)
