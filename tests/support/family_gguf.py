"""Writes a tiny random model of any family as a GGUF: names from the gguf package's own map, metadata and
reordering as llama.cpp's converter makes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from families import projections_apart
from ggml_blocks import Kind, random_blocks
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from gguf.quants import dequantize
from tiny_gguf import permute

ARCHS = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
NAMED_AS = {"granite_swa": "granite"}  # younger than the package
# LlamaModel and what the converter derives from it: rows of q and k in pairs
PERMUTED = ("granitehybrid", "llama", "smollm3", "granite", "granite_swa", "mistral3")


def write(path: Path, hf, arch: str, kind: Callable[[str], Kind | None] = lambda name: None) -> None:
    """The model `hf` in float32. Where `kind` names a type for a tensor of the file, its blocks are random,
    and the weights of `hf` become what these are.
    """
    from tokenizers import pre_tokenizers

    c = copy.copy(hf.config)
    c.allow_global_per_layer_attribute_access = True  # the first layer's, where they differ
    w = GGUFWriter(path, arch)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if arch == "gemma4":
        head_dim = c.per_layer_config["full_attention"].head_dim
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    dense = [t for name, t in hf.state_dict().items() if name.endswith(("mlp.up_proj.weight", ".w3.weight"))]
    sizes = [len(t) for t in dense] if arch != "gemma3n" else c.intermediate_size
    if arch.startswith("nemotron"):
        size = c.moe_intermediate_size if arch.endswith("moe") else c.intermediate_size
        sizes = [size * (kind in ("mlp", "moe")) for kind in c.layer_types]
    if arch == "granitehybrid":
        sizes = [c.intermediate_size if c.num_local_experts else c.shared_intermediate_size]
    w.add_feed_forward_length(sizes if len(set(sizes)) > 1 else sizes[0] if sizes else c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    types = getattr(c, "layer_types", None) or [""]
    stateful = ("conv", "mlp", "moe")
    stateful += ("linear_attention",) if arch == "granitehybrid" or arch.startswith("nemotron") else ()
    kv_heads = [c.num_key_value_heads * (kind not in stateful) for kind in types]
    if arch == "gemma4":
        kv_heads = [c.per_layer_config[i].num_key_value_heads for i in range(c.num_hidden_layers)]
    w.add_head_count_kv(kv_heads if len(set(kv_heads)) > 1 else c.num_key_value_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    eps = next(name for name in ("rms_norm_eps", "norm_eps", "layer_norm_epsilon") if hasattr(c, name))
    w.add_layer_norm_rms_eps(getattr(c, "norm_eps" if arch.startswith("lfm2") else eps))
    w.add_vocab_size(c.vocab_size)
    tensors = dict(hf.state_dict())
    experts(w, c, tensors)
    METADATA.get(arch, window)(w, c, tensors)
    if not arch.startswith("nemotron"):
        rope(w, c, head_dim, tensors)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"])
    w.add_token_types([1] * 256 + [3, 3])
    w.add_token_merges(["a b"])
    w.add_eos_token_id(257)
    w.add_bos_token_id(256)
    names = get_tensor_name_map(ARCHS[NAMED_AS.get(arch, arch)], c.num_hidden_layers)
    for name, t in tensors.items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        a = np.ascontiguousarray(t.numpy() if hasattr(t, "numpy") else t)
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if arch in PERMUTED and heads:
            a = permute(a.reshape(len(a), -1), heads).reshape(a.shape)
        if arch in ("gemma2", "gemma3") and "norm" in name:
            a = a + 1
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        chosen = kind(stored) if a.ndim > 1 else None
        if chosen is None:
            w.add_tensor(stored, np.ascontiguousarray(a))
            continue
        rng = np.random.default_rng(len(name))
        blocks = random_blocks(chosen, a.size // a.shape[-1], a.shape[-1], rng, SCALES[chosen])
        values = dequantize(blocks.reshape(len(blocks), -1), chosen).astype(np.float32).reshape(a.shape)
        if arch in PERMUTED and heads:
            values = values.reshape(heads, -1, 2, a.shape[-1]).swapaxes(1, 2).reshape(a.shape)
        if chosen == Kind.NVFP4 and stored.startswith("blk."):  # one more scale for each matrix
            each = rng.uniform(0.5, 2, a.shape[0] if a.ndim == 3 else 1).astype(np.float32)
            w.add_tensor(stored.replace(".weight", ".scale"), each)
            w.add_tensor(stored.replace(".weight", ".input_scale"), np.ones_like(each))
            values = values * each.reshape(-1, *[1] * (a.ndim - 1))
        t.copy_(torch.from_numpy(values.copy()))
        w.add_tensor(stored, blocks.reshape(*a.shape[:-1], -1), raw_dtype=chosen)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# Scales that make weights of about 1/16 out of random codes
SCALES = dict.fromkeys(Kind, 1 / 16) | {
    Kind.Q2_K: 2**-8,
    Kind.Q3_K: 2**-9,
    Kind.Q4_K: 2**-12,
    Kind.Q5_K: 2**-13,
    Kind.Q6_K: 2**-14,
    Kind.Q4_0: 2**-6,
    Kind.Q5_0: 2**-7,
    Kind.Q5_1: 2**-8,
    Kind.Q8_0: 2**-10,
    Kind.IQ4_NL: 2**-10,
    Kind.NVFP4: 2**-4,
    Kind.IQ4_XS: 2**-14,
}


def experts(w: GGUFWriter, c, tensors: dict) -> None:
    n = getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None)
    if not n or c.model_type in ("lfm2_moe", "granitemoehybrid", "nemotron_h"):
        return
    if c.model_type == "gemma4_text":
        return gemma4_experts(w, c, tensors)
    w.add_expert_count(n)
    w.add_expert_used_count(c.num_experts_per_tok)
    size = getattr(c, "moe_intermediate_size", c.intermediate_size if c.model_type == "gpt_oss" else None)
    if size:
        w.add_expert_feed_forward_length(size)
    if c.model_type == "gpt_oss":
        return gpt_oss(tensors)
    for name in [n for n in tensors if n.endswith("experts.gate_up_proj")]:
        prefix, gate_up = name.removesuffix("gate_up_proj"), tensors.pop(name)
        for part, t in zip(("gate_proj", "up_proj"), gate_up.chunk(2, dim=1), strict=True):
            tensors[f"{prefix}{part}.weight"] = t
        tensors[f"{prefix}down_proj.weight"] = tensors.pop(f"{prefix}down_proj")
    for name in [n for n in tensors if n.endswith("mlp.gate.weight")]:
        tensors[name.replace("mlp.gate", "block_sparse_moe.gate")] = tensors.pop(name)


def gemma4_experts(w: GGUFWriter, c, tensors: dict) -> None:
    """Gemma4Model.modify_tensors: gate and up stay in one tensor."""
    w.add_expert_count(c.num_experts)
    w.add_expert_used_count(c.top_k_experts)
    w.add_expert_feed_forward_length(c.moe_intermediate_size)
    for i in range(c.num_hidden_layers):
        p = f"model.layers.{i}."
        tensors[f"blk.{i}.ffn_gate_inp.scale"] = tensors.pop(p + "router.scale")
        tensors[f"blk.{i}.ffn_down_exps.scale"] = tensors.pop(p + "router.per_expert_scale")
        for part in ("gate_up_proj", "down_proj"):
            tensors[f"{p}experts.{part}.weight"] = tensors.pop(f"{p}experts.{part}")


def gpt_oss(tensors: dict) -> None:
    """GptOssModel.modify_tensors."""
    sinks(tensors)
    for name in [n for n in tensors if ".mlp.experts." in n]:
        prefix, _, linear = name.rpartition(".")
        part, t = "bias" if linear.endswith("_bias") else "weight", tensors.pop(name)
        rows, linear = t if part == "bias" else t.transpose(1, 2), linear.removesuffix("_bias")
        if linear == "gate_up_proj":
            tensors[f"{prefix}.gate_proj.{part}"] = rows[:, ::2]
            tensors[f"{prefix}.up_proj.{part}"] = rows[:, 1::2]
        else:
            tensors[f"{prefix}.{linear}.{part}"] = rows


def rope(w: GGUFWriter, c, head_dim: int, tensors: dict) -> None:
    p = c.rope_parameters
    p = p.get("full_attention", p)
    dim = (
        int(head_dim * p.get("partial_rotary_factor", 1.0)) if p["rope_type"] != "proportional" else head_dim
    )
    w.add_rope_dimension_count(dim)
    theta = p["rope_theta"]
    if p.get("alpha"):  # HunYuanModel.set_gguf_parameters
        theta *= p["alpha"] ** (head_dim / (head_dim - 2))
    w.add_rope_freq_base(theta)
    if p["rope_type"] == "linear":
        from gguf import RopeScalingType

        w.add_rope_scaling_type(RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(p["factor"])
    if p["rope_type"] == "yarn":
        from gguf import RopeScalingType

        w.add_rope_scaling_type(RopeScalingType.YARN)
        w.add_rope_scaling_factor(p["factor"])
        w.add_rope_scaling_orig_ctx_len(p["original_max_position_embeddings"])
        if p.get("beta_fast"):
            w.add_rope_scaling_yarn_beta_fast(p["beta_fast"])
            w.add_rope_scaling_yarn_beta_slow(p["beta_slow"])
        if p.get("mscale_all_dim"):
            w.add_rope_scaling_yarn_log_mul(p["mscale_all_dim"] * (0.1 if w.arch == "deepseek2" else 1))
        if p.get("llama_4_scaling_beta"):
            w.add_attn_temperature_scale(p["llama_4_scaling_beta"])
    if p["rope_type"] == "longrope":  # Phi3MiniModel.generate_extra_tensors
        original, factor = c.original_max_position_embeddings, c.max_position_embeddings
        factor /= original
        w.add_rope_scaling_orig_ctx_len(original)
        w.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(factor) / np.log(original))))
        for kind in ("long", "short"):
            tensors[f"rope_factors_{kind}.weight"] = np.array(p[f"{kind}_factor"], np.float32)


def granite(w: GGUFWriter, c, tensors: dict) -> None:
    w.add_attention_scale(c.attention_multiplier)
    w.add_embedding_scale(c.embedding_multiplier)
    w.add_residual_scale(c.residual_multiplier)
    w.add_logit_scale(c.logits_scaling)


def gemma(w: GGUFWriter, c, tensors: dict) -> None:
    w.add_sliding_window(c.sliding_window)
    if c.attn_logit_softcapping:
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
    if c.final_logit_softcapping:
        w.add_final_logit_softcapping(c.final_logit_softcapping)


def gemma4(w: GGUFWriter, c, tensors: dict) -> None:
    """Gemma4Model of llama.cpp's converter."""
    pattern(w, c, tensors)
    if c.final_logit_softcapping:
        w.add_final_logit_softcapping(c.final_logit_softcapping)
    w.add_shared_kv_layers(c.num_kv_shared_layers)
    w.add_embedding_length_per_layer_input(c.hidden_size_per_layer_input or 0)
    w.add_key_length_swa(c.head_dim)
    w.add_value_length_swa(c.head_dim)
    w.add_rope_dimension_count_swa(c.head_dim)
    w.add_rope_freq_base_swa(c.rope_parameters["sliding_attention"]["rope_theta"])
    far, dim = c.rope_parameters["full_attention"], c.per_layer_config["full_attention"].head_dim
    turned = int(dim * far["partial_rotary_factor"] / 2)
    tensors["rope_freqs.weight"] = np.array([1.0] * turned + [1e30] * (dim // 2 - turned), np.float32)
    for name in [n for n in tensors if n.endswith("layer_scalar")]:
        tensors[f"{name}.weight"] = tensors.pop(name)


def gemma3n(w: GGUFWriter, c, tensors: dict) -> None:
    """Gemma3NModel of llama.cpp's converter."""
    pattern(w, c, tensors)
    w.add_final_logit_softcapping(c.final_logit_softcapping)
    w.add_rope_freq_base_swa(c.rope_parameters["sliding_attention"]["rope_theta"])
    w.add_altup_active_idx(c.altup_active_idx)
    w.add_altup_num_inputs(c.altup_num_inputs)
    w.add_embedding_length_per_layer_input(c.hidden_size_per_layer_input)
    w.add_shared_kv_layers(c.num_kv_shared_layers)
    normal, sparse = torch.distributions.normal.Normal(0, 1), torch.tensor(c.activation_sparsity_pattern)
    w.add_activation_sparsity_scale([normal.icdf(s).item() for s in sparse])
    for part in ("altup_projections", "altup_unembed_projections"):
        parts = [tensors.pop(f"model.{part}.{i}.weight") for i in range(c.altup_num_inputs - 1)]
        tensors[f"model.{part}.weight"] = torch.stack(parts)
    for name in [n for n in tensors if n.endswith("correct_output_scale")]:
        tensors[f"{name}.weight"] = tensors.pop(name)
    table = "model.embed_tokens_per_layer.weight"
    missing = c.vocab_size - len(tensors[table])
    tensors[table] = torch.cat([tensors[table], torch.zeros(max(0, missing), tensors[table].shape[1])])


def granite_swa(w: GGUFWriter, c, tensors: dict) -> None:
    granite(w, c, tensors)
    pattern(w, c, tensors)
    sinks(tensors)


def sinks(tensors: dict) -> None:
    for name in [n for n in tensors if n.endswith("sinks")]:
        tensors[f"blk.{name.split('.')[2]}.attn_sinks.weight"] = tensors.pop(name)


def shared_expert(w: GGUFWriter, c, tensors: dict) -> None:
    w.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    for name in [n for n in tensors if n.endswith("shared_expert_gate.weight")]:
        tensors[name] = tensors[name].squeeze(0)


def window(w: GGUFWriter, c, tensors: dict) -> None:
    if c.model_type == "olmo3":
        return pattern(w, c, tensors)
    if getattr(c, "sliding_window", None):
        w.add_sliding_window(c.sliding_window)


def pattern(w: GGUFWriter, c, tensors: dict) -> None:
    if c.sliding_window:
        w.add_sliding_window(c.sliding_window)
        w.add_sliding_window_pattern([kind == "sliding_attention" for kind in c.layer_types])


def latent(w: GGUFWriter, c, tensors: dict) -> None:
    """DeepseekV2Model of llama.cpp's converter."""
    from gguf import ExpertGatingFuncType

    row = c.kv_lora_rank + c.qk_rope_head_dim
    for key, n in (("head_count_kv", 1), ("key_length", row), ("value_length", c.kv_lora_rank)):
        w.kv_data[0][f"deepseek2.attention.{key}"].value = n
    w.add_key_length_mla(c.qk_head_dim)
    w.add_value_length_mla(c.v_head_dim)
    w.add_kv_lora_rank(c.kv_lora_rank)
    if c.q_lora_rank:
        w.add_q_lora_rank(c.q_lora_rank)
    w.add_leading_dense_block_count(getattr(c, "first_k_dense_replace", 1))
    w.add_expert_shared_count(c.n_shared_experts)
    w.add_expert_weights_scale(c.routed_scaling_factor)
    w.add_expert_group_count(c.n_group or 1)
    w.add_expert_group_used_count(c.topk_group or 1)
    if c.norm_topk_prob:
        w.add_expert_weights_norm(True)
    if c.model_type == "deepseek_v3":
        w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    for name in [n for n in tensors if n.endswith("e_score_correction_bias")]:
        tensors[name.replace("_bias", ".bias")] = tensors.pop(name)
    for name in [n for n in tensors if n.endswith("kv_b_proj.weight")]:
        each = tensors.pop(name).unflatten(0, (c.num_attention_heads, -1))
        tensors[name.replace("kv_b", "k_b")] = each[:, : c.qk_nope_head_dim].transpose(1, 2).contiguous()
        tensors[name.replace("kv_b", "v_b")] = each[:, c.qk_nope_head_dim :].contiguous()


def convolutions(w: GGUFWriter, c, tensors: dict) -> None:
    """LFM2Model of llama.cpp's converter."""
    w.add_shortconv_l_cache(c.conv_L_cache)
    for name in [n for n in tensors if "conv.conv" in n]:
        tensors[name] = tensors[name].squeeze(1)


def routed_convolutions(w: GGUFWriter, c, tensors: dict) -> None:
    """Lfm2MoeModel of llama.cpp's converter."""
    from gguf import ExpertGatingFuncType

    convolutions(w, c, tensors)
    w.add_expert_count(c.num_experts)
    w.add_expert_used_count(c.num_experts_per_tok)
    w.add_expert_feed_forward_length(c.moe_intermediate_size)
    w.add_leading_dense_block_count(c.num_dense_layers)
    w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    for name in [n for n in tensors if "feed_forward.expert" in n]:
        prefix, t = name.rpartition("feed_forward.")[0].removeprefix("model."), tensors.pop(name)
        if name.endswith("expert_bias"):
            tensors[f"model.{prefix}feed_forward.expert_bias.bias"] = t
        elif name.endswith("down_proj"):
            tensors[f"{prefix}feed_forward.experts.w2.weight"] = t
        else:
            for part, half in zip(("w1", "w3"), t.chunk(2, dim=1), strict=True):
                tensors[f"{prefix}feed_forward.experts.{part}.weight"] = half


def deltas(w: GGUFWriter, c, tensors: dict) -> None:
    """Qwen3NextModel and Qwen3_5TextModel of llama.cpp's converter: value heads of one key head lie apart."""
    w.add_ssm_conv_kernel(c.linear_conv_kernel_dim)
    w.add_ssm_state_size(c.linear_key_head_dim)
    w.add_ssm_group_count(c.linear_num_key_heads)
    w.add_ssm_time_step_rank(c.linear_num_value_heads)
    w.add_ssm_inner_size(c.linear_value_head_dim * c.linear_num_value_heads)
    recurrent = [kind == "linear_attention" for kind in c.layer_types]
    w.add_array(f"{w.arch}.attention.recurrent_layers", recurrent)
    keys, dim = c.linear_num_key_heads, c.linear_value_head_dim

    def apart(t: torch.Tensor, size: int = 1) -> torch.Tensor:
        return t.unflatten(0, (keys, -1, size)).transpose(0, 1).flatten(0, 2).contiguous()

    for name in [n for n in tensors if "linear_attn" in n]:
        t = tensors.pop(name)
        if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
            first = 2 * keys * c.linear_key_head_dim
            t = torch.cat([t[:first], apart(t[first:], dim)]).squeeze(1)
        elif name.endswith("in_proj_z.weight"):
            t = apart(t, dim)
        elif name.endswith("out_proj.weight"):
            t = apart(t.T, dim).T.contiguous()
        elif not name.endswith("norm.weight"):
            t = apart(t)
        if name.endswith("A_log"):
            t = -torch.exp(t)
        tensors[name.replace(".dt_bias", ".dt_proj.bias")] = t
    for name in [n for n in tensors if n.endswith("norm.weight") and "linear_attn" not in n]:
        tensors[name] = tensors[name] + 1


def routed_deltas(w: GGUFWriter, c, tensors: dict) -> None:
    deltas(w, c, tensors)
    shared_expert(w, c, tensors)


def next_deltas(w: GGUFWriter, c, tensors: dict) -> None:
    """Qwen3NextModel of llama.cpp's converter: one of the two projections is taken apart."""
    shared_expert(w, c, tensors)
    w.add_ssm_conv_kernel(c.linear_conv_kernel_dim)
    w.add_ssm_state_size(c.linear_key_head_dim)
    w.add_ssm_group_count(c.linear_num_key_heads)
    w.add_ssm_time_step_rank(c.linear_num_value_heads)
    w.add_ssm_inner_size(c.linear_value_head_dim * c.linear_num_value_heads)
    recurrent = [kind == "linear_attention" for kind in c.layer_types]
    w.add_array(f"{w.arch}.attention.recurrent_layers", recurrent)
    for name in [n for n in tensors if n.endswith("norm.weight") and "linear_attn" not in n]:
        tensors[name] = tensors[name] + 1
    for name in [n for n in tensors if "linear_attn" in n]:
        t = tensors.pop(name)
        if name.endswith("in_proj_qkvz.weight"):
            for part, own in projections_apart({name: t}, c).items():
                blk = f"blk.{name.split('.')[2]}."
                tensors[blk + ("attn_gate" if part.endswith("z.weight") else "attn_qkv") + ".weight"] = own
            continue
        if name.endswith("conv1d.weight"):
            t = t.squeeze(1)
        elif name.endswith("A_log"):
            t = -torch.exp(t)
        tensors[name.replace(".dt_bias", ".dt_proj.bias")] = t


def states(w: GGUFWriter, c, tensors: dict, p: str = "mamba") -> None:
    """Mamba2Model of llama.cpp's converter."""
    w.add_ssm_conv_kernel(c.mamba_d_conv)
    w.add_ssm_state_size(c.mamba_d_state)
    w.add_ssm_group_count(c.mamba_n_groups)
    w.add_ssm_time_step_rank(c.mamba_n_heads)
    w.add_ssm_inner_size(c.mamba_n_heads * c.mamba_d_head)
    for name in [n for n in tensors if f".{p}." in n]:
        t = tensors.pop(name)
        if name.endswith("conv1d.weight"):
            t = t.squeeze(1)
        elif name.endswith((".A_log", ".D")):
            t = (-torch.exp(t) if name.endswith("A_log") else t)[:, None]
        elif name.endswith(f"{p}.norm.weight"):
            t = t.reshape(c.mamba_n_groups, -1)
        tensors[name.replace(".dt_bias", ".dt_proj.bias")] = t


def granite_states(w: GGUFWriter, c, tensors: dict) -> None:
    """GraniteHybridModel of llama.cpp's converter."""
    granite(w, c, tensors)
    states(w, c, tensors)
    w.add_rope_scaling_finetuned(c.position_embedding_type == "rope")
    end = "_shexp" if c.num_local_experts else ""
    if end:
        w.add_expert_count(c.num_local_experts)
        w.add_expert_used_count(c.num_experts_per_tok)
        w.add_expert_shared_feed_forward_length(c.shared_intermediate_size)
    for name in [n for n in tensors if "shared_mlp" in n or "block_sparse_moe" in n]:
        t, blk = tensors.pop(name), f"blk.{name.split('.')[2]}.ffn_"
        if "input_linear" in name:
            gate, up = t.chunk(2)
            tensors |= {f"{blk}gate{end}.weight": gate, f"{blk}up{end}.weight": up}
        elif "output_linear" in name:
            tensors[f"{blk}down{end}.weight"] = t
        elif "router" in name:
            tensors[blk + "gate_inp.weight"] = t
        elif name.endswith("gate_up_proj"):
            gate, up = t.chunk(2, dim=1)
            tensors |= {blk + "gate_exps.weight": gate, blk + "up_exps.weight": up}
        else:
            tensors[blk + "down_exps.weight"] = t


def falcon_states(w: GGUFWriter, c, tensors: dict) -> None:
    """FalconH1Model of llama.cpp's converter: factors become part of the weights."""
    states(w, c, tensors)
    attends = c.attention_in_multiplier
    by = {
        "q_proj": attends,
        "k_proj": attends * c.key_multiplier,
        "v_proj": attends,
        "o_proj": c.attention_out_multiplier,
        "gate_proj": c.mlp_multipliers[0],
        "down_proj": c.mlp_multipliers[1],
        "out_proj": c.ssm_out_multiplier,
        "lm_head": c.lm_head_multiplier,
        "embed_tokens": c.embedding_multiplier,
    }
    values, shared = c.mamba_n_heads * c.mamba_d_head, c.mamba_n_groups * c.mamba_d_state
    sizes = (values, values, shared, shared, c.mamba_n_heads)
    for name, t in list(tensors.items()):
        module = name.split(".")[-2]
        if module == "in_proj":
            parts = zip(t.split(sizes), c.ssm_multipliers, strict=True)
            tensors[name] = torch.cat([part * f * c.ssm_in_multiplier for part, f in parts])
        elif module in by:
            tensors[name] = t * by[module]


def nemotron(w: GGUFWriter, c, tensors: dict) -> None:
    """NemotronHModel of llama.cpp's converter."""
    named = dict(mamba_d_conv=c.conv_kernel, mamba_d_state=c.ssm_state_size, mamba_n_groups=c.n_groups)
    named |= dict(mamba_n_heads=c.mamba_num_heads, mamba_d_head=c.mamba_head_dim)
    states(w, SimpleNamespace(**named), tensors, "mixer")
    if w.arch == "nemotron_h_moe":
        w.add_expert_count(c.n_routed_experts)
        w.add_expert_used_count(c.num_experts_per_tok)
        w.add_expert_feed_forward_length(c.moe_intermediate_size)
        w.add_expert_shared_feed_forward_length(c.moe_shared_expert_intermediate_size)
        w.add_expert_shared_count(c.n_shared_experts)
        w.add_expert_weights_norm(c.norm_topk_prob)
        w.add_expert_weights_scale(c.routed_scaling_factor)
        w.add_expert_group_count(c.n_group)
    for name in list(tensors):
        usual = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
        if ".experts." in usual:
            usual = usual.replace("backbone.", "model.").replace("mixer.experts", "mlp.experts")
        usual = usual.replace("e_score_correction_bias", "e_score_correction.bias")
        usual = usual if usual.endswith((".weight", ".bias", "_log", ".D")) else usual + ".weight"
        tensors[usual] = tensors.pop(name)


METADATA = {
    "deepseek2": latent,
    "falcon-h1": falcon_states,
    "nemotron_h": nemotron,
    "nemotron_h_moe": nemotron,
    "granitehybrid": granite_states,
    "lfm2": convolutions,
    "lfm2moe": routed_convolutions,
    "qwen35": deltas,
    "granite": granite,
    "gemma2": gemma,
    "gemma3": gemma,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "exaone4": pattern,
    "granite_swa": granite_swa,
    "qwen2moe": shared_expert,
    "qwen35moe": routed_deltas,
    "qwen3next": next_deltas,
}
