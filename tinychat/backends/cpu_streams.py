"""Verbs of models whose residual is several streams, recorded for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinychat.backends.cpu_values import Buffer, Routes, Value


class StreamOps:
    """A part of the recorder's `Ops`."""

    def _record(self, uses: list[Buffer | Routes], emit: Callable[[Any], None]) -> None:
        raise NotImplementedError  # the recorder's

    def tanh(self, x):
        floats = x.floats
        self._record([floats], lambda p: p.tanh(floats.native))
        return x

    def times(self, x, weight):
        source, out = x.floats, Buffer(x.cols)
        self._record([source, out], lambda p: p.times(source.native, weight, out.native))
        return Value(out.cols, floats=out)

    def summed(self, xs, factor):
        parts, out = [self._plain(x) for x in xs], Buffer(xs[0].cols)

        def emit(p):
            p.sum([b.native.floats if b.rows else b.native for b in parts], factor, out.native)

        self._record([*parts, out], emit)
        return Value(out.cols, floats=out)

    def resized(self, x, like):
        floats, other = x.floats, like.floats
        self._record([floats, other], lambda p: p.resize(floats.native, other.native))
        return x

    def mix_streams(self, xs, factors):
        given, by, out = [x.floats for x in xs], factors.floats, [Buffer(x.cols) for x in xs]

        def emit(p):
            p.mix_streams([b.native for b in given], by.native, [b.native for b in out])

        self._record([*given, by, *out], emit)
        return [Value(b.cols, floats=b) for b in out]

    def correct_streams(self, xs, x, factors):
        streams, now, by = [x.floats for x in xs], x.floats, factors.floats
        self._record(
            [*streams, now, by],
            lambda p: p.correct_streams([b.native for b in streams], now.native, by.native),
        )
        return list(xs)

    def cut_gates(self, gate_up, deviations):
        floats = gate_up.floats
        self._record([floats], lambda p: p.cut_gates(floats.native, deviations))
        return gate_up

    @staticmethod
    def _plain(x: Value) -> Buffer:
        """The buffer that has a value in fp32, among what linears read if nowhere else."""
        if x.floats is not None:
            return x.floats
        assert x.rows is not None  # a value has one form at least
        x.rows.as_float, x.consumed = True, True
        return x.rows
