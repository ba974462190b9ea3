"""The vocabulary that models are written in. One interface; each backend implements it.

A model file calls these verbs in order, once for each step (reference) or once at load (recorded programs),
with handles that only the backend looks into. The step's inputs (token ids, positions, cache slots) belong to
the backend, so a model never sees them. Every handle has as many rows as the step has tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tinychat.network.config import AttentionConfig, RopeConfig
from tinychat.network.recurrence import ConvConfig, DeltaConfig, MambaConfig

Handle = Any


@dataclass(frozen=True)
class DeltaWeights:
    """Vectors of a layer with a delta rule. conv: [channels, width]; decay, dt: [n_values]."""

    conv: Handle
    decay: Handle
    dt: Handle


@dataclass(frozen=True)
class MambaWeights:
    """Vectors of a state-space layer. conv: [channels, width]; bias: of the convolution, [channels], or None;
    decay, dt, skip: [n_heads]; norm: [values], or None.
    """

    conv: Handle
    bias: Handle | None
    decay: Handle
    dt: Handle
    skip: Handle
    norm: Handle | None


class Ops(Protocol):
    """The verbs. Shapes: T tokens in the step, H hidden, D head_dim."""

    def embed(self, weight: Handle, scale: float = 1.0, norm_eps: float = 0.0) -> Handle:
        """Rows of the embedding for the step's token ids, multiplied by `scale`: [T, H]. norm_eps: that of an
        RMS norm of these without weights; 0: they are not normed.
        """
        ...

    def rms_norm(self, x: Handle, weight: Handle, eps: float, add_to: Handle | None = None) -> Handle:
        """x / sqrt(mean(x²) + eps) · weight, over the last axis (+ add_to, which the result replaces)."""
        ...

    def linear(self, x: Handle, weight: Handle, add_to: Handle | None = None) -> Handle:
        """x Wᵀ + bias (+ add_to, the residual; then the result replaces it)."""
        ...

    def split_heads(self, qkv: Handle, attention: AttentionConfig) -> tuple[Handle, Handle, Handle]:
        """[T, (heads + 2 kv_heads)·D] → q [T, heads, D], k and v [T, kv_heads, D]. Where values are tied to
        keys there are (heads + kv_heads)·D columns, and v is what k is before anything is done to it. Where
        they are another layer's, heads·D, and there is neither: k and v are None here and in what follows.
        """
        ...

    def gated_heads(self, qkv: Handle, attention: AttentionConfig) -> tuple[Handle, Handle, Handle, Handle]:
        """Heads of which each query has a gate beside it, and the gates.

        [T, (2 heads + 2 kv_heads)·D] → q [T, heads, D], k and v [T, kv_heads, D], gates [T, heads·D].
        """
        ...

    def norm_heads(
        self, q: Handle, k: Handle, q_weight: Handle | None, k_weight: Handle | None, eps: float
    ) -> tuple[Handle, Handle]:
        """RMS norm of q and k: of each head where a weight has D values, of all heads as one where more; of
        each head without weights where there is none.
        """
        ...

    def norm_values(self, v: Handle, eps: float) -> Handle:
        """RMS norm of each head of v, without weights."""
        ...

    def rope(self, q: Handle, k: Handle, rope: RopeConfig) -> tuple[Handle, Handle]:
        """Rotate q and k at the step's positions; halves convention (x[i], x[i + D/2]) as in Hugging Face."""
        ...

    def attention(
        self,
        q: Handle,
        k: Handle,
        v: Handle,
        attention: AttentionConfig,
        layer: int,
        sinks: Handle | None = None,
    ) -> Handle:
        """Write k and v to the layer's cache slots; causal GQA attention over the cache: [T, heads·D].

        Scores are multiplied by the attention's scale and capped by its soft_cap; where it has a window, a
        token attends to the last `window` tokens only, itself included; where it has a slope, queries are
        scaled by their position; where it has a source, nothing is written, and what it attends to is what
        that layer, an earlier one, has written. sinks: [heads], one more score of each head, which takes its
        share of the weights and gives nothing.
        """
        ...

    def head_linear(self, x: Handle, weight: Handle, heads: int) -> Handle:
        """Each head times a matrix of its own: [T, heads·W] → [T, heads·out].

        weight: one linear [heads·out, in] that has the heads' matrices one below the other. Each reads the
        first `in` of its head's W columns.
        """
        ...

    def latent_attention(
        self,
        q: Handle,
        absorbed: Handle,
        row: Handle,
        norm: Handle,
        eps: float,
        attention: AttentionConfig,
        layer: int,
    ) -> Handle:
        """Write the rows to the layer's cache slots; causal attention over compressed rows: [T, heads·rank].

        With the attention's `latent`: q [T, heads·(plain + rotated)], of which the rotated parts are read;
        absorbed: [T, heads·rank], the plain parts times each head's own matrix. row: [T, rank + rotated], of
        which the first part is normed, with the weight `norm`. Rotated parts are turned at the step's
        positions. A head's query (rotated, absorbed) meets the cached rows (rotated, compressed); what it
        gets is the weighted sum of the compressed parts.
        """
        ...

    def short_conv(self, bcx: Handle, weight: Handle, conv: ConvConfig, layer: int) -> Handle:
        """C · conv(B · x): [T, 3 channels] → [T, channels]. Each channel by itself and causal; what the
        convolution saw of the last tokens is the layer's state.

        weight: [channels, width], the last for the token itself.
        """
        ...

    def delta_rule(
        self,
        qkv: Handle,
        beta: Handle,
        alpha: Handle,
        weights: DeltaWeights,
        delta: DeltaConfig,
        layer: int,
    ) -> Handle:
        """Gated delta rule, token after token on each value head's state S [key_dim, value_dim]: [T, values].

        q, k, v = silu(conv(qkv)); q and k of unit length, q divided by sqrt(key_dim);
        S ← exp(decay · softplus(alpha + dt)) · S; S ← S + k (σ(beta) · (v − Sᵀk))ᵀ; the result is Sᵀq.
        qkv: [T, channels]; beta, alpha: [T, n_values].
        """
        ...

    def mamba(self, x: Handle, weights: MambaWeights, mamba: MambaConfig, layer: int, eps: float) -> Handle:
        """State-space layer, token after token on each head's state S [state, head_dim]: [T, values].

        x: [T, projected], which are gates z of the values, then v, B and C before the convolution, and steps.
        v, B, C = silu(conv(…) + bias); step = softplus(steps + dt), within the layer's limits;
        S ← exp(decay · step) · S + B (step · v)ᵀ; y = Sᵀ C + skip · v; B and C are those of the head's group.
        The result is norm(y · silu(z)), each group by itself; norm(y) · silu(z) where the layer is not gated
        first; y · silu(z) where it is not normed.
        """
        ...

    def multiplied(self, x: Handle, sizes: Sequence[int], factors: Sequence[float]) -> Handle:
        """x with its columns multiplied, so many of them by each factor. It may replace x: nobody else reads
        it.
        """
        ...

    def norm_gated(self, x: Handle, weight: Handle, gate: Handle, eps: float) -> Handle:
        """RMS norm of every len(weight) columns, times silu(gate). It may replace x: nobody else reads it."""
        ...

    def behind(self, x: Handle, layer: int) -> Handle:
        """Rows of x one row later: row i gets that of row i - 1, the first what the layer's state holds, at
        first zeros; the last row becomes the state. [T, H] → [T, H].
        """
        ...

    def recall(self, layer: int, size: int) -> Handle:
        """What the layer's state holds: [T, size], the same for all rows of a sequence."""
        ...

    def leave(self, x: Handle, layer: int) -> None:
        """The last row of x becomes the layer's state."""
        ...

    def join(self, a: Handle, b: Handle) -> Handle:
        """Columns of a, then those of b: [T, A + B]. Both are read by nobody else."""
        ...

    def keep(self, k: Handle, v: Handle, attention: AttentionConfig, layer: int) -> None:
        """Write k and v to the layer's cache slots, as `attention` does, for rows that come later."""
        ...

    def sigmoid_mul(self, x: Handle, gate: Handle) -> Handle:
        """x · σ(gate): [T, n]; of a gate with fewer columns each is for as many neighbours of x. It may
        replace x: nobody else reads it.
        """
        ...

    def silu_mul(self, gate_up: Handle) -> Handle:
        """[T, 2F] → silu(first half) · second half: [T, F]."""
        ...

    def gelu_mul(self, gate_up: Handle) -> Handle:
        """[T, 2F] → gelu(first half) · second half, by GELU's tanh formula: [T, F]."""
        ...

    def relu_square(self, up: Handle) -> Handle:
        """max(up, 0)²: [T, F]; up may be what experts give."""
        ...

    def gelu_columns(self, gate: Handle, x: Handle, first: int) -> Handle:
        """gelu(gate) · the columns of x from `first` on: [T, n]; both by the formula of `gelu_mul`."""
        ...

    def norm_columns(self, x: Handle, weight: Handle, eps: float) -> Handle:
        """RMS norm of every len(weight) columns. It may replace x: nobody else reads it."""
        ...

    def embed_onto(self, x: Handle, weight: Handle, scale: float, factor: float) -> Handle:
        """factor · (x + scale · rows of another embedding for the step's token ids): [T, n]. Ids that it has
        no row for take row 0. It may replace x: nobody else reads it.
        """
        ...

    def tanh(self, x: Handle) -> Handle:
        """tanh of each number. It may replace x: nobody else reads it."""
        ...

    def times(self, x: Handle, weight: Handle) -> Handle:
        """x · weight, column by column: [T, n]."""
        ...

    def summed(self, xs: Sequence[Handle], factor: float) -> Handle:
        """factor · the sum of all xs, [T, n] each."""
        ...

    def resized(self, x: Handle, like: Handle) -> Handle:
        """x scaled to the magnitude of `like`, row by row: x · √mean(like²) / √max(mean(x²), 1e-5). It may
        replace x: nobody else reads it.
        """
        ...

    def mix_streams(self, xs: Sequence[Handle], factors: Handle) -> list[Handle]:
        """y_i = x_i + Σ_j factors[i · n + j] · x_j, of n streams [T, H]; factors: [T, n·n]."""
        ...

    def correct_streams(self, xs: Sequence[Handle], x: Handle, factors: Handle) -> list[Handle]:
        """y_i = x_i + (1 + factors[i]) · (x - x_0), of n streams; factors: [T, n]. They replace xs."""
        ...

    def cut_gates(self, gate_up: Handle, deviations: float) -> Handle:
        """The first half of each row as far as it lies above its mean and so many of its deviations, else 0;
        the second as it is. It may replace gate_up: nobody else reads it.
        """
        ...

    def scaled(self, x: Handle, weight: Handle) -> Handle:
        """x times the one number of `weight`. It replaces x."""
        ...

    def clamped_mul(self, gate_up: Handle, limit: float, alpha: float) -> Handle:
        """[T, 2F] → g·σ(alpha·g)·(u + 1): [T, F], of the halves g, at most `limit`, and u, within ±limit."""
        ...

    def route(
        self,
        scores: Handle,
        n: int,
        normalize: bool,
        sigmoid: bool = False,
        bias: Handle | None = None,
        scale: float = 1.0,
        each: Handle | None = None,
        groups: tuple[int, int] = (1, 1),
    ) -> Handle:
        """Choice of n experts for each token: those of the largest softmax(scores), which weighs them.

        scores: [T, experts], one for each expert. `normalize`: a token's weights are made to sum to one.
        sigmoid: weights are σ(score), each by itself. bias: [experts], added where weights are compared, not
        where they weigh. scale: what all weights are multiplied by in the end; each: [experts], what those of
        an expert are multiplied by besides. groups: into how many equal ones the experts fall, and how many
        of them a token takes, before all else: those with the largest weight, where there is a bias those
        with the largest sum of two weights with it.
        Ties go to the expert with the lower number.
        """
        ...

    def expert_linear(self, x: Handle, weights: Sequence[Handle], routes: Handle) -> Handle:
        """`linear` of each token with each expert that it takes: [T, taken, out].

        x: [T, in], or what `silu_mul` made of such a result. weights: one linear for each expert; those
        that no token takes are not read.
        """
        ...

    def expert_sum(self, x: Handle, routes: Handle, add_to: Handle | None = None) -> Handle:
        """Σ weight · x over the experts that each token takes (+ add_to, which the result replaces); x:
        [T, taken, H].
        """
        ...

    def lm_head(
        self, x: Handle, weight: Handle, scale: float = 1.0, soft_cap: float = 0.0, first: int = 0
    ) -> Handle:
        """Logits of the rows that the step asked for: float32 [rows, vocab].

        Multiplied by `scale`; then, where there is a soft_cap c, they become c·tanh(logit / c). first: those
        of the first so many token ids only; 0: of all.
        """
        ...
