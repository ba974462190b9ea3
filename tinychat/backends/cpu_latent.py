"""Verbs of latent attention, recorded for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinychat.backends.cpu_pack import PackedLinear
from tinychat.backends.cpu_values import Buffer, Heads, Routes, Value
from tinychat.base.errors import UnsupportedModelError

TILE = 16  # outputs of a weight that lie together


class LatentOps:
    """A part of the recorder's `Ops`."""

    act_bits: int

    def _record(self, uses: list[Buffer | Routes], emit: Callable[[Any], None]) -> None:
        raise NotImplementedError  # the recorder's

    def rope(self, q, k, rope):
        raise NotImplementedError

    def attention(self, q, k, v, attention, layer, sinks=None):
        raise NotImplementedError

    def head_linear(self, x, weight, heads):
        (w,) = weight
        if w.shape[0] // heads % TILE:
            raise UnsupportedModelError(
                f"The model's latent attention has matrices of {w.shape[0] // heads} outputs, which is no"
                f" multiple of {TILE}.",
                "Use --device reference.",
            )
        source, rows, out = x.floats, Buffer(w.shape[1], rows=True, heads=heads), Buffer(w.shape[0])
        self._want(rows, w, self.act_bits)

        def emit(p):
            p.head_linear(w.native, heads, source.native, w.perm, rows.native, out.native)

        self._record([source, rows, out], emit)
        return Value(out.cols, floats=out)

    def latent_attention(self, q, absorbed, row, norm, eps, attention, layer):
        a, parts = attention, [x.floats for x in (q, absorbed, row)]
        qkv, rule = Buffer((a.n_heads + 1) * a.head_dim), (a.latent.rotated, a.latent.neighbours)
        self._record(
            [*parts, qkv], lambda p: p.latent_rows(*(b.native for b in parts), norm, eps, *rule, qkv.native)
        )
        heads, _ = self.rope(Heads(Value(qkv.cols, floats=qkv), a), None, a.rope)
        return self.attention(heads, None, None, a, layer)

    @staticmethod
    def _want(rows: Buffer, w: PackedLinear, bits: int) -> None:
        """Have rows in the form that the weight reads."""
        if w.native.quantized:
            rows.bits, rows.group = bits, w.native.group
        else:
            rows.as_float = True
