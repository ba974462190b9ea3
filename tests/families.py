"""Tiny random models of every family, built with transformers' own classes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import transformers

from tinychat.config import ModelConfig
from tinychat.weights import DenseLinear

SHAPE = dict(
    vocab_size=258,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=257,
    pad_token_id=None,
)


class FromTransformers:
    """A Checkpoint over a transformers model's own tensors and its own config.json."""

    path = Path("random")

    def __init__(self, hf):
        self.config = ModelConfig.from_hf({**hf.config.to_dict(), "architectures": [type(hf).__name__]})
        self.state = {k: v.detach().numpy() for k, v in hf.state_dict().items()}

    def has(self, name):
        return name + ".weight" in self.state

    def linear(self, name):
        return DenseLinear(self.state[name + ".weight"], self.state.get(name + ".bias"))

    def vector(self, name):
        return self.state[name + ".weight"] + np.float32(self.config.family.startswith("gemma"))

    def tokenizer(self):
        from tiny import byte_tokenizer

        return byte_tokenizer()

    def fingerprint(self):
        return "random"


def random_model(name: str, **changes):
    """A transformers model whose every parameter, norms and biases too, is random."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    hf = cls(cls.config_class(**{**SHAPE, **changes})).float().eval()
    one = 0.0 if name.startswith("Gemma") else 1.0  # Gemma's files hold norms as what they differ from one
    with torch.no_grad():
        for parameter, p in hf.named_parameters():
            if "norm" in parameter:
                p.uniform_(one - 0.5, one + 0.5)
            else:
                p.normal_(0, 0.7 if parameter.endswith("bias") else 1.2 / math.sqrt(p.shape[-1]))
    return hf


def logits_of(hf, ids) -> np.ndarray:
    """float32 [T, vocab], all at once."""
    with torch.inference_mode():
        return hf(torch.tensor([list(map(int, ids))])).logits[0].numpy()


def relative_error(ours, theirs) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def rope(kind: str, **fields):
    """What transformers' config classes take."""
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, **fields))


YARN = dict(factor=4.0, original_max_position_embeddings=64)
LONGROPE = dict(short_factor=[1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0], long_factor=[1.0, 2.0, 4.0, 8.0] * 2)
GRANITE = dict(
    embedding_multiplier=12.0, attention_multiplier=0.11, residual_multiplier=0.22, logits_scaling=8.0
)

# name → transformers' class, and how its config differs from SHAPE
CASES = {
    "llama dynamic rope": ("LlamaForCausalLM", rope("dynamic", factor=4.0)),
    "llama yarn": ("LlamaForCausalLM", rope("yarn", **YARN)),
    "llama yarn whole": (
        "LlamaForCausalLM",
        rope("yarn", factor=8.0, original_max_position_embeddings=32, truncate=False, beta_fast=8.0),
    ),
    "llama yarn mscale": ("LlamaForCausalLM", rope("yarn", mscale=0.7, mscale_all_dim=1.3, **YARN)),
    "llama yarn magnitude": ("LlamaForCausalLM", rope("yarn", attention_factor=1.3, **YARN)),
    "ministral": (
        "MinistralForCausalLM",
        dict(layer_types=["full_attention"] * 3, sliding_window=201, head_dim=16),
    ),
    "mistral wide heads": ("MistralForCausalLM", dict(sliding_window=None, head_dim=32)),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2 tied": ("Qwen2ForCausalLM", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "qwen2 yarn": ("Qwen2ForCausalLM", rope("yarn", **YARN)),
    "qwen3": ("Qwen3ForCausalLM", dict(head_dim=32)),
    "qwen3 bias": ("Qwen3ForCausalLM", dict(head_dim=16, attention_bias=True, tie_word_embeddings=True)),
    "phi3": ("Phi3ForCausalLM", {}),
    "phi3 partial": (
        "Phi3ForCausalLM",
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    ),
    "phi3 longrope": (
        "Phi3ForCausalLM",
        dict(
            original_max_position_embeddings=200, max_position_embeddings=1600, **rope("longrope", **LONGROPE)
        ),
    ),
    "smollm3": ("SmolLM3ForCausalLM", dict(num_hidden_layers=5)),
    "smollm3 listed": (
        "SmolLM3ForCausalLM",
        dict(no_rope_layers=[0, 1, 0], tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    ),
    "smollm3 yarn": ("SmolLM3ForCausalLM", dict(no_rope_layers=[1, 0, 1], **rope("yarn", **YARN))),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo2 mha": ("Olmo2ForCausalLM", dict(num_key_value_heads=4, attention_bias=True)),
    "granite": ("GraniteForCausalLM", GRANITE),
    "granite tied": (
        "GraniteForCausalLM",
        dict(GRANITE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, residual_multiplier=1.7),
    ),
    "mistral window": ("MistralForCausalLM", dict(sliding_window=37)),
    "ministral window": (
        "MinistralForCausalLM",
        dict(sliding_window=70, head_dim=16, layer_types=["sliding_attention", "full_attention"] * 2)
        | dict(num_hidden_layers=4),
    ),
    "qwen2 window": (
        "Qwen2ForCausalLM",
        dict(use_sliding_window=True, sliding_window=50, max_window_layers=1),
    ),
    "phi3 window": ("Phi3ForCausalLM", dict(sliding_window=64)),
    "smollm3 window": (
        "SmolLM3ForCausalLM",
        dict(use_sliding_window=True, sliding_window=33, no_rope_layers=[1, 0, 0]),
    ),
    "gemma2": ("Gemma2ForCausalLM", dict(head_dim=16, sliding_window=48, query_pre_attn_scalar=16)),
    "gemma2 caps": (
        "Gemma2ForCausalLM",
        dict(
            head_dim=32,
            sliding_window=300,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            num_key_value_heads=1,
        ),
    ),
    "gemma2 uncapped": (
        "Gemma2ForCausalLM",
        dict(head_dim=16, attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        dict(head_dim=32, sliding_window=64, num_hidden_layers=7, query_pre_attn_scalar=32),
    ),
    "gemma3 scaled": (
        "Gemma3ForCausalLM",
        dict(
            head_dim=16,
            sliding_window=20,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            final_logit_softcapping=5.0,
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                "sliding_attention": dict(rope_type="default", rope_theta=500.0),
            },
        ),
    ),
    "granite plain": ("GraniteForCausalLM", dict(attention_multiplier=0.25)),
}
