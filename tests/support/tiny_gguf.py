"""Writes a tiny Llama as a GGUF, as llama.cpp's converter would: rows of q and k permuted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tiny import TEMPLATE

H, F, LAYERS, HEADS, KV, VOCAB = 64, 96, 2, 4, 2, 259


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from halves (x[i], x[i + D/2]) to neighbours (x[2i], x[2i + 1])."""
    n, k = w.shape
    return w.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    d = H // HEADS
    shapes = {"model.embed_tokens": (VOCAB, H)}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        shapes |= {
            p + "self_attn.q_proj": (HEADS * d, H),
            p + "self_attn.k_proj": (KV * d, H),
            p + "self_attn.v_proj": (KV * d, H),
            p + "self_attn.o_proj": (H, H),
            p + "mlp.gate_proj": (F, H),
            p + "mlp.up_proj": (F, H),
            p + "mlp.down_proj": (H, F),
        }
    return {n: rng.normal(0, 1.5 / np.sqrt(s[1]), s).astype(np.float32) for n, s in shapes.items()}


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    arch: str = "llama",
    change=None,
    shapes: dict[str, tuple[int, int]] | None = None,
    template: str | None = TEMPLATE,
    license: str | None = None,
    split: int = 0,
) -> dict[str, np.ndarray]:
    """Write the file; returns what each linear is after quantization, float32, in Hugging Face's row order.

    change: called with the writer, for more metadata. shapes: other shapes for GGUF tensor names. split: the
    most tensors in a file; `m.gguf` becomes `m-00001-of-0000N.gguf` and so on.
    """
    from tokenizers import pre_tokenizers

    w = GGUFWriter(path, arch, split_max_tensors=split)
    if license:
        w.add_license(license)
    w.add_block_count(LAYERS)
    w.add_context_length(256)
    w.add_embedding_length(H)
    w.add_feed_forward_length(F)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(H // HEADS)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>", "ab"])
    w.add_token_types([1] * 256 + [3, 3, 1])
    w.add_token_merges(["a b"])
    w.add_bos_token_id(256)
    w.add_eos_token_id(257)
    if template:
        w.add_chat_template(template)
    if change:
        change(w)
    truth = {}

    def tensor(name: str, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x)
        if shapes and name in shapes:
            x = np.zeros(shapes[name], np.float32)
        data = quants.quantize(x, kind)
        if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            w.add_tensor(name, data)
        else:
            w.add_tensor(name, data, raw_dtype=kind)
        return quants.dequantize(data, kind).astype(np.float32).reshape(x.shape)

    for name, x in weights().items():
        if name == "model.embed_tokens":
            truth[name] = tensor("token_embd.weight", x)
            continue
        _, _, layer, rest = name.split(".", 3)
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV}.get(rest)
        stored = f"blk.{layer}.{GGUF_NAMES[rest]}.weight"
        if heads is None:
            truth[name] = tensor(stored, x)
        else:
            # Quantization works on rows, so permuting before or after gives the same rows.
            tensor(stored, permute(x, heads))
            truth[name] = (
                quants.dequantize(quants.quantize(x, kind), kind).astype(np.float32).reshape(x.shape)
            )
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{norm}.weight", np.linspace(0.5, 1.5, H, dtype=np.float32))
    w.add_tensor("output_norm.weight", np.ones(H, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return truth
