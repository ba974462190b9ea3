"""Layers whose tokens pass through a state, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinychat.network.checks import check_number, check_width, damaged

MOST_VALUES = 1 << 15  # of a token, all heads of a layer


@dataclass(frozen=True)
class ConvConfig:
    """A gated causal convolution over the last few tokens, each channel by itself, in place of attention.

    width  tokens that a token sees, itself included
    """

    channels: int
    width: int

    def __post_init__(self):
        check_number("convolution", self.channels, 1 << 17)
        check_width(self.width)

    @property
    def state_size(self) -> int:
        """Numbers that a sequence keeps: what the convolution saw of the last tokens."""
        return (self.width - 1) * self.channels


@dataclass(frozen=True)
class DeltaConfig:
    """Gated delta rule behind a short convolution, in place of attention (Yang et al., Gated DeltaNet, 2024).

    n_keys, key_dim      heads of queries and keys, and values in each
    n_values, value_dim  heads of values, each with a state [key_dim, value_dim], and values in each
    width                tokens that the convolution sees
    tiled                value head i reads key head i mod n_keys; else i div (n_values / n_keys)
    """

    n_keys: int
    n_values: int
    key_dim: int
    value_dim: int
    width: int
    tiled: bool = False

    def __post_init__(self):
        for name in ("n_keys", "n_values", "key_dim", "value_dim"):
            check_number(f"delta rule's {name}", getattr(self, name), 1024)
        check_width(self.width)
        if self.n_values % self.n_keys or self.values > MOST_VALUES:
            raise damaged(
                f"The checkpoint has {self.n_values} value heads of {self.value_dim} for"
                f" {self.n_keys} key heads."
            )

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values of a token."""
        return 2 * self.n_keys * self.key_dim + self.values

    @property
    def values(self) -> int:
        """Values of a token, all heads."""
        return self.n_values * self.value_dim

    @property
    def state_size(self) -> int:
        """Numbers that a sequence keeps: the heads' states, and what the convolution saw."""
        return self.values * self.key_dim + (self.width - 1) * self.channels


@dataclass(frozen=True)
class MambaConfig:
    """State-space layer behind a short convolution (Dao & Gu, Transformers are SSMs, 2024), in place of
    attention or beside it.

    n_heads, head_dim  heads of values, each with a state [state, head_dim], and values in each
    groups             of heads that share what is written into their states by and read from them by
    width              tokens that the convolution sees
    biased             whether the convolution has a bias
    least, most        limits of how long a step may be
    normed             whether what the states give is normed, each group by itself
    gated              whether the gate comes before that norm
    """

    n_heads: int
    head_dim: int
    state: int
    groups: int
    width: int
    biased: bool = True
    least: float = 0.0
    most: float = math.inf
    normed: bool = True
    gated: bool = True

    def __post_init__(self):
        for name in ("n_heads", "head_dim", "state", "groups"):
            check_number(f"state-space layer's {name}", getattr(self, name), 1024)
        check_width(self.width)
        if self.n_heads % self.groups or self.values > MOST_VALUES:
            raise damaged(
                f"The checkpoint has {self.n_heads} heads of {self.head_dim} in {self.groups} groups."
            )
        if not 0 <= self.least < self.most:
            raise damaged(f"The checkpoint's steps take from {self.least!r} to {self.most!r}.")

    @property
    def channels(self) -> int:
        """Channels of the convolution: values, and what each group writes and reads by."""
        return self.values + 2 * self.groups * self.state

    @property
    def values(self) -> int:
        """Values of a token, all heads."""
        return self.n_heads * self.head_dim

    @property
    def projected(self) -> int:
        """Columns of the input: gates of the values, the convolution's channels, steps of the heads."""
        return self.values + self.channels + self.n_heads

    @property
    def state_size(self) -> int:
        """Numbers that a sequence keeps: the heads' states, and what the convolution saw."""
        return self.values * self.state + (self.width - 1) * self.channels


Recurrence = ConvConfig | DeltaConfig | MambaConfig
