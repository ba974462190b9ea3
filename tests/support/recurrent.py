"""Tiny models with every kind of memory: full attention, a sliding window, layers with a state, layers that
attend to keys and values of others, and layers with latent rows.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tiny import TEMPLATE, byte_tokenizer

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.interface import Step
from tinychat.engine.memory.ahead import ahead
from tinychat.engine.speculation.further import FurtherLayer
from tinychat.models import FAMILIES
from tinychat.network import further
from tinychat.network.config import AttentionConfig, DenseConfig, LayerConfig, ModelConfig, RopeConfig
from tinychat.network.family import outside
from tinychat.network.latent import LatentConfig
from tinychat.network.recurrence import ConvConfig, DeltaConfig, MambaConfig
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import DenseLinear

WINDOW = 24
FULL = AttentionConfig(4, 2, 16, RopeConfig(dim=8))
SLIDING = AttentionConfig(4, 2, 16, RopeConfig(dim=8, theta=500.0), WINDOW)
NEAR = replace(SLIDING, scale=1.0)
FAR = AttentionConfig(4, 2, 32, RopeConfig(1e4, 32, "proportional", turned=8), scale=1.0)
LATENT = AttentionConfig(4, 1, 48, RopeConfig(dim=16), scale=0.2, latent=LatentConfig(32, 16, 16, 16))
LAYERS = {
    "lfm2": (FULL, SLIDING, ConvConfig(64, 4)),
    "granitemoehybrid": (
        MambaConfig(4, 24, 16, 2, 4),
        replace(FULL, rope=None),
        MambaConfig(4, 24, 16, 2, 4),
    ),
    "gemma4": (NEAR, FAR, NEAR, replace(NEAR, source=2), replace(FAR, source=1)),
    "deepseek_v2": (LATENT, LATENT),
    "qwen3_5": (DeltaConfig(2, 4, 16, 16, 4), FULL, DeltaConfig(2, 4, 16, 16, 4)),
}


class RecurrentCheckpoint:
    """Random fp32 weights from a seed; implements the Checkpoint protocol."""

    def __init__(self, family: str, seed: int = 0, template: str | None = TEMPLATE, **changes):
        layers = tuple(LayerConfig(mixer, DenseConfig(96)) for mixer in LAYERS[family])
        shape = dict(hidden_size=64, vocab_size=258, context_length=256, tie_embeddings=True, eos_ids=(257,))
        self.config = c = ModelConfig(family, layers=layers, **(shape | changes))
        self.path, self.template, self.seed = Path(f"recurrent-{family}-{seed}"), template, seed
        rng, of = np.random.default_rng(seed), FAMILIES[family]
        linears = {"model.embed_tokens": (c.vocab_size, c.hidden_size)}
        if not c.tie_embeddings:
            linears["lm_head"] = linears["model.embed_tokens"]
        others = {"model.norm": (c.hidden_size,)}
        for i in range(c.n_layers):
            linears |= of.linears(c, i)
            others |= of.norms(c, i)
        for name, own in outside(of, c).items():
            (linears if len(own) == 2 else others)[name] = own
        linears |= further.linears(of, c)
        others |= further.norms(of, c)
        linears |= {
            name: shape for name, shape in others.items() if name.endswith(("in_proj_a", "in_proj_b"))
        }
        self.weights = {
            name: rng.normal(0, 1.5 / np.sqrt(k), (n, k)).astype(np.float32)
            for name, (n, k) in linears.items()
        }
        self.vectors = {name: rng.uniform(0.5, 2, n).astype(np.float32) for name, n in others.items()}
        for name, v in self.vectors.items():
            if name.endswith("A_log"):  # as it multiplies: a state that forgets in some tens of tokens
                v *= -0.1
        if c.further is not None:
            self.agree()

    def agree(self):
        """The layer that predicts further is often right: both see in a token the one that follows it."""
        c, p = self.config, further.prefix(self.config)
        for name, w in self.weights.items():
            if name.endswith(("o_proj", "out_proj", "down_proj")):
                w *= 0.02 if name.startswith(p) else 0.06
        self.weights["model.embed_tokens"] *= 8
        self.weights[p + "eh_proj"][:, : c.hidden_size] += 24 * np.eye(c.hidden_size, dtype=np.float32)
        self.vectors[p + "enorm"][:] = 1
        self.vectors[p + "shared_head.norm"] = self.vectors["model.norm"]

    def has(self, name):
        return name in self.weights or name in self.vectors

    def linear(self, name):
        return DenseLinear(self.weights[name])

    def vector(self, name):
        return self.vectors[name]

    def tokenizer(self):
        return byte_tokenizer(self.template)

    def fingerprint(self, tell=None):
        return f"{self.path}-{self.config!r}"

    def check_unchanged(self):
        pass


def recurrent_model(ctx=256, family="lfm2", grows=True, kv_bits=16, **changes):
    """A Model of that kind on the CPU, whose rows do not depend on each other, or on what
    TINYCHAT_TEST_BACKEND says. grows: as of `tiny_model`.
    """
    from tinychat.base.load_options import LoadOptions
    from tinychat.loading import Drafts
    from tinychat.model import Model

    checkpoint = RecurrentCheckpoint(family, **changes)
    predicts = checkpoint.config.further is not None
    policy = WeightPolicy("none", 16)
    if os.environ.get("TINYCHAT_TEST_BACKEND") == "cuda":
        from emulation import bench

        from tinychat.backends.cuda import CudaBackend

        backend = CudaBackend(checkpoint, policy, kv_bits=kv_bits, modules=bench().modules)
    else:
        backend = CpuBackend(checkpoint, policy, threads=1, kv_bits=kv_bits, predicts=predicts)
    options = LoadOptions(ctx=ctx, quantize="none", head_bits=16, draft_tokens=4 if predicts else None)
    model = Model(checkpoint, backend, "recurrent", options, Drafts(options))
    if not grows:
        model.engine.memories.more_bytes = lambda: 0
    return model


latent_model = partial(recurrent_model, family="deepseek_v2")
delta_model = partial(recurrent_model, family="qwen3_5")
mamba_model = partial(recurrent_model, family="granitemoehybrid")
shared_model = partial(recurrent_model, family="gemma4", layer_inputs=32, layer_vocab=258)
FURTHER = LayerConfig(FULL, DenseConfig(96))
further_model = partial(delta_model, further=FURTHER, tie_embeddings=False)


def looked_ahead(model, branch, tokens):
    """The layer's logits for these tokens behind the branch."""
    engine, memory = model.engine, FurtherLayer(model.engine)._memory
    with engine.changing(), ahead(branch, memory, len(tokens)) as rows:
        steps = [Step((rows.span(t),), further=True) for t in tokens]
        return np.concatenate([engine.backend.step(step) for step in steps])
