"""Every family in every 4-bit format, from disk, against transformers on the same dequantized weights."""

from __future__ import annotations

import json

import numpy as np
import packers
import pytest
from families import (
    CASES,
    as_files_name_it,
    experts_apart,
    logits_of,
    random_model,
    relative_error,
    set_weight,
    usual_error,
)
from memories import allocate, step_of
from safetensors.numpy import save_file
from tiny import byte_tokenizer

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.formats import awq
from tinychat.formats.hf import ARCHITECTURES, HFCheckpoint, read_config
from tinychat.models import FAMILIES
from tinychat.network.family import shapes_in_files
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import QuantizedLinear, quantize_rtn

GROUP = 32
N, BLOCKS = 100, 8
IDS = np.random.default_rng(1).integers(0, 258, N).astype(np.int32)
TABLE = np.arange(BLOCKS, dtype=np.int32)
FAMILY_CASES = (
    "llama yarn",
    "qwen2",
    "qwen3",
    "phi3 longrope",
    "smollm3",
    "olmo2",
    "granite",
    "gemma2",
    "gemma3",
    "gemma4 tied",
    "mixtral all",
    "qwen3moe dense layers",
    "glm4",
    "ernie4.5 bias",
    "lfm2",
    "lfm3",
    "qwen3.5",
    "qwen3next listed",
    "deepseek2moe",
)


def gptq(w: QuantizedLinear, seed: int):
    """With act-order: group i holds inputs from all over the row."""
    k = w.shape[1]
    groups = np.random.default_rng(seed).permutation(np.arange(k) // GROUP)
    order = np.argsort(groups, kind="stable")  # column j of w is input order[j]
    codes = np.empty_like(w.codes)
    codes[:, order] = w.codes
    truth = QuantizedLinear(w.codes, w.scales, w.zeros, perm=order.astype(np.int32))
    return packers.gptq(codes, w.zeros, w.scales, groups, 1), truth.dequantize()


def plain(pack):
    return lambda w, seed: (pack(w), w.dequantize())


WEIGHTS = dict(num_bits=4, type="int", symmetric=False, strategy="group", group_size=GROUP)
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
FORMATS = {
    "gemm": (AWQ, plain(awq.pack)),
    "gemv": (AWQ | {"version": "gemv"}, plain(lambda w: packers.autoawq_gemv(w.codes, w.zeros, w.scales))),
    "gemv_fast": (
        AWQ | {"version": "gemv_fast"},
        plain(lambda w: packers.autoawq_gemv_fast(w.codes, w.zeros, w.scales)),
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}, gptq),
    "compressed-tensors": (
        COMPRESSED,
        plain(lambda w: packers.compressed_tensors(w.codes, w.zeros, w.scales)),
    ),
}


def write(hf, folder, format_name):
    """The model's folder, its linears quantized; `hf` gets the dequantized weights."""
    config, pack = FORMATS[format_name]
    folder.mkdir()
    settings = hf.config.to_dict() | {"architectures": [type(hf).__name__], "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(settings))

    cfg, (_, form) = read_config(settings), ARCHITECTURES[type(hf).__name__]
    state = {name: t.detach().numpy().copy() for name, t in experts_apart(hf.state_dict()).items()}
    for layer in range(cfg.n_layers):
        modules = shapes_in_files(form, cfg, FAMILIES[cfg.family].linears(cfg, layer))
        for seed, name in enumerate(modules):
            if (name.endswith("v_proj") and layer == 1) or name.endswith(("mlp.gate", "expert_gate")):
                continue  # a module left in 16 bits, as routers always are
            w = quantize_rtn(state.pop(f"{name}.weight"), GROUP)
            parts, dequantized = pack(w, seed)
            state |= {f"{name}.{part}": a for part, a in parts.items()}
            set_weight(hf, name, dequantized)
    if cfg.tie_embeddings:
        del state["lm_head.weight"]
    cls = type(hf).__name__
    save_file({as_files_name_it(k, cls): a for k, a in state.items()}, folder / "model.safetensors")


def run(backend):
    allocate(backend, BLOCKS)
    steps = [(0, 61), (61, 62), (62, 63), (63, N)]
    return np.concatenate([backend.step(step_of(backend, IDS[a:b], a, a, TABLE, 0)) for a, b in steps])


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("case", FAMILY_CASES)
def test_logits_equal_transformers_on_the_dequantized_weights(case, format_name, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    cls, changes = CASES[case]
    hf = random_model(cls, **changes)
    write(hf, tmp_path / "model", format_name)
    theirs = logits_of(hf, IDS)
    checkpoint, policy = HFCheckpoint(tmp_path / "model"), WeightPolicy("none", 16)
    assert relative_error(run(ReferenceBackend(checkpoint, policy)), theirs) < 1e-4
    error = usual_error if checkpoint.config.n_experts else relative_error
    assert error(run(CpuBackend(checkpoint, policy, threads=1, act_bits=16)), theirs) < 3e-3


@pytest.mark.parametrize("original", [True, False], ids=["a linear each", "in one tensor"])
@pytest.mark.parametrize("case", ["mixtral", "qwen3moe dense layers", "qwen2moe", "gpt-oss"])
def test_experts_are_read_as_transformers_saves_them(case, original, tmp_path):
    cls, changes = CASES[case]
    hf = random_model(cls, **changes)
    hf.save_pretrained(tmp_path / "model", save_original_format=original)
    names = HFCheckpoint(tmp_path / "model")._tensors._open(None)
    assert any(".experts.gate_up_proj" in name for name in names) != (original and case != "gpt-oss")
    assert any(".block_sparse_moe.experts.0.w1" in name for name in names) == (original and case == "mixtral")
    backend = ReferenceBackend(HFCheckpoint(tmp_path / "model"), WeightPolicy("none", 16))
    assert relative_error(run(backend), logits_of(hf, IDS)) < 1e-4


def test_experts_that_are_missing_or_too_many_are_refused(tmp_path):
    hf = random_model(CASES["mixtral"][0], **CASES["mixtral"][1])
    hf.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for n, error in ((9, CheckpointError), (7, UnsupportedModelError)):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_local_experts": n}))
        with pytest.raises(error, match=r"experts\.[78]\.|mlp\.gate"):
            ReferenceBackend(HFCheckpoint(tmp_path / "model"), WeightPolicy("none", 16))


def test_a_mixture_of_experts_is_counted_whole_in_memory_and_by_what_a_token_takes_in_speed(tmp_path):
    from tinychat.bench import linear_bytes, weight_bytes_per_token
    from tinychat.hub import store
    from tinychat.loading import count_weights

    cls, changes = CASES["qwen3moe dense layers"]
    hf = random_model(cls, **changes)
    hf.save_pretrained(tmp_path / "model")
    byte_tokenizer().save(tmp_path / "model")
    facts = store.show(str(tmp_path / "model"))
    assert facts["experts"] == "4 of 16"
    assert facts["parameters"] == sum(p.numel() for p in hf.parameters())  # a tied head counts once
    checkpoint, policy = HFCheckpoint(tmp_path / "model"), WeightPolicy("rtn")
    vectors = sum(p.numel() for name, p in hf.named_parameters() if "norm" in name)
    assert count_weights(checkpoint.config) == facts["parameters"] - vectors
    names = [n for layer in range(4) for n in FAMILIES["qwen3_moe"].linears(checkpoint.config, layer)]
    one, rest = "model.layers.1.mlp.experts.0.", [n for n in names if ".experts." not in n]
    expert = sum(
        linear_bytes(policy.linear(checkpoint, one + n)) for n in ("gate_proj", "up_proj", "down_proj")
    )
    others = sum(linear_bytes(policy.linear(checkpoint, n)) for n in rest if not n.endswith("mlp.gate"))
    router, head = 4 * 16 * 64, linear_bytes(policy.embedding(checkpoint, "model.embed_tokens"))
    assert weight_bytes_per_token(checkpoint, policy) == int(others + 4 * expert + router + head)
