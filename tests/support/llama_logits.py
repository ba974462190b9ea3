"""Logits of a Llama checkpoint by transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinychat.quantize import settings


def logits(checkpoint, ids: np.ndarray) -> torch.Tensor:
    """Logits [T, vocab] of dequantized weights, by transformers' own Llama in float32."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**settings.hf_config(checkpoint.config))
    model = transformers.LlamaForCausalLM(config).eval()
    state = {}
    for name in model.state_dict():
        module, _, part = name.rpartition(".")
        if "norm" in module:
            state[name] = checkpoint.vector(module)
        elif part == "bias":
            state[name] = checkpoint.linear(module).bias
        elif checkpoint.has(module):
            state[name] = checkpoint.linear(module).dequantize()
    tensors = {k: torch.from_numpy(np.array(v, np.float32)) for k, v in state.items()}
    model.load_state_dict(tensors, strict=False)
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None]).logits[0]
