"""Llama GGUF of random weights of one of tinychat's shapes, for the peers.

usage: synth_gguf.py SHAPE TOKENIZER.gguf OUT.gguf [FORM]

FORM: q4_k, iq4_xs, …; without one Q4_0 with a Q8_0 head.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize

from tinychat.synthetic import DEFAULT, HEAD, SHAPES, head_form

# Where a block has its fp16 numbers, and each one's share of the scale: offsets lie opposite the mean of
# what they go with. All other bytes are codes, and may be anything.
PLACES = {
    "Q2_K": {80: 1, 82: 1.5},
    "Q3_K": {108: 1},
    "Q4_K": {0: 1, 2: 7.5},
    "Q5_K": {0: 1, 2: 15.5},
    "Q6_K": {208: 1},
    "Q4_0": {0: 1},
    "Q4_1": {0: 1, 2: -7.5},
    "Q5_0": {0: 1},
    "Q5_1": {0: 1, 2: -15.5},
    "Q8_0": {0: 1},
    "IQ4_NL": {0: 1},
    "IQ4_XS": {0: 1},
    "MXFP4": {},  # a power of two in the first byte
}


def blocks(kind: GGMLQuantizationType, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [n, bytes of k weights] of random codes, with a deviation of about 1/sqrt(k)."""
    weights, size = GGML_QUANT_SIZES[kind]
    out = np.frombuffer(rng.bytes(n * k // weights * size), np.uint8).reshape(-1, size).copy()

    def scale(by: float) -> None:
        if kind == GGMLQuantizationType.MXFP4:
            out[:, 0] = 127 + round(np.log2(by))
        for place, share in PLACES[kind.name].items():
            out[:, place : place + 2] = np.float16(share * by).reshape(1).view(np.uint8)

    scale(1)
    scale(1 / (dequantize(out[:4096], kind).std() * np.sqrt(k)))
    return out.reshape(n, -1)


def write(shape: str, tokenizer: Path, out: Path, form: str = DEFAULT) -> None:
    """Write the file; `tokenizer` lends its vocabulary, padded or cut to the shape's size. form: of the
    body, a name of GGUF_FORMS; the head is what llama.cpp's files have.
    """
    c = SHAPES[shape]
    reader, w = GGUFReader(tokenizer), GGUFWriter(out, "llama")
    rng = np.random.default_rng(0)
    w.add_file_type(2)
    w.add_block_count(c.n_layers)
    w.add_context_length(8192)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.layers[0].mlp.size)
    w.add_head_count(c.attentions[0].n_heads)
    w.add_head_count_kv(c.attentions[0].n_kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(c.vocab_size)
    w.add_rope_dimension_count(c.attentions[0].head_dim)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    tokens = (tokens + [f"[PAD{i}]" for i in range(c.vocab_size - len(tokens))])[: c.vocab_size]
    have = set(tokens)
    merges = [m for m in reader.fields["tokenizer.ggml.merges"].contents() if m.replace(" ", "") in have]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types((types + [5] * (c.vocab_size - len(types)))[: c.vocab_size])
    w.add_token_merges(merges)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)

    def linear(name: str, kind: GGMLQuantizationType, n: int, k: int) -> None:
        w.add_tensor(name, blocks(kind, n, k, rng), raw_dtype=kind)

    body = GGMLQuantizationType["Q4_0" if form == DEFAULT else form.upper()]
    head = GGMLQuantizationType.Q8_0 if head_form(form, c.hidden_size) == HEAD else GGMLQuantizationType.Q6_K
    h, kv = c.hidden_size, c.attentions[0].n_kv_heads * c.attentions[0].head_dim
    linear("token_embd.weight", head if c.tie_embeddings else body, c.vocab_size, h)
    if not c.tie_embeddings:
        linear("output.weight", head, c.vocab_size, h)
    w.add_tensor("output_norm.weight", np.ones(h, np.float32))
    for i in range(c.n_layers):
        b = f"blk.{i}."
        w.add_tensor(b + "attn_norm.weight", np.ones(h, np.float32))
        w.add_tensor(b + "ffn_norm.weight", np.ones(h, np.float32))
        for name, n, k in (
            ("attn_q", c.attentions[0].n_heads * c.attentions[0].head_dim, h),
            ("attn_k", kv, h),
            ("attn_v", kv, h),
            ("attn_output", h, c.attentions[0].n_heads * c.attentions[0].head_dim),
            ("ffn_gate", c.layers[0].mlp.size, h),
            ("ffn_up", c.layers[0].mlp.size, h),
            ("ffn_down", h, c.layers[0].mlp.size),
        ):
            linear(b + name + ".weight", body, n, k)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
