"""A tiny random Llama with a byte tokenizer: the whole engine in milliseconds, no file needed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tinychat.models import llama
from tinychat.network.config import (
    AttentionConfig,
    DenseConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
)
from tinychat.network.weights import DenseLinear

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE):
    """Every byte a token (ids 0…255), then <|im_start|> 256, <|im_end|> 257 (ends a turn)."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from tinychat.text.tokenizer import Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(t, eos_ids={257}, chat_template=template)


def layers_of(shape: dict) -> tuple[LayerConfig, ...]:
    """The layers that these settings describe, which are taken out of `shape`."""
    sizes = [shape.pop(name) for name in ("n_heads", "n_kv_heads", "head_dim")]
    rope, size, window = shape.pop("rope"), shape.pop("intermediate_size"), shape.pop("window", 0)
    windowed, local = shape.pop("windowed_layers", ()), shape.pop("local_rope", None)
    unrotated, experts = shape.pop("unrotated_layers", ()), shape.pop("experts", None)
    cap = shape.pop("attn_soft_cap", 0.0)

    def layer(i: int) -> LayerConfig:
        turned = local if local and i in windowed else rope
        here = window if i in windowed else 0
        attention = AttentionConfig(*sizes, None if i in unrotated else turned, here, soft_cap=cap)
        return LayerConfig(attention, experts or DenseConfig(size))

    return tuple(layer(i) for i in range(shape.pop("n_layers")))


class TinyCheckpoint:
    """Random fp32 weights from a seed; implements the Checkpoint protocol."""

    def __init__(self, seed: int = 0, template: str | None = TEMPLATE, **changes):
        shape = dict(
            family="llama",
            hidden_size=64,
            intermediate_size=96,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            head_dim=16,
            vocab_size=258,
            context_length=256,
            rope=RopeConfig(dim=16),
            tie_embeddings=True,
            eos_ids=(257,),
        )
        shape.update(changes)
        self.config = ModelConfig(layers=layers_of(shape), **shape)
        self.path = Path(f"tiny-{seed}")
        self.template = template
        rng = np.random.default_rng(seed)
        c = self.config
        shapes = {"model.embed_tokens": (c.vocab_size, c.hidden_size)}
        for i in range(c.n_layers):
            shapes |= llama.linears(c, i)
        if not c.tie_embeddings:
            shapes["lm_head"] = (c.vocab_size, c.hidden_size)
        self.weights = {
            name: rng.normal(0, 1.5 / np.sqrt(k), (n, k)).astype(np.float32)
            for name, (n, k) in shapes.items()
        }
        self.vectors = {"model.norm": rng.uniform(0.5, 2, c.hidden_size).astype(np.float32)}
        for i in range(c.n_layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.vectors[f"model.layers.{i}.{norm}"] = rng.uniform(0.5, 2, c.hidden_size).astype(
                    np.float32
                )
        self._fingerprint = f"tiny-{seed}-{sorted(changes.items())!r}"

    def has(self, name):
        return name in self.weights or name in self.vectors

    def linear(self, name):
        return DenseLinear(self.weights[name])

    def vector(self, name):
        return self.vectors[name]

    def tokenizer(self):
        tokenizer = byte_tokenizer(self.template)
        if not self.config.eos_ids:  # nor does the marker of turns end an answer, whenever it is chosen
            tokenizer.eos_ids = frozenset()
        return tokenizer

    def fingerprint(self, tell=None):
        return self._fingerprint

    def check_unchanged(self):
        pass


def tiny_model(
    ctx: int = 256,
    seed: int = 0,
    backend: str | None = None,
    kv_bits: int = 16,
    grows: bool = True,
    **changes,
):
    """A Model on the reference, the CPU or the (emulated) CUDA backend, weights as they are.

    grows: its KV pool may grow; else it stays as it is for one full context, as where memory is full.

    TINYCHAT_TEST_BACKEND=cuda puts all of them on that one, but for those that say "reference": what holds
    for sessions, eviction and speculation holds there too.
    """
    from tinychat.base.load_options import LoadOptions
    from tinychat.loading import Drafts
    from tinychat.model import Model
    from tinychat.network.weight_policy import WeightPolicy

    if backend != "reference":
        backend = os.environ.get("TINYCHAT_TEST_BACKEND") or backend or "reference"
    checkpoint = TinyCheckpoint(seed, **changes)
    policy = WeightPolicy("none", 16)
    if backend == "cuda":
        from emulation import bench

        from tinychat.backends.cuda import CudaBackend

        on = CudaBackend(checkpoint, policy, kv_bits=kv_bits, modules=bench().modules)
    elif backend == "cpu":
        from tinychat.backends.cpu import CpuBackend

        on = CpuBackend(checkpoint, policy, threads=1, kv_bits=kv_bits)
    else:
        from tinychat.backends.reference import ReferenceBackend

        on = ReferenceBackend(checkpoint, policy, threads=1, kv_bits=4 if kv_bits == 4 else 32)
    options = LoadOptions(ctx=ctx, quantize="none", head_bits=16)
    model = Model(checkpoint, on, "tiny", options, Drafts(options))
    if not grows:
        model.engine.memories.more_bytes = lambda: 0
    return model


def tiny_folder(path: Path, seed: int = 0, **changes) -> Path:
    """The same model as a Hugging Face folder on disk, for what runs in another process."""
    import json

    from safetensors.numpy import save_file

    checkpoint = TinyCheckpoint(seed, **changes)
    c = checkpoint.config
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": c.hidden_size,
        "intermediate_size": c.layers[0].mlp.size,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.attentions[0].n_heads,
        "num_key_value_heads": c.attentions[0].n_kv_heads,
        "head_dim": c.attentions[0].head_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context_length,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.theta,
        "tie_word_embeddings": c.tie_embeddings,
        "eos_token_id": list(c.eos_ids),
    }
    (path / "config.json").write_text(json.dumps(config))
    tensors = {**checkpoint.weights, **checkpoint.vectors}
    save_file({f"{name}.weight": w for name, w in tensors.items()}, path / "model.safetensors")
    checkpoint.tokenizer().save(path)
    return path


def files(path: Path) -> dict[str, bytes]:
    """What a folder holds."""
    return {f.name: f.read_bytes() for f in path.iterdir()}
