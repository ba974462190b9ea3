"""Token ids recorded from llama.cpp (tests/data/make_llama_cpp_tokens.py)."""

from __future__ import annotations

import json
from pathlib import Path

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "llama_cpp_tokens.json").read_text())


def sentencepiece_fields() -> dict:
    spm = GOLDEN["sentencepiece"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": spm["tokens"],
        "tokenizer.ggml.token_type": spm["types"],
        "tokenizer.ggml.scores": spm["scores"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
