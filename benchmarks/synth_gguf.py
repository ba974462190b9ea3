"""Random-weight Q4_0 Llama GGUF (Q8_0 embedding and head) of one of tinychat's shapes, for the peers.

usage: synth_gguf.py SHAPE TOKENIZER.gguf OUT.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from tinychat.synthetic import SHAPES

PAYLOAD = {
    GGMLQuantizationType.Q4_0: 16,
    GGMLQuantizationType.Q8_0: 32,
}  # bytes of codes in a block of 32 weights


def write(shape: str, tokenizer: Path, out: Path) -> None:
    """Write the file; `tokenizer` lends its vocabulary, padded or cut to the shape's size."""
    c = SHAPES[shape]
    reader, w = GGUFReader(tokenizer), GGUFWriter(out, "llama")
    rng = np.random.default_rng(0)
    w.add_file_type(2)
    w.add_block_count(c.n_layers)
    w.add_context_length(8192)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.layers[0].mlp.size)
    w.add_head_count(c.n_heads)
    w.add_head_count_kv(c.n_kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(c.vocab_size)
    w.add_rope_dimension_count(c.head_dim)
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

    def linear(name: str, kind: GGMLQuantizationType, n: int, k: int, scale: float) -> None:
        block = np.empty((n, k // 32, 2 + PAYLOAD[kind]), np.uint8)
        block[:, :, 2:] = rng.integers(0, 256, (n, k // 32, PAYLOAD[kind]), dtype=np.uint8)
        block[:, :, :2] = np.float16(scale).view(np.uint16).reshape(1).view(np.uint8)
        w.add_tensor(name, block.reshape(n, -1), raw_dtype=kind)

    q4, q8 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
    h, kv = c.hidden_size, c.n_kv_heads * c.head_dim
    linear("token_embd.weight", q8, c.vocab_size, h, 0.0003)
    linear("output.weight", q8, c.vocab_size, h, 0.0003)
    w.add_tensor("output_norm.weight", np.ones(h, np.float32))
    for i in range(c.n_layers):
        b = f"blk.{i}."
        w.add_tensor(b + "attn_norm.weight", np.ones(h, np.float32))
        w.add_tensor(b + "ffn_norm.weight", np.ones(h, np.float32))
        for name, n, k in (
            ("attn_q", c.n_heads * c.head_dim, h),
            ("attn_k", kv, h),
            ("attn_v", kv, h),
            ("attn_output", h, c.n_heads * c.head_dim),
            ("ffn_gate", c.layers[0].mlp.size, h),
            ("ffn_up", c.layers[0].mlp.size, h),
            ("ffn_down", h, c.layers[0].mlp.size),
        ):
            linear(b + name + ".weight", q4, n, k, 0.02 / np.sqrt(k / 64))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
