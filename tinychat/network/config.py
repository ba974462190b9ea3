"""A network in numbers: read from a checkpoint by the formats, used by the models."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from tinychat.network.checks import check_caps, check_number, check_scales, damaged
from tinychat.network.head_config import HeadConfig
from tinychat.network.latent import LatentConfig
from tinychat.network.recurrence import Recurrence

MOST_LAYERS = 1024


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base, rotated dimensions, and how a scaling changes the frequencies.

    kind       none | linear | dynamic | llama3 | factors | yarn | longrope | proportional; factors, yarn and
               longrope divide each frequency by its own of `factors` ("factors": GGUF's rope_freqs.weight,
               llama3 written out)
    turned     pairs of a proportional rope that turn, the first ones; the others stay
    magnitude  rotated dimensions of queries and keys are multiplied by it (YaRN's and longrope's attention
               factor)
    """

    theta: float = 10000.0
    dim: int = 64
    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    factors: tuple[float, ...] = ()
    magnitude: float = 1.0
    turned: int = 0

    def frequencies(self) -> np.ndarray:
        """float64 [dim / 2] radians a position."""
        inv = self.theta ** -(np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        if self.kind in ("linear", "proportional"):
            turns = np.arange(len(inv)) < (self.turned if self.kind == "proportional" else len(inv))
            return np.where(turns, inv / self.factor, 0.0)
        if self.kind in ("factors", "yarn", "longrope"):
            return inv / np.asarray(self.factors, dtype=np.float64)
        if self.kind == "llama3":
            wavelength = 2 * math.pi / inv
            smooth = np.divide(
                self.original_context / wavelength - self.low_freq_factor,
                self.high_freq_factor - self.low_freq_factor,
            )
            smooth = np.clip(smooth, 0.0, 1.0)
            return (1 - smooth) * inv / self.factor + smooth * inv
        return inv

    def check(self, head_dim: int) -> None:
        """Raises CheckpointError for a rope that heads of that size cannot have."""
        if type(self.dim) is not int or self.dim % 2 or not 0 < self.dim <= head_dim:
            raise damaged(f"The checkpoint rotates {self.dim} of {head_dim} head dimensions.")
        if not math.isfinite(self.theta) or self.theta <= 0:
            raise damaged(f"The checkpoint has rope theta {self.theta!r}.")
        check_scales(self.magnitude)
        try:
            with np.errstate(all="ignore"):
                frequencies = self.frequencies()
        except ValueError:  # stored factors of another number
            frequencies = np.zeros(1)
        stays = (frequencies == 0) & (self.kind == "proportional") & (self.turned > 0)
        if not (np.isfinite(frequencies) & ((frequencies > 0) | stays)).all():
            raise damaged(
                f"The checkpoint's rope scaling {self.kind!r} gives frequencies that are not positive."
            )


@dataclass(frozen=True)
class AttentionConfig:
    """The attention of one layer.

    rope      how queries and keys are rotated; None: they are not
    window    tokens that a token attends to, itself included; 0: all before it
    scale     what scores are multiplied by; None: 1 / sqrt(head_dim)
    soft_cap  c: scores become c·tanh(score / c); 0: they stay
    slope     queries at position p are multiplied by 1 + slope · log(1 + ⌊p / original⌋); 0: they are not
    original  tokens of context that the model was first trained with
    turnable  whether a cached key can be turned to another position: not if it was changed behind its rope
    source    the layer whose keys and values it attends to instead of its own; -1: it has its own
    tied      its values are its keys as their linear gives them, so there is no linear of values
    latent    what its one key and value head is made of, if that is one compressed row; head_dim is its size
    skipped   first tokens of a text that nobody attends to
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: RopeConfig | None = None
    window: int = 0
    scale: float | None = None
    soft_cap: float = 0.0
    slope: float = 0.0
    original: int = 1
    turnable: bool = True
    source: int = -1
    tied: bool = False
    latent: LatentConfig | None = None
    skipped: int = 0

    def __post_init__(self):
        for name, limit in (("n_heads", 1024), ("n_kv_heads", 1024), ("head_dim", 1024)):
            check_number(name, getattr(self, name), limit)
        for name in ("rank", "plain", "rotated", "value") if self.latent else ():
            check_number(f"latent attention's {name} size", getattr(self.latent, name), 1024)
        if self.n_heads % self.n_kv_heads:
            raise damaged(f"The checkpoint has {self.n_heads} heads for {self.n_kv_heads} KV heads.")
        check_scales(self.scale)
        check_caps(self.soft_cap, self.slope)
        check_number("original context", self.original, 1 << 25)
        if not isinstance(self.window, int) or self.window < 0:
            raise damaged(f"The checkpoint's sliding window is {self.window!r} tokens.")
        if self.rope is not None:
            self.rope.check(self.head_dim)

    @property
    def projected(self) -> tuple[int, int, int]:
        """Heads of queries, keys and values that its linears give."""
        keys = self.n_kv_heads if self.source < 0 else 0
        return self.n_heads, keys, 0 if self.tied else keys

    def kept_by(self, layer: int) -> int:
        """The layer whose keys and values this one, the layer `layer`, attends to."""
        return layer if self.source < 0 else self.source

    def neighbours(self, heads: int) -> np.ndarray:
        """Rows of so many heads of queries or keys in the order of files that rotate neighbours (x[2i] and
        x[2i + 1]): int64 [heads · head_dim], row i of such a file is row result[i] here.
        """
        rows, dim = np.arange(heads * self.head_dim).reshape(heads, -1), self.rope.dim if self.rope else None
        turned = rows[:, :dim].reshape(heads, 2, -1).swapaxes(1, 2).reshape(heads, -1)
        return np.concatenate([turned, rows[:, turned.shape[1] :]], axis=1).reshape(-1)


@dataclass(frozen=True)
class DenseConfig:
    """One MLP for all tokens, of an intermediate size.

    cutoff  gates count only as far as they lie above their mean and so many deviations; None: as they are
    gated   else there is one linear in place of gate and up, and max(x, 0)² of what it gives
    absent  there is none, of the size 0
    """

    size: int
    cutoff: float | None = None
    gated: bool = True
    absent: bool = False

    def __post_init__(self):
        if not (self.absent and self.size == 0):
            check_number("intermediate_size", self.size, 1 << 19)
        if self.cutoff is not None and not math.isfinite(self.cutoff):
            raise damaged(f"The checkpoint cuts gates off at {self.cutoff!r} deviations.")


NO_MLP = DenseConfig(0, absent=True)


@dataclass(frozen=True)
class ExpertsConfig:
    """MLPs of which each token takes some.

    n          experts in the layer
    taken      how many of them a token takes
    size       the intermediate size of each
    normalize  the weights of those that a token takes are made to sum to one
    shared     the intermediate size of an MLP that every token takes besides; 0: there is none
    limit      of what gate and up projections give, clamped (`Ops.clamped_mul`); 0: it is silu(gate) · up
    alpha      of that gate's sigmoid
    sigmoid    weights are the sigmoids of scores, not their softmax
    biased     experts are chosen by their weights plus a bias
    scale      what the weights are multiplied by in the end
    groups     equal groups that the experts fall into, of which a token chooses `taken_groups` first
    gated      as in `DenseConfig`
    """

    n: int
    taken: int
    size: int
    normalize: bool = True
    shared: int = 0
    limit: float = 0.0
    alpha: float = 1.0
    sigmoid: bool = False
    biased: bool = False
    scale: float = 1.0
    groups: int = 1
    taken_groups: int = 1
    gated: bool = True

    def __post_init__(self):
        whole = all(type(n) is int for n in (self.n, self.taken, self.size, self.shared))
        check_caps(self.limit)
        check_scales(self.alpha)
        whole = whole and 0 <= self.shared <= 1 << 19
        if not (whole and 1 <= self.taken <= min(self.n, 64) and 1 <= self.size <= 1 << 19):
            raise damaged(
                f"The checkpoint has {self.n!r} experts of the size {self.size!r} in a layer, and a token"
                f" takes {self.taken!r}."
            )
        check_scales(self.scale)
        whole = type(self.groups) is type(self.taken_groups) is int and 1 <= self.taken_groups <= self.groups
        if not whole or self.n % self.groups or self.taken * self.groups > self.n * self.taken_groups:
            raise damaged(f"The checkpoint has {self.n} experts in {self.groups!r} groups.")


@dataclass(frozen=True)
class Factors:
    """What a block multiplies by.

    into             parts of a state-space layer's input: gates, values, what is written and read by, steps
    out, attention   what goes into the last linear of that layer, and of the attention
    gate, down       the MLP's gates, and what goes into its last linear
    """

    into: tuple[float, ...] = (1.0,) * 5
    out: float = 1.0
    attention: float = 1.0
    gate: float = 1.0
    down: float = 1.0

    def __post_init__(self):
        if len(self.into) != 5:
            raise damaged(f"The checkpoint has {len(self.into)} factors of a state-space layer.")
        check_scales(*self.into, self.out, self.attention, self.gate, self.down)


@dataclass(frozen=True)
class LayerConfig:
    """One decoder block: what mixes tokens, and what follows it.

    mixer   None: the block is an MLP only
    mlp     NO_MLP: the block is a mixer only
    beside  what mixes tokens beside the attention, of the same input
    factors what parts of the block are multiplied by
    """

    mixer: AttentionConfig | Recurrence | None
    mlp: DenseConfig | ExpertsConfig
    beside: Recurrence | None = None
    factors: Factors = Factors()

    @property
    def attention(self) -> AttentionConfig:
        """The mixer of a layer that attends."""
        assert isinstance(self.mixer, AttentionConfig)
        return self.mixer


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one model. Names follow Hugging Face's config.json where it has them.

    layers          what each layer is, in their order
    embed_scale     what embeddings are multiplied by
    residual_scale  what a block adds to the residual is multiplied by
    logit_scale     what logits are multiplied by
    logit_soft_cap  c: logits become c·tanh(logit / c); 0: they stay
    post_norm_eps   epsilon of norms behind attention and MLP, in a family where it is another
    long_context    a longer context that the model knows too, with `long_rope` (longrope's second factors)
    layer_inputs    values of each token that every layer gets beside the residual, from rows of an embedding
                    of `layer_vocab` rows, which has those of all layers; 0: there are none
    further         a layer behind all others that predicts one token further (`network.further`)
    head            what that layer has around it if it is a head out of another folder (`network.eagle`)
    streams         how many residuals there are side by side, of which blocks read the first
    laurel          channels of a second way around attention; 0: there is none
    """

    family: str
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    vocab_size: int
    context_length: int
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0
    post_norm_eps: float = 0.0
    long_context: int = 0
    long_rope: RopeConfig | None = None
    layer_inputs: int = 0
    layer_vocab: int = 0
    further: LayerConfig | None = None
    streams: int = 1
    laurel: int = 0
    head: HeadConfig | None = None

    def __post_init__(self):
        numbers = {
            "hidden_size": 1 << 17,
            "n_layers": MOST_LAYERS,
            "vocab_size": 1 << 22,
            "context_length": 1 << 25,
        }
        numbers |= {"layer_inputs": 1 << 14, "layer_vocab": 1 << 22} if self.layer_inputs else {}
        numbers |= {"streams": 16, "laurel": 1 << 14} if self.streams != 1 else {}
        for name, limit in numbers.items():
            check_number(name, getattr(self, name), limit)
        experts = sum(layer.mlp.n for layer in self.layers if isinstance(layer.mlp, ExpertsConfig))
        if experts > 1 << 17:
            raise damaged(f"The checkpoint has {experts} experts in its layers.")
        check_scales(self.embed_scale, self.residual_scale, self.logit_scale)
        check_caps(self.logit_soft_cap)
        if not 0 < self.norm_eps < 1:
            raise damaged(f"The checkpoint has norm epsilon {self.norm_eps!r}.")
        if not self.attentions:
            raise damaged("The checkpoint has no layer with attention.")
        if self.long_rope is not None:
            self.long_rope.check(self.attentions[0].head_dim)
        self._check_sources()
        for token_id in (self.bos_id, *self.eos_ids):
            if token_id is not None and type(token_id) is not int:
                raise damaged(f"The checkpoint's token id {token_id!r} is not a number.")

    def _check_sources(self) -> None:
        for i, layer in enumerate(self.layers):
            a = layer.mixer
            if not isinstance(a, AttentionConfig) or a.source < 0:
                continue
            own = self.layers[a.source].mixer if a.source < i else None
            alike = ("n_kv_heads", "head_dim", "window")
            whole = isinstance(own, AttentionConfig) and own.source < 0
            if not whole or any(getattr(own, name) != getattr(a, name) for name in alike):
                raise damaged(f"Layer {i} cannot attend to the keys and values of layer {a.source}.")

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def all_layers(self) -> tuple[LayerConfig, ...]:
        """The layers, and behind them the one that predicts further, if there is one."""
        return self.layers if self.further is None else (*self.layers, self.further)

    @property
    def whole(self) -> ModelConfig:
        """The config with the layer that predicts further among the others."""
        return (
            self if self.further is None else replace(self, layers=self.all_layers, further=None, head=None)
        )

    @property
    def without_further(self) -> ModelConfig:
        """The config without the layer that predicts further."""
        return self if self.further is None else replace(self, further=None, head=None)

    @property
    def handed_on(self) -> int:
        """Size of the state that the layer which predicts further goes on from."""
        return self.head.hidden_size if self.head else self.hidden_size

    @property
    def attentions(self) -> tuple[AttentionConfig, ...]:
        """The mixers of the layers that attend, in their order."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, AttentionConfig))

    @property
    def rope(self) -> RopeConfig | None:
        """The rope of the layers that see farthest; None where nothing is rotated."""
        far = sorted(self.attentions, key=lambda a: a.window > 0)
        return next((a.rope for a in far if a.rope), None)

    @property
    def windowed(self) -> bool:
        """Whether there are layers in which a token does not attend to all before it."""
        return any(a.window for a in self.attentions)

    @property
    def may_evict(self) -> bool:
        """Whether cached tokens can be given up and renumbered: every layer turns its keys last, by angles
        that depend on the distance alone, or not at all.
        """
        fixed = ("dynamic", "longrope")
        return all(a.turnable and (a.rope is None or a.rope.kind not in fixed) for a in self.attentions)

    def for_context(self, n: int) -> ModelConfig:
        """The config that a context of n tokens needs: another one only where it is a long context."""
        if n <= self.context_length or self.long_rope is None:
            return self
        layers = tuple(
            replace(layer, mixer=replace(layer.attention, rope=self.long_rope)) for layer in self.layers
        )
        longer = replace(self, context_length=self.long_context, layers=layers)
        return replace(longer, long_context=0, long_rope=None)

    @property
    def n_experts(self) -> int:
        """The most experts that a layer has."""
        return max(layer.mlp.n if isinstance(layer.mlp, ExpertsConfig) else 0 for layer in self.layers)
