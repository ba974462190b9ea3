"""A model in every scheme of quantized folders, against transformers on the same dequantized weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import raw_safetensors
import torch
from families import CASES, experts_apart, logits_of, random_model, relative_error, set_weight
from memories import allocate, step_of
from scheme_packers import DTYPES, SCHEMES

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.cpu_pack import KERNELS
from tinychat.backends.reference import ReferenceBackend
from tinychat.formats import open_checkpoint
from tinychat.network.weight_policy import WeightPolicy

IDS = np.random.default_rng(1).integers(0, 258, 40).astype(np.int32)
TABLE = np.arange(8, dtype=np.int32)


def write(hf, folder, scheme, embedding=False):
    """The folder of the model with its linears in that scheme; `hf` gets the weights that it holds."""
    from tiny import byte_tokenizer

    said, make = SCHEMES[scheme]
    rng = np.random.default_rng(0)
    settings = hf.config.to_dict() | {"architectures": [type(hf).__name__]} | said
    state = {name: t.detach().numpy().copy() for name, t in experts_apart(hf.state_dict()).items()}
    if hf.config.tie_word_embeddings:
        del state["lm_head.weight"]
    dtypes = {}
    names = [n for n in state if n.endswith("_proj.weight")]
    names += ["model.embed_tokens.weight"] if embedding else []
    for name in (n.removesuffix(".weight") for n in names):
        parts = make(rng, *state.pop(f"{name}.weight").shape)
        state |= {f"{name}.{part}": a for part, a in parts.items()}
        dtypes |= {f"{name}.{part}": d for part, d in DTYPES.get(scheme, {}).items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    raw_safetensors.write(folder / "model.safetensors", state, dtypes)
    byte_tokenizer().save(folder)
    checkpoint = open_checkpoint(folder)
    for name in (n.removesuffix(".weight") for n in names):
        if name.endswith("embed_tokens"):
            with torch.no_grad():
                hf.model.embed_tokens.weight.copy_(torch.from_numpy(checkpoint.linear(name).dequantize()))
        else:
            set_weight(hf, name, checkpoint.linear(name).dequantize())
    return checkpoint


def run(backend):
    allocate(backend, 8)
    steps = [(0, 23), (23, 24), (24, 40)]
    return np.concatenate([backend.step(step_of(backend, IDS[a:b], a, a, TABLE, 0)) for a, b in steps])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_equal_transformers_on_the_dequantized_weights(scheme, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    hf = random_model("LlamaForCausalLM", num_hidden_layers=2, tie_word_embeddings=scheme.startswith("mlx"))
    checkpoint = write(hf, tmp_path / "model", scheme, embedding=scheme.startswith("mlx"))
    theirs, policy = logits_of(hf, IDS), WeightPolicy("none", 16)
    assert np.isfinite(theirs).all()
    assert relative_error(run(ReferenceBackend(checkpoint, policy)), theirs) < 1e-4
    exact = KERNELS.hold(checkpoint.stored("model.layers.0.mlp.up_proj")[0], 64)
    ours = run(CpuBackend(checkpoint, policy, threads=1, act_bits=16))
    assert relative_error(ours, theirs) < (
        3e-3 if exact else 0.1
    )  # rounded to int8 where no kernel reads codes


def stacked(state, keep):
    """A layer's experts in one tensor for each part, as `keep` names them."""
    out, stacks = {}, {}
    for name, a in state.items():
        prefix, found, rest = name.partition(".mlp.experts.")
        if not found:
            out[name] = a
            continue
        _, linear, part = rest.split(".")
        stacks.setdefault((prefix, linear, part), []).append(a)
    for (prefix, linear, part), arrays in stacks.items():
        out[keep(prefix, linear, part)] = np.stack(arrays)
    return out


def experts(tmp_path, scheme, name_of=None, turn=None):
    """Logits of a mixture of experts that is stored stacked, and transformers'."""
    cls, changes = CASES["qwen3moe"]
    hf = random_model(cls, **changes | {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2})
    write(hf, tmp_path / "apart", scheme)
    file = tmp_path / "apart/model.safetensors"
    state, dtypes = raw_safetensors.load(file)
    named = stacked(state, name_of) if turn is None else turn(state)
    eights = "F8_E4M3" in dtypes.values()
    raw_safetensors.write(file, named, dict.fromkeys(named, "F8_E4M3") if eights else None)
    checkpoint = open_checkpoint(tmp_path / "apart")
    return run(ReferenceBackend(checkpoint, WeightPolicy("none", 16))), logits_of(hf, IDS)


def test_experts_that_mlx_stacks_are_read_one_by_one(tmp_path):
    ours, theirs = experts(tmp_path, "mlx 3", lambda p, linear, part: f"{p}.mlp.switch_mlp.{linear}.{part}")
    assert relative_error(ours, theirs) < 1e-4


def test_experts_in_fp8_that_transformers_stacks_are_read_one_by_one(tmp_path):
    suffix = {"weight": "", "weight_scale_inv": "_scale_inv"}

    def turn(state):
        named = stacked(state, lambda p, linear, part: f"{p}.mlp.experts.{linear}{suffix[part]}")
        for name in [n for n in named if ".experts.gate_proj" in n]:
            up = named.pop(name.replace("gate_proj", "up_proj"))
            named[name.replace("gate_proj", "gate_up_proj")] = np.concatenate([named.pop(name), up], axis=1)
        return named

    ours, theirs = experts(tmp_path, "fp8", turn=turn)
    assert relative_error(ours, theirs) < 1e-4


def test_experts_of_gpt_oss_have_rows_of_gate_and_up_in_turn(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    cls, changes = CASES["qwen3moe"]
    hf = random_model(cls, **changes | {"num_hidden_layers": 1, "num_experts": 4})
    size, hidden = hf.config.moe_intermediate_size, hf.config.hidden_size
    rng = np.random.default_rng(3)
    stacks = {}
    for linear, n, k in (("gate_up_proj", 2 * size, hidden), ("down_proj", hidden, size)):
        stacks[f"{linear}_blocks"] = rng.integers(0, 256, (4, n, k // 32, 16)).astype(np.uint8)
        stacks[f"{linear}_scales"] = rng.integers(118, 122, (4, n, k // 32)).astype(np.uint8)
    prefix = "model.layers.0.mlp.experts."
    state = {n: t.detach().numpy() for n, t in hf.state_dict().items() if ".experts." not in n}
    said = {"architectures": [cls], "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(hf.config.to_dict() | said))
    named = state | {prefix + n: a for n, a in stacks.items()}
    raw_safetensors.write(tmp_path / "model.safetensors", named)
    checkpoint = open_checkpoint(tmp_path)
    weights = {
        linear: convert_moe_packed_tensors(
            *(torch.from_numpy(stacks[f"{linear}_{p}"]) for p in ("blocks", "scales")), dtype=torch.float32
        ).transpose(1, 2)
        for linear in ("gate_up_proj", "down_proj")
    }
    for e in range(4):  # transformers' GptOssExperts: gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate_up, down = (weights[linear][e].numpy() for linear in ("gate_up_proj", "down_proj"))
        expected = {"gate_proj": gate_up[::2], "up_proj": gate_up[1::2], "down_proj": down}
        for name, weight in expected.items():
            np.testing.assert_array_equal(checkpoint.linear(f"{prefix}{e}.{name}").dequantize(), weight)
