"""What a network is, in numbers: read from a checkpoint by the formats, used by the models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from tinychat.base.errors import CheckpointError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base, rotated dimensions, and how a scaling changes the frequencies.

    kind       none | linear | dynamic | llama3 | factors | yarn | longrope; the last three divide each
               frequency by its own of `factors` ("factors": GGUF's rope_freqs.weight, llama3 written out)
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

    def frequencies(self) -> np.ndarray:
        """float64 [dim / 2] radians a position."""
        inv = self.theta ** -(np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        if self.kind == "linear":
            return inv / self.factor
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


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one model. Names follow Hugging Face's config.json where it has them.

    attn_scale        what attention scores are multiplied by; None: 1 / sqrt(head_dim)
    embed_scale       what embeddings are multiplied by
    residual_scale    what a block adds to the residual is multiplied by
    logit_scale       what logits are multiplied by
    unrotated_layers  layers without rotary embedding
    window            tokens that a token in `windowed_layers` attends to, itself included; None: all of them
    local_rope        the rope of windowed layers, where it is another
    long_context      a longer context that the model knows too, with `long_rope` (longrope's second factors)
    attn_soft_cap     c: scores become c·tanh(score / c); 0: they stay
    logit_soft_cap    likewise, for logits
    n_experts         MLPs of which each token takes some; 0: one MLP for all tokens
    n_experts_used    how many a token takes
    expert_size       their intermediate size
    norm_experts      the weights of those that a token takes are made to sum to one
    dense_layers      layers that have one MLP all the same
    """

    family: str
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    attn_scale: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    unrotated_layers: tuple[int, ...] = ()
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    local_rope: RopeConfig | None = None
    long_context: int = 0
    long_rope: RopeConfig | None = None
    attn_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    n_experts: int = 0
    n_experts_used: int = 0
    expert_size: int = 0
    norm_experts: bool = True
    dense_layers: tuple[int, ...] = ()

    @property
    def may_evict(self) -> bool:
        """Whether cached tokens can be given up and renumbered: every layer sees all of them and turns keys
        alike, by an angle that depends on the distance alone.
        """
        alike = not self.unrotated_layers and not self.windowed_layers and self.local_rope is None
        return alike and self.rope.kind not in ("dynamic", "longrope")

    def __post_init__(self):
        limits = {
            "hidden_size": 1 << 17,
            "intermediate_size": 1 << 19,
            "n_layers": 1024,
            "n_heads": 1024,
            "n_kv_heads": 1024,
            "head_dim": 1024,
            "vocab_size": 1 << 22,
            "context_length": 1 << 25,
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise CheckpointError(
                    f"The checkpoint's {name} is {value!r}, outside 1…{limit}.",
                    "The file is damaged or not a language model; pull it again.",
                )
        self._check_experts()
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"The checkpoint has {self.n_heads} heads for {self.n_kv_heads} KV heads.",
                "The file is damaged; pull it again.",
            )
        scales = (
            self.attn_scale,
            self.embed_scale,
            self.residual_scale,
            self.logit_scale,
            self.rope.magnitude,
        )
        if not all(scale is None or (math.isfinite(scale) and scale > 0) for scale in scales):
            raise CheckpointError(
                f"The checkpoint multiplies by {scales!r}, which are not all positive numbers.",
                "The file is damaged; pull it again.",
            )
        if not (0 < self.norm_eps < 1) or not math.isfinite(self.rope.theta) or self.rope.theta <= 0:
            raise CheckpointError(
                f"The checkpoint has norm epsilon {self.norm_eps!r} and rope theta {self.rope.theta!r}.",
                "The file is damaged; pull it again.",
            )
        caps = (self.attn_soft_cap, self.logit_soft_cap)
        if not all(math.isfinite(cap) and cap >= 0 for cap in caps):
            raise CheckpointError(
                f"The checkpoint caps scores and logits at {caps!r}.", "The file is damaged; pull it again."
            )
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise CheckpointError(
                f"The checkpoint's sliding window is {self.window!r} tokens.",
                "The file is damaged; pull it again.",
            )
        for rope in (self.rope, self.local_rope, self.long_rope):
            if rope is not None:
                self._check_rope(rope)
        for token_id in (self.bos_id, *self.eos_ids):
            if token_id is not None and (not isinstance(token_id, int) or isinstance(token_id, bool)):
                raise CheckpointError(
                    f"The checkpoint's token id {token_id!r} is not a number.",
                    "The file is damaged; pull it again.",
                )

    def _check_experts(self) -> None:
        counts = (self.n_experts, self.n_experts_used, self.expert_size)
        if counts == (0, 0, 0):
            return
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in counts)
        if not (
            whole
            and 1 <= self.n_experts_used <= min(self.n_experts, 64)
            and self.n_experts * self.n_layers <= 1 << 17
            and 1 <= self.expert_size <= 1 << 19
        ):
            raise CheckpointError(
                f"The checkpoint has {self.n_experts!r} experts of the size {self.expert_size!r} in each of"
                f" {self.n_layers} layers, and a token takes {self.n_experts_used!r}.",
                "The file is damaged; pull it again.",
            )

    def _check_rope(self, rope: RopeConfig) -> None:
        if rope.dim % 2 or not 0 < rope.dim <= self.head_dim:
            raise CheckpointError(
                f"The checkpoint rotates {rope.dim} of {self.head_dim} head dimensions.",
                "The file is damaged; pull it again.",
            )
        try:
            with np.errstate(all="ignore"):
                frequencies = rope.frequencies()
        except ValueError:  # stored factors of another number
            frequencies = np.zeros(1)
        if not (np.isfinite(frequencies) & (frequencies > 0)).all():
            raise CheckpointError(
                f"The checkpoint's rope scaling {rope.kind!r} gives frequencies that are not positive.",
                "The file is damaged; pull it again.",
            )

    def for_context(self, n: int) -> ModelConfig:
        """The config that a context of n tokens needs: another one only where it is a long context."""
        if n <= self.context_length or self.long_rope is None:
            return self
        longer = dict(context_length=self.long_context, rope=self.long_rope)
        return replace(self, **longer, long_context=0, long_rope=None)

    def experts_in(self, layer: int) -> bool:
        """Whether the layer has experts in place of one MLP."""
        return self.n_experts > 0 and layer not in self.dense_layers

    def window_of(self, layer: int) -> int:
        """Tokens that a token attends to in this layer; 0: all."""
        return self.window if self.window and layer in self.windowed_layers else 0

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rope of this layer; None: it rotates nothing."""
        if layer in self.unrotated_layers:
            return None
        return self.local_rope if self.local_rope and layer in self.windowed_layers else self.rope

    @classmethod
    def from_hf(cls, cfg: dict, generation: dict | None = None) -> ModelConfig:
        """From config.json (`tinychat.network.hf_config.read`)."""
        from tinychat.network import hf_config

        return hf_config.read(cfg, generation)
