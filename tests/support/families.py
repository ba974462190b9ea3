"""Tiny random models of every family, built with transformers' own classes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch
import transformers

from tinychat.formats.hf import read_config
from tinychat.models import FAMILIES
from tinychat.network.family import in_file_order
from tinychat.network.weights import DenseLinear

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
        self.config = read_config({**hf.config.to_dict(), "architectures": [type(hf).__name__]})
        state = experts_apart({as_modules_are_called(k): v for k, v in hf.state_dict().items()})
        state = projections_apart(state, hf.config)
        self.state = {k: v.detach().numpy() for k, v in state.items()}

    def has(self, name):
        return name + ".weight" in self.state

    def linear(self, name):
        if name.endswith((".k_b_proj", ".v_b_proj")):
            return latent_part(self.state, self.config, name)
        stored = DenseLinear(self.state[name + ".weight"], self.state.get(name + ".bias"))
        order = in_file_order(next(iter(FAMILIES[self.config.family].HF.values())), self.config, name)
        return stored if order is None else stored.reordered(np.argsort(order))

    def vector(self, name):
        own, family = STRANGE.get(name.rpartition(".")[2]), self.config.family
        if own is not None:
            return own(self.state[name + ".weight"])
        plain = family not in OFFSET or name.endswith("linear_attn.norm")
        stored = self.state[name if name in self.state else name + ".weight"]
        if name.endswith("router.scale"):
            stored = stored * len(stored) ** -0.5
        if name.endswith("altup.router_norm"):
            stored = stored / len(stored)
        return stored + np.float32(not plain)

    def tokenizer(self):
        from tiny import byte_tokenizer

        return byte_tokenizer()

    def fingerprint(self, tell=None):
        return "random"

    def check_unchanged(self):
        pass


def latent_part(state: dict, cfg, name: str) -> DenseLinear:
    """What makes keys or values of latent rows: files have [heads · (plain + value), rank] for both."""
    prefix, _, module = name.rpartition(".")
    a, n = cfg.layers[int(name.split(".")[2])].attention, cfg.layers[0].attention.latent.plain
    each = state[f"{prefix}.kv_b_proj.weight"].reshape(a.n_heads, -1, a.latent.rank)
    own = each[:, :n].swapaxes(1, 2) if module == "k_b_proj" else each[:, n:]
    return DenseLinear(np.ascontiguousarray(own.reshape(-1, own.shape[-1])))


OFFSET = ("gemma2", "gemma3", "qwen3_5", "qwen3_5_moe", "qwen3_next")  # whose norms files hold less one
# What is no weight of a linear or norm: how the network has it, of what transformers has.
STRANGE = {
    "A_log": lambda a: -np.exp(a),
    "dt_bias": lambda a: a,
    "conv1d": lambda a: a[:, 0],
    "conv": lambda a: a[:, 0],
    "expert_bias": lambda a: a,
    "D": lambda a: a,
    "conv1d_bias": lambda a: a,
}


def as_modules_are_called(name: str) -> str:
    """A tensor of transformers' by the name of our module, where that is another one."""
    name = name.replace("model.embedding_norm.", "model.norm.").replace(
        "self_attn.g_proj", "self_attn.gate_proj"
    )
    for theirs, ours in (("embeddings", "embed_tokens"), ("norm_f", "norm"), ("final_layernorm", "norm")):
        name = name.replace(f"model.{theirs}.", f"model.{ours}.")
    name = re.sub(r"\.mixer\.(gate|experts)\.", r".mlp.\1.", name)
    name = name.replace("mlp.gate.e_score_correction_bias", "mlp.expert_bias")
    for parts in ("gate.", "experts.", "expert_bias"):
        name = name.replace(f"feed_forward.{parts}", f"mlp.{parts}")
    name = re.sub(r"(layers\.\d+)\.experts\.", r"\1.mlp.experts.", name)  # Gemma 4's
    name = name.replace("block_sparse_moe.", "mlp.").replace("conv1d.bias", "conv1d_bias")
    vectors = ("A_log", "dt_bias", "expert_bias", ".D", "conv1d_bias")
    return name + ".weight" if name.endswith(vectors) else name


def experts_apart(state: dict) -> dict:
    """A state dict with one linear for each expert, where transformers has all of a layer in one tensor."""
    out = {}
    for name, t in state.items():
        prefix, _, linear = name.rpartition(".")
        if not prefix.endswith("mlp.experts"):
            out[name.replace(".mlp.router.", ".mlp.gate.").replace(".router.proj.", ".mlp.gate.")] = t
            continue
        if f"{prefix}.down_proj_bias" in state:
            out |= gpt_oss_apart(name, t)
            continue
        for e, one in enumerate(t):
            parts = one.chunk(2) if linear == "gate_up_proj" else (one,)
            names = ("gate_proj", "up_proj") if linear == "gate_up_proj" else (linear,)
            out |= {f"{prefix}.{e}.{n}.weight": p for n, p in zip(names, parts, strict=True)}
    return out


def projections_apart(state: dict, c) -> dict:
    """A state dict with a linear for each projection, where Qwen3-Next has those of a head side by side."""
    out = {}
    for name, t in state.items():
        prefix, _, module = name.removesuffix(".weight").rpartition(".")
        if module not in ("in_proj_qkvz", "in_proj_ba"):
            out[name] = t
            continue
        keys, each = c.linear_num_key_heads, c.linear_num_value_heads // c.linear_num_key_heads
        heads = t.view(keys, -1, t.shape[1])
        if module == "in_proj_ba":
            parts = dict(zip(("in_proj_b", "in_proj_a"), heads.split([each, each], dim=1), strict=True))
        else:
            sizes = [c.linear_key_head_dim] * 2 + [each * c.linear_value_head_dim] * 2
            q, k, v, z = (p.reshape(-1, t.shape[1]) for p in heads.split(sizes, dim=1))
            parts = {"in_proj_qkv": torch.cat([q, k, v]), "in_proj_z": z}
        out |= {f"{prefix}.{n}.weight": p.reshape(-1, t.shape[1]) for n, p in parts.items()}
    return out


def gpt_oss_apart(name: str, t) -> dict:
    """One linear for each expert of gpt-oss, whose rows of gate and up come in turn, the other way round."""
    prefix, _, linear = name.rpartition(".")
    part = "bias" if linear.endswith("_bias") else "weight"
    linear = linear.removesuffix("_bias")
    rows = t if part == "bias" else t.transpose(1, 2)
    cut = (
        {"gate_proj": rows[:, ::2], "up_proj": rows[:, 1::2]} if linear == "gate_up_proj" else {linear: rows}
    )
    return {f"{prefix}.{e}.{n}.{part}": one for n, p in cut.items() for e, one in enumerate(p)}


def set_weight(hf, name: str, weight: np.ndarray) -> None:
    """A linear's weight, by the module names of `experts_apart`."""
    prefix, _, linear = name.rpartition(".")
    tensor = torch.from_numpy(weight)
    if ".experts." not in name:
        hf.get_submodule(name).weight.data = tensor
        return
    experts, e = hf.get_submodule(prefix.rpartition(".")[0]), int(prefix.rpartition(".")[2])
    with torch.no_grad():
        if linear == "down_proj":
            experts.down_proj[e] = tensor
        else:
            half = len(weight) * (linear == "up_proj")
            experts.gate_up_proj[e, half : half + len(weight)] = tensor


def as_files_name_it(name: str, cls: str) -> str:
    """Mixtral's files have other names than transformers' modules: its conversion map says which."""
    if cls != "MixtralForCausalLM" or ".mlp." not in name:
        return name
    for module, file in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        name = name.replace(f".{module}.", f".{file}.")
    return name.replace(".mlp.", ".block_sparse_moe.")


def random_config(name: str, **changes) -> dict:
    """The config.json of such a model."""
    config = config_class(getattr(transformers, name), changes)
    return config.to_dict() | {"architectures": [name]}


def config_class(cls, changes: dict):
    """Transformers' config of such a model; a Nemotron-H counts its layers itself."""
    shape = {k: v for k, v in SHAPE.items() if k != "num_hidden_layers" or "layers_block_type" not in changes}
    return cls.config_class(**{**shape, **changes})


def random_model(name: str, **changes):
    """A transformers model whose every parameter, norms and biases too, is random."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    hf = cls(config_class(cls, changes)).float().eval()
    less = name.startswith(
        ("Gemma2", "Gemma3For", "Qwen3_5", "Qwen3Next")
    )  # hold norms as what they differ from one
    with torch.no_grad():
        for parameter, p in hf.named_parameters():
            if "norm" in parameter:
                one = 0.0 if less and "linear_attn" not in parameter else 1.0
                p.uniform_(one - 0.5, one + 0.5)
            elif parameter.endswith("A_log"):
                p.uniform_(-3, 1)
            else:
                p.normal_(0, 0.7 if parameter.endswith("bias") else 1.2 / math.sqrt(p.shape[-1]))
        for buffer, b in hf.named_buffers():
            if buffer.endswith(("expert_bias", "correction_bias")):
                b.uniform_(-0.3, 0.3)
            if buffer.endswith("layer_scalar"):
                b.uniform_(0.5, 1.5)
    return hf


def logits_of(hf, ids) -> np.ndarray:
    """float32 [T, vocab], all at once."""
    with torch.inference_mode():
        return hf(torch.tensor([list(map(int, ids))])).logits[0].numpy()


def usual_error(ours, theirs) -> float:
    """The relative error that nine of ten rows stay below: where two experts are level, a router may take the
    other one, and that row is then another.
    """
    return float(np.quantile(np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1), 0.9))


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

CONVS = dict(layer_types=["conv", "full_attention", "conv"])

DELTA = dict(
    num_hidden_layers=4,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
)

DELTA_MOE = dict(
    num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64, shared_expert_intermediate_size=96
)
LFM2_MOE = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64, num_dense_layers=1)

QWEN3_MOE = dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=64, head_dim=16)

SLOPED = dict(
    llama_4_scaling_beta=0.4, mscale=1.0, mscale_all_dim=1.0, factor=4.0, original_max_position_embeddings=32
)
QWEN2_MOE = dict(
    num_experts=8, num_experts_per_tok=3, moe_intermediate_size=64, shared_expert_intermediate_size=96
)

GPT_OSS = dict(num_local_experts=8, num_experts_per_tok=2, head_dim=32, attn_implementation="eager")
GPT_OSS |= rope("default")

TWO_ROPES = {
    "full_attention": dict(rope_type="proportional", partial_rotary_factor=0.5, rope_theta=5e5),
    "sliding_attention": dict(rope_type="default", rope_theta=500.0),
}
GEMMA3N = dict(
    head_dim=16,
    hidden_size_per_layer_input=32,
    vocab_size_per_layer_input=258,
    sliding_window=48,
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    laurel_rank=32,
    final_logit_softcapping=5.0,
    layer_types=["sliding_attention", "full_attention"] * 2,
    pad_token_id=0,
)
GEMMA4 = dict(
    head_dim=8,
    global_head_dim=16,
    hidden_size_per_layer_input=32,
    final_logit_softcapping=5.0,
    vocab_size_per_layer_input=258,
    sliding_window=48,
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2,
)

LATENT = dict(
    kv_lora_rank=64,
    q_lora_rank=None,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
    num_key_value_heads=4,
)
MAMBA = dict(mamba_n_heads=8, mamba_d_state=16)
FACTORS = dict(
    embedding_multiplier=5.0,
    lm_head_multiplier=0.4,
    key_multiplier=0.6,
    attention_in_multiplier=1.3,
    attention_out_multiplier=0.7,
    ssm_in_multiplier=1.2,
    ssm_out_multiplier=0.5,
    mlp_multipliers=[0.8, 0.3],
    ssm_multipliers=[0.7, 1.1, 0.9, 1.4, 0.6],
)
NEMOTRON = dict(head_dim=16, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=2) | dict(
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=96,
)
GRANITE_H = dict(GRANITE, **MAMBA, shared_intermediate_size=96, num_local_experts=0) | dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"]
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
    "gemma3n": ("Gemma3nForCausalLM", GEMMA3N),
    "gemma3n sparse": (
        "Gemma3nForCausalLM",
        dict(
            GEMMA3N,
            activation_sparsity_pattern=[0.95, 0.5, 0.0, 0.0],
            altup_num_inputs=3,
            attention_bias=True,
        )
        | dict(intermediate_size=[128, 96, 128, 160], vocab_size_per_layer_input=250, sliding_window=20),
    ),
    "gemma4": ("Gemma4ForCausalLM", GEMMA4),
    "gemma4 wide": (
        "Gemma4ForCausalLM",
        dict(GEMMA4, use_double_wide_mlp=True, attention_bias=True)
        | dict(num_key_value_heads=1, vocab_size_per_layer_input=300, sliding_window=20)
        | dict(num_hidden_layers=7, num_kv_shared_layers=3)
        | dict(layer_types=["sliding_attention", "full_attention"] * 3 + ["full_attention"]),
    ),
    "gemma4 tied": (
        "Gemma4ForCausalLM",
        dict(head_dim=32, global_head_dim=64, attention_k_eq_v=True, num_global_key_value_heads=1)
        | dict(hidden_size_per_layer_input=0, sliding_window=40, use_bidirectional_attention="vision")
        | dict(rope_parameters=TWO_ROPES),
    ),
    "gemma4 unified": (
        "Gemma4UnifiedForCausalLM",
        dict(head_dim=8, global_head_dim=16, sliding_window=30, num_kv_shared_layers=1, num_hidden_layers=4)
        | dict(layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention"])
        | dict(use_double_wide_mlp=True, num_key_value_heads=1),
    ),
    "gemma4moe": (
        "Gemma4ForCausalLM",
        dict(head_dim=16, global_head_dim=32, hidden_size_per_layer_input=0, sliding_window=40)
        | dict(enable_moe_block=True, num_experts=8, top_k_experts=3, moe_intermediate_size=64)
        | dict(attention_k_eq_v=True, num_global_key_value_heads=4, num_hidden_layers=4)
        | dict(layer_types=["sliding_attention", "full_attention"] * 2),
    ),
    "mixtral": ("MixtralForCausalLM", dict(num_local_experts=8)),
    "mixtral window": (
        "MixtralForCausalLM",
        dict(num_local_experts=4, num_experts_per_tok=3, sliding_window=40, tie_word_embeddings=True)
        | dict(head_dim=32, num_key_value_heads=1),
    ),
    "mixtral all": ("MixtralForCausalLM", dict(num_local_experts=3, num_experts_per_tok=3)),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        dict(QWEN3_MOE, norm_topk_prob=True),
    ),
    "qwen3moe unnormalized": ("Qwen3MoeForCausalLM", dict(QWEN3_MOE, attention_bias=True)),
    "qwen3moe dense layers": (
        "Qwen3MoeForCausalLM",
        dict(QWEN3_MOE, mlp_only_layers=[3], decoder_sparse_step=2, num_hidden_layers=4)
        | dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=50),
    ),
    "qwen3moe one": ("Qwen3MoeForCausalLM", dict(QWEN3_MOE, num_experts_per_tok=1)),
    "olmo3": ("Olmo3ForCausalLM", dict(num_hidden_layers=5, sliding_window=40)),
    "olmo3 yarn": (
        "Olmo3ForCausalLM",
        dict(
            num_key_value_heads=4,
            attention_bias=True,
            sliding_window=50,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": dict(rope_type="yarn", rope_theta=1e4, **YARN),
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
        ),
    ),
    "exaone4": ("Exaone4ForCausalLM", dict(sliding_window=30, num_hidden_layers=5, head_dim=32)),
    "exaone4 small": (
        "Exaone4ForCausalLM",
        dict(sliding_window=None, layer_types=["full_attention"] * 3, tie_word_embeddings=True),
    ),
    "ernie4.5": ("Ernie4_5ForCausalLM", dict(head_dim=32)),
    "ernie4.5 bias": (
        "Ernie4_5ForCausalLM",
        dict(head_dim=16, use_bias=True, tie_word_embeddings=False, **rope("linear", factor=2.0)),
    ),
    "seed_oss": ("SeedOssForCausalLM", dict(head_dim=32)),
    "seed_oss bias": (
        "SeedOssForCausalLM",
        dict(head_dim=16, attention_out_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "glm": ("GlmForCausalLM", dict(head_dim=32)),
    "glm4": ("Glm4ForCausalLM", dict(head_dim=16)),
    "glm4 plain": (
        "Glm4ForCausalLM",
        dict(head_dim=32, attention_bias=False, tie_word_embeddings=True)
        | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75)),
    ),
    "lfm2": ("Lfm2ForCausalLM", CONVS),
    "lfm2 wide": (
        "Lfm2ForCausalLM",
        dict(full_attn_idxs=[0, 3], conv_L_cache=7, block_auto_adjust_ff_dim=False, num_hidden_layers=4)
        | dict(tie_word_embeddings=False, norm_eps=1e-3, num_key_value_heads=1)
        | rope("linear", factor=3.0),
    ),
    "lfm2moe": ("Lfm2MoeForCausalLM", dict(LFM2_MOE, **CONVS)),
    "lfm2moe plain": (
        "Lfm2MoeForCausalLM",
        dict(LFM2_MOE, **CONVS, use_expert_bias=False, norm_topk_prob=False, num_dense_layers=0)
        | dict(routed_scaling_factor=0.4, tie_word_embeddings=False, num_experts_per_tok=8),
    ),
    "qwen3.5moe": (
        "Qwen3_5MoeForCausalLM",
        dict(DELTA, head_dim=16, **DELTA_MOE)
        | dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]),
    ),
    "qwen3next": ("Qwen3NextForCausalLM", dict(DELTA, head_dim=16, **DELTA_MOE, num_hidden_layers=4)),
    "qwen3next listed": (
        "Qwen3NextForCausalLM",
        dict(DELTA, head_dim=32, **DELTA_MOE, mlp_only_layers=[0], norm_topk_prob=False)
        | dict(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"])
        | dict(linear_num_value_heads=6, shared_expert_intermediate_size=64, tie_word_embeddings=True),
    ),
    "lfm3": (
        "Lfm3ForCausalLM",
        dict(head_dim=16, sliding_window=40, conv_L_cache=7),
    ),
    "lfm3 listed": (
        "Lfm3ForCausalLM",
        dict(head_dim=32, sliding_window=30, num_hidden_layers=4, conv_L_cache=3, tie_word_embeddings=False)
        | dict(layer_types=["sliding_attention", "conv", "full_attention", "sliding_attention"])
        | dict(num_key_value_heads=1, attention_bias=True),
    ),
    "qwen3.5": ("Qwen3_5ForCausalLM", dict(DELTA, head_dim=32)),
    "qwen3.5 listed": (
        "Qwen3_5ForCausalLM",
        dict(DELTA, head_dim=16, linear_num_key_heads=4, linear_num_value_heads=4, num_hidden_layers=3)
        | dict(layer_types=["full_attention", "linear_attention", "linear_attention"])
        | dict(linear_conv_kernel_dim=3, linear_key_head_dim=24, linear_value_head_dim=40)
        | dict(tie_word_embeddings=True, attention_bias=True, num_key_value_heads=1)
        | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    ),
    "ministral3": (
        "Ministral3ForCausalLM",
        dict(head_dim=16, **rope("yarn", **YARN, llama_4_scaling_beta=0.1)),
    ),
    "ministral3 window": (
        "Ministral3ForCausalLM",
        dict(head_dim=32, sliding_window=60, tie_word_embeddings=True)
        | rope("yarn", **SLOPED, beta_fast=16.0, beta_slow=2.0),
    ),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", dict(head_dim=32)),
    "hunyuan alpha": (
        "HunYuanDenseV1ForCausalLM",
        dict(head_dim=16, attention_bias=True, tie_word_embeddings=True)
        | rope("dynamic", alpha=50.0, factor=1.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
    ),
    "granite_swa": (
        "GraniteSWAForCausalLM",
        dict(GRANITE, num_hidden_layers=5, sliding_window=30, layer_rope_theta=None),
    ),
    "granite_swa thetas": (
        "GraniteSWAForCausalLM",
        dict(GRANITE, sliding_window=50, attention_bias=True, layer_rope_theta=[0, 1e4, 500.0])
        | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "qwen2moe": ("Qwen2MoeForCausalLM", dict(QWEN2_MOE, use_sliding_window=False)),
    "qwen2moe dense layers": (
        "Qwen2MoeForCausalLM",
        dict(QWEN2_MOE, mlp_only_layers=[0], norm_topk_prob=True, tie_word_embeddings=True)
        | dict(use_sliding_window=True, sliding_window=50, max_window_layers=2, qkv_bias=False),
    ),
    "gpt-oss": ("GptOssForCausalLM", dict(GPT_OSS, sliding_window=30)),
    "gpt-oss yarn": (
        "GptOssForCausalLM",
        dict(GPT_OSS, num_hidden_layers=4, sliding_window=128, num_key_value_heads=1)
        | rope("yarn", truncate=False, beta_fast=32.0, beta_slow=1.0, **YARN),
    ),
    "falcon-h1": ("FalconH1ForCausalLM", dict(MAMBA, mamba_d_ssm=96)),
    "falcon-h1 factors": (
        "FalconH1ForCausalLM",
        dict(MAMBA, mamba_d_ssm=96, mamba_n_groups=2, mamba_rms_norm=True, mamba_conv_bias=False, **FACTORS)
        | dict(tie_word_embeddings=True, num_key_value_heads=1),
    ),
    "falcon-h1 gated": (
        "FalconH1ForCausalLM",
        dict(MAMBA, mamba_d_ssm=None, mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_n_groups=2)
        | rope("linear", factor=2.0),
    ),
    "nemotron-h": (
        "NemotronHForCausalLM",
        dict(NEMOTRON, layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"]),
    ),
    "nemotron-h bias": (
        "NemotronHForCausalLM",
        dict(NEMOTRON, layers_block_type=["mlp", "full_attention", "linear_attention"], n_groups=4)
        | dict(mlp_bias=True, attention_bias=True, use_bias=True, use_conv_bias=False, conv_kernel=3)
        | dict(layer_norm_epsilon=1e-3),
    ),
    "nemotron-h moe": (
        "NemotronHForCausalLM",
        dict(NEMOTRON, layers_block_type=["linear_attention", "moe", "full_attention", "moe"])
        | dict(routed_scaling_factor=2.5),
    ),
    "granite-h": ("GraniteMoeHybridForCausalLM", GRANITE_H),
    "granite-h groups": (
        "GraniteMoeHybridForCausalLM",
        dict(GRANITE_H, mamba_n_groups=4, mamba_d_conv=3, mamba_conv_bias=False, mamba_proj_bias=True)
        | dict(mamba_d_state=24, mamba_n_heads=4, mamba_expand=3)
        | dict(position_embedding_type="rope", attention_bias=True, tie_word_embeddings=True)
        | dict(layer_types=["full_attention", "linear_attention", "linear_attention"]),
    ),
    "granite-h limits": (
        "GraniteMoeHybridForCausalLM",
        dict(GRANITE_H, time_step_limit=(0.2, 1.5), mamba_n_groups=2),
    ),
    "granite-h moe": (
        "GraniteMoeHybridForCausalLM",
        dict(GRANITE_H, num_local_experts=8, num_experts_per_tok=3, intermediate_size=64),
    ),
    "deepseek2moe": (
        "DeepseekV2ForCausalLM",
        dict(LATENT, routed_scaling_factor=1.7) | rope("yarn", mscale=0.707, mscale_all_dim=0.707, **YARN),
    ),
    "deepseek2moe groups": (
        "DeepseekV2ForCausalLM",
        dict(LATENT, q_lora_rank=48, topk_method="group_limited_greedy", n_group=4, topk_group=2)
        | dict(first_k_dense_replace=0, n_shared_experts=1, v_head_dim=48, kv_lora_rank=48)
        | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        | rope("yarn", mscale=0.7, mscale_all_dim=0.9, **YARN),
    ),
    "deepseek3moe": (
        "DeepseekV3ForCausalLM",
        dict(LATENT, q_lora_rank=32, n_group=4, topk_group=2, routed_scaling_factor=2.5)
        | dict(qk_nope_head_dim=16, v_head_dim=32, rms_norm_eps=1e-5)
        | rope("yarn", mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1, **YARN),
    ),
    "deepseek3moe halves": (
        "DeepseekV3ForCausalLM",
        dict(LATENT, n_group=1, topk_group=1, norm_topk_prob=False, rope_interleave=False)
        | dict(attention_bias=True, n_shared_experts=2),
    ),
    "glm4moelite": (
        "Glm4MoeLiteForCausalLM",
        {name: n for name, n in LATENT.items() if name != "first_k_dense_replace"}
        | dict(
            q_lora_rank=32,
            qk_nope_head_dim=48,
            v_head_dim=64,
            rope_parameters=dict(rope_type="default", rope_theta=1e6),
        )
        | dict(mlp_layer_types=["dense", "sparse", "sparse"]),
    ),
    "granite plain": ("GraniteForCausalLM", dict(attention_multiplier=0.25)),
}
