"""Layers whose tokens pass through a state, on the device: src/recurrence.cu."""

from __future__ import annotations

from dataclasses import dataclass

from tinychat.kernels_cuda.driver import Kernel, Memory
from tinychat.kernels_cuda.inputs import Size
from tinychat.kernels_cuda.linear import row_length
from tinychat.kernels_cuda.pool import Blocks
from tinychat.kernels_cuda.program import Buffer, Program
from tinychat.network.recurrence import ConvConfig, DeltaConfig, MambaConfig, Recurrence

SOURCE = "recurrence.cu"
WARP = 32
VALUES = 8  # of a head, that a warp has
THREADS = 256


@dataclass(frozen=True)
class StateShape:
    """States of layers that are alike. size: numbers of one layer's."""

    layers: int
    size: int
    group = 0  # query heads of a KV head: none

    @property
    def block_bytes(self) -> int:
        """Bytes of one state, all layers."""
        return 4 * self.layers * self.size


class StatePool(Blocks):
    """States of the layers that share a memory. There are none until `resize`."""

    shape: StateShape


def unit(config: Recurrence) -> tuple[str, dict[str, str]]:
    """The source of a layer's kernels, and what it is compiled with."""
    columns = config.key_dim if isinstance(config, DeltaConfig) else 0
    if isinstance(config, MambaConfig):
        columns = config.state
    return SOURCE, {"WIDTH": str(config.width), "COLUMNS": str(columns)}


@dataclass(frozen=True)
class Layer:
    """One layer of a program, and where its states lie: memory, and place in it."""

    program: Program
    config: Recurrence
    memory: int
    place: int

    def kernel(self, name: str) -> Kernel:
        """One of the layer's kernels."""
        source, defines = unit(self.config)
        return self.program.modules.kernel(source, name, defines)

    def states(self, first: int = 0) -> tuple[Memory, int]:
        """Where the layer's numbers of the pool's first state lie, from the one given on; and how many
        numbers lie between two states.
        """
        pool = self.program.pools[self.memory]
        assert isinstance(pool, StatePool)
        shape = pool.shape
        return pool.blocks[4 * (self.place * shape.size + first) :], shape.layers * shape.size

    def passes(self, z: Size) -> Memory:
        """How the step's rows pass through the states."""
        return self.program.inputs.facts(z, self.memory)["places"]


def short_conv(at: Layer, bcx: Buffer, weight: Memory) -> Buffer:
    """C · conv(B · x), as halves."""
    config, p = at.config, at.program
    assert isinstance(config, ConvConfig)
    n, ld, out = config.channels, row_length(config.channels), p.halves(config.channels)
    compute, leave = at.kernel("short_conv"), at.kernel("leave_products")

    def launch(z: Size) -> None:
        passes = at.passes(z)
        p.device.launch(
            compute, (-(-ld // THREADS), z.rows), THREADS, bcx.memory, weight, *at.states(), passes,
            out.memory, n, ld,
        )  # fmt: skip
        p.device.launch(
            leave, (-(-n // THREADS), z.rows), THREADS, bcx.memory, *at.states(), passes, z.rows, n
        )

    p.record([bcx, out], launch)
    return out


def _silu_conv(
    at: Layer, x: Buffer, weight: Memory, bias: Memory | None, first: int, cols: int, seen: int, n: int
) -> Buffer:
    """silu(conv(…) + bias) of n columns of x from `first` on: floats. seen: where in a state that is."""
    p, out = at.program, at.program.floats(n)
    compute, leave = at.kernel("silu_conv"), at.kernel("leave_columns")

    def launch(z: Size) -> None:
        passes, states, grid = at.passes(z), at.states(seen), (-(-n // THREADS), z.rows)
        read = x.memory[4 * first :]
        p.device.launch(compute, grid, THREADS, read, weight, bias, *states, passes, out.memory, n, cols)
        p.device.launch(leave, grid, THREADS, read, *states, passes, z.rows, n, cols)

    p.record([x, out], launch)
    return out


def delta_rule(
    at: Layer, qkv: Buffer, beta: Buffer, alpha: Buffer, conv: Memory, decay: Memory, dt: Memory
) -> Buffer:
    """What the heads' states give: floats [rows, values]."""
    d, p = at.config, at.program
    assert isinstance(d, DeltaConfig)
    y = _silu_conv(at, qkv, conv, None, 0, d.channels, d.values * d.key_dim, d.channels)
    kernel, out = at.kernel("delta_rule"), p.floats(d.values)
    p.record(
        [y, beta, alpha, out],
        lambda z: p.device.launch(
            kernel, (d.n_values, -(-d.value_dim // VALUES), z.rows), WARP, y.memory, beta.memory,
            alpha.memory, decay, dt, *at.states(), at.passes(z), out.memory, z.rows, d.n_keys, d.value_dim,
            int(d.tiled),
        ),
    )  # fmt: skip
    return out


def state_space(
    at: Layer, x: Buffer, conv: Memory, bias: Memory | None, decay: Memory, dt: Memory, skip: Memory
) -> Buffer:
    """What the heads' states give, before gates and norm: floats [rows, values]. x: [rows, projected]."""
    m, p = at.config, at.program
    assert isinstance(m, MambaConfig)
    y = _silu_conv(at, x, conv, bias, m.values, m.projected, m.values * m.state, m.channels)
    kernel, out = at.kernel("state_space"), p.floats(m.values)
    p.record(
        [x, y, out],
        lambda z: p.device.launch(
            kernel, (m.n_heads, -(-m.head_dim // VALUES), z.rows), WARP, y.memory,
            x.memory[4 * (m.values + m.channels) :], decay, dt, skip, *at.states(), at.passes(z), out.memory,
            z.rows, m.groups, m.head_dim, m.projected, float(m.least), float(m.most),
        ),
    )  # fmt: skip
    return out
