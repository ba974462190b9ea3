"""gpt-oss as OpenAI stores it: experts in MXFP4 blocks beside their biases."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import CASES, logits_of, random_model, relative_error, usual_error
from memories import allocate, step_of
from safetensors.numpy import load_file, save_file

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import UnsupportedModelError
from tinychat.formats.hf import HFCheckpoint, read_config
from tinychat.network.weight_policy import WeightPolicy

IDS = np.random.default_rng(1).integers(0, 258, 60).astype(np.int32)
# the values of a 4-bit code: one sign, two exponent and one mantissa bit
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def blocks_of(n: int, rows: int, k: int, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random blocks [n, rows, k / 32, 16], scales [n, rows, k / 32], and the weights [n, rows, k] in them."""
    blocks = rng.integers(0, 256, (n, rows, k // 32, 16), dtype=np.uint8)
    scales = rng.integers(122, 126, (n, rows, k // 32), dtype=np.uint8)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(n, rows, k // 32, 32)  # low nibble first
    return (
        blocks,
        scales,
        (E2M1[codes] * 2.0 ** (scales[..., None].astype(np.float32) - 127)).reshape(n, rows, k),
    )


def saved(folder):
    """A tiny model in OpenAI's layout; the model of transformers has the weights that the blocks say."""
    cls, changes = CASES["gpt-oss"]
    hf = random_model(cls, **changes)
    hf.save_pretrained(folder)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for i, layer in enumerate(hf.model.layers):
        for linear in ("gate_up_proj", "down_proj"):
            parameter, name = getattr(layer.mlp.experts, linear), f"model.layers.{i}.mlp.experts.{linear}"
            n, k, rows = parameter.shape
            blocks, scales, weights = blocks_of(n, rows, k, rng)
            parameter.data = torch.from_numpy(weights.swapaxes(1, 2).copy())
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return hf


def logits(backend) -> np.ndarray:
    allocate(backend, 8)
    steps = [(0, 40), (40, 41), (41, 60)]
    table = np.arange(8, dtype=np.int32)
    return np.concatenate([backend.step(step_of(backend, IDS[a:b], a, a, table, 0)) for a, b in steps])


def test_mxfp4_experts_are_run_as_they_are_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    theirs = logits_of(saved(tmp_path / "model"), IDS)
    checkpoint, policy = HFCheckpoint(tmp_path / "model"), WeightPolicy("none", 16)
    form, _ = checkpoint.stored("model.layers.0.mlp.experts.3.gate_proj")
    assert (form.bits, form.decoding, form.group, form.scale) == (4, "e2m1", 32, "e8m0")
    reference = logits(ReferenceBackend(checkpoint, policy))
    assert relative_error(reference, theirs) < 1e-4
    cpu = CpuBackend(checkpoint, policy, threads=2, act_bits=16)
    assert usual_error(logits(cpu), theirs) < 3e-3


def test_settings_that_are_silent_are_those_of_the_published_models():
    published = dict(
        architectures=["GptOssForCausalLM"], hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
        num_attention_heads=64, vocab_size=201088, num_local_experts=32,
    )  # fmt: skip
    cfg = read_config(published)
    first, second = (layer.mixer for layer in cfg.layers[:2])
    assert (first.window, second.window, first.head_dim, first.n_kv_heads) == (128, 0, 64, 8)
    assert (cfg.layers[0].mlp.taken, cfg.layers[0].mlp.limit) == (4, 7.0)
    assert first.rope.magnitude == 1 + 0.1 * np.log(32)
    # transformers' own frequencies for these settings
    from transformers import GptOssConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](GptOssConfig(), "cpu")
    np.testing.assert_allclose(first.rope.frequencies(), theirs.numpy(), rtol=1e-5)


def test_another_layer_type_is_refused_by_name():
    given = dict(
        architectures=["GptOssForCausalLM"], hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, vocab_size=258, layer_types=["chunked_attention"],
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        read_config(given)
