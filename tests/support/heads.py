"""EAGLE-3 heads with random weights: the layer as the paper and vLLM have it, written down in torch, and its
folder in the layouts of SGLang and of vLLM's speculators.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import TinyCheckpoint

from tinychat.backends.cpu import CpuBackend
from tinychat.base.load_options import LoadOptions
from tinychat.formats.eagle import EagleHead
from tinychat.loading import Drafts
from tinychat.model import Model
from tinychat.network.weight_policy import WeightPolicy

KNOWN = 120  # tokens of the head's vocabulary
SETTINGS = dict(
    architectures=["LlamaForCausalLMEagle3"],
    model_type="llama",
    hidden_act="silu",
    num_hidden_layers=1,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope_theta=5000.0,
    tie_word_embeddings=False,
)


def head_settings(hidden=64, heads=4, kv=2, dim=16, vocab=258, size=80, known=KNOWN, **changes) -> dict:
    """config.json of a head for a model of the hidden size 64."""
    shape = dict(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv, head_dim=dim)
    shape |= dict(vocab_size=vocab, intermediate_size=size, draft_vocab_size=known)
    return SETTINGS | shape | changes


def head_tensors(s: dict, model_size: int = 64, embedding: bool = False, seed: int = 0) -> dict:
    """Random tensors of such a head, by SGLang's names."""
    rng = torch.Generator().manual_seed(seed)
    h, d, f = s["hidden_size"], s["head_dim"], s["intermediate_size"]
    q, kv = s["num_attention_heads"] * d, s["num_key_value_heads"] * d
    shapes = {"fc": (h, 3 * model_size), "lm_head": (s["draft_vocab_size"], h)}
    shapes |= {f"midlayer.self_attn.{n}_proj": (m, 2 * h) for n, m in (("q", q), ("k", kv), ("v", kv))}
    shapes |= {"midlayer.self_attn.o_proj": (h, q), "midlayer.mlp.down_proj": (h, f)}
    shapes |= {"midlayer.mlp.gate_proj": (f, h), "midlayer.mlp.up_proj": (f, h)}
    if embedding:
        shapes["embed_tokens"] = (s["vocab_size"], h)
    tensors = {n: torch.randn(shape, generator=rng) * shape[-1] ** -0.5 for n, shape in shapes.items()}
    for name in (
        "midlayer.input_layernorm",
        "midlayer.hidden_norm",
        "midlayer.post_attention_layernorm",
        "norm",
    ):
        tensors[name] = torch.rand(h, generator=rng) + 0.5
    ids = torch.randperm(s["vocab_size"], generator=rng)[: s["draft_vocab_size"]].sort().values
    knows = torch.zeros(s["vocab_size"], dtype=torch.bool)
    knows[ids] = True
    named = {f"{name}.weight": t for name, t in tensors.items()}
    return named | {"d2t": ids - torch.arange(len(ids)), "t2d": knows}


def save_head(folder, s: dict, tensors: dict):
    """The folder of a head; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(s))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def as_speculators_have_it(s: dict, tensors: dict, taps: list[int]) -> tuple[dict, dict]:
    """The same head in vLLM's own layout."""
    layer = {name: value for name, value in s.items() if name not in ("architectures", "draft_vocab_size")}
    outer = dict(architectures=["Eagle3Speculator"], speculators_model_type="eagle3", target_hidden_size=None)
    outer |= dict(draft_vocab_size=s["draft_vocab_size"], transformer_layer_config=layer)
    outer |= dict(
        eagle_aux_hidden_state_layer_ids=taps, norm_before_residual=s.get("norm_before_residual", False)
    )
    return outer, {name.replace("midlayer.", "layers.0."): t for name, t in tensors.items()}


class States:
    """What goes into each block of a transformers model, and comes out of the last."""

    def __init__(self, hf):
        self.hf, self.seen = hf, []

    @torch.inference_mode()
    def of(self, ids) -> list[torch.Tensor]:
        """[T, hidden] for each place."""
        self.seen = []
        layers = self.hf.model.layers
        hooks = [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(self._behind))
        self.hf(torch.tensor([list(map(int, ids))]))
        for hook in hooks:
            hook.remove()
        return self.seen

    def _before(self, module, args, kwargs):
        self.seen.append((args[0] if args else kwargs["hidden_states"])[0])

    def _behind(self, module, args, out):
        self.seen.append((out[0] if isinstance(out, tuple) else out)[0])


class Truth:
    """A head's guesses by the formula: rows begin with the second token, whose place is 0."""

    def __init__(self, hf, s: dict, tensors: dict):
        self.hf, self.s, self.t = hf, s, {name.removesuffix(".weight"): t for name, t in tensors.items()}

    def norm(self, x, name):
        """RMS norm."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.s["rms_norm_eps"]) * self.t[name]

    def turned(self, x):
        """Rotated heads [T, heads, dim], in halves."""
        half = x.shape[-1] // 2
        angles = torch.arange(len(x))[:, None] / self.s["rope_theta"] ** (torch.arange(half) / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def layer(self, ids, states):
        """States behind the layer, of rows with these tokens and the states before them."""
        s, t, n = self.s, self.t, len(ids)
        table = t.get("embed_tokens", self.hf.model.embed_tokens.weight)
        hidden = self.norm(states, "midlayer.hidden_norm")
        residual = hidden if s.get("norm_before_residual") else states
        both = torch.cat([self.norm(table[ids], "midlayer.input_layernorm"), hidden], -1)
        q, k, v = (
            (both @ t[f"midlayer.self_attn.{name}_proj"].T).view(n, -1, s["head_dim"]) for name in "qkv"
        )
        groups = q.shape[1] // k.shape[1]
        q, k, v = self.turned(q), self.turned(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) * s["head_dim"] ** -0.5
        p = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", p, v).flatten(1)
        x = residual + mixed @ t["midlayer.self_attn.o_proj"].T
        m = self.norm(x, "midlayer.post_attention_layernorm")
        gate, up = (m @ t[f"midlayer.mlp.{name}_proj"].T for name in ("gate", "up"))
        return x + (F.silu(gate) * up) @ t["midlayer.mlp.down_proj"].T

    @torch.inference_mode()
    def guesses(self, ids, taps, k: int) -> np.ndarray:
        """Logits of all ids for what follows the last of `ids` and k - 1 guesses: [k, vocab]."""
        places = States(self.hf).of(ids[:-1])
        states = torch.cat([places[i] for i in taps], -1) @ self.t["fc"].T
        ids, out = torch.tensor([int(i) for i in ids[1:]]), []
        known = self.t["d2t"] + torch.arange(len(self.t["d2t"]))
        for _ in range(k):
            x = self.layer(ids, states)
            logits = torch.full((self.s["vocab_size"],), -torch.inf)
            logits[known] = self.norm(x[-1], "norm") @ self.t["lm_head"].T
            out.append(logits.numpy())
            ids, states = torch.cat([ids, logits.argmax()[None]]), torch.cat([states, x[-1:]])
        return np.stack(out)


def head_model(
    folder, ctx: int = 256, kv_bits: int = 16, backend=CpuBackend, grows: bool = True, **changes
) -> Model:
    """A tiny Llama on the CPU with a head that is often right: both see in a token what follows it. grows: as
    of `tiny_model`.
    """
    checkpoint = TinyCheckpoint(3, n_layers=4, tie_embeddings=False, **changes)
    c = checkpoint.config
    for name, w in checkpoint.weights.items():
        if name.endswith(("o_proj", "down_proj")):
            w *= 0.008
    table = checkpoint.weights["model.embed_tokens"]
    table *= 8
    checkpoint._fingerprint += "-headed"
    table[:, 32:] = 0  # as many channels as keys and values have
    s = head_settings(known=250, rms_norm_eps=c.norm_eps, norm_before_residual=True)
    tensors = head_tensors(s)
    tensors["d2t"] = torch.full((250,), 8)
    tensors["lm_head.weight"] = torch.from_numpy(checkpoint.weights["lm_head"][8:])
    tensors["norm.weight"] = torch.from_numpy(checkpoint.vectors["model.norm"])
    tensors["midlayer.input_layernorm.weight"] = torch.ones(64)
    # Queries meet keys of their own token, whose values are its embedding.
    attention = {name: tensors[f"midlayer.self_attn.{name}_proj.weight"] for name in "qkvo"}
    attention["q"][:] = 0
    for head in range(4):
        attention["q"][16 * head : 16 * head + 16] = 16 * attention["k"][16 * (head // 2) :][:16]
    attention["k"][:, 64:] = attention["q"][:, 64:] = 0
    attention["v"][:] = torch.eye(32, 128)
    attention["o"][:] = 0
    for channel in range(32):
        attention["o"][channel, channel % 16 + 32 * (channel // 16)] = 1
    tensors["midlayer.mlp.down_proj.weight"] *= 0.02
    tensors["midlayer.hidden_norm.weight"] *= 0.02
    draft = EagleHead(save_head(folder, s, tensors), s)
    made = backend(checkpoint, WeightPolicy("none", 16), threads=1, kv_bits=kv_bits, head=draft)
    options = LoadOptions(ctx=ctx, quantize="none", head_bits=16, draft=str(folder), draft_tokens=4)
    model = Model(checkpoint, made, "headed", options, Drafts(options))
    if not grows:
        model.engine.memories.more_bytes = lambda: 0
    return model
