"""Every layout of 4-bit integers, bit for bit, and what is refused by name."""

from __future__ import annotations

import json

import numpy as np
import packers
import pytest
from safetensors.numpy import save_file

from tinychat.base.errors import CheckpointError, TinychatError, UnsupportedModelError
from tinychat.formats import awq
from tinychat.formats.hf import HFCheckpoint
from tinychat.network.weights import DenseLinear, QuantizedLinear

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
NAME = "model.layers.0."
SHAPES = {
    "self_attn.q_proj": (256, 256),  # square: packed along either side it has the same shape
    "self_attn.k_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.up_proj": (320, 256),
    "mlp.down_proj": (256, 320),
}
CT_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}


def compressed_config(**weights):
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": CT_WEIGHTS | weights}},
        "ignore": ["lm_head"],
    }


CONFIGS = {
    "gemm": {"quant_method": "awq", "version": "gemm", "bits": 4},
    "gemv": {"quant_method": "awq", "version": "gemv", "bits": 4},
    "gemv_fast": {"quant_method": "awq", "version": "gemv_fast", "bits": 4},
    "llm-awq": {"quant_method": "awq", "version": "gemm", "backend": "llm-awq", "bits": 4},
    "gptq": {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4},
    "compressed": compressed_config(),
    "compressed asymmetric": compressed_config(symmetric=False),
}


def config_of(layout, group):
    q = json.loads(json.dumps(CONFIGS[layout]))
    if layout.startswith("compressed"):
        q["config_groups"]["group_0"]["weights"]["group_size"] = group
        return q
    return q | {"group_size": group}


def random_weight(shape, group, seed=0):
    rng = np.random.default_rng(seed)
    n, k = shape
    return (
        rng.integers(0, 16, (n, k), dtype=np.uint8),
        rng.integers(0, 16, (n, k // group), dtype=np.uint8),
        rng.uniform(1e-4, 1e-1, (n, k // group)).astype(np.float16),
    )


def pack(layout, codes, zeros, scales, groups):
    """The tensors of one module, by the format's own packing code."""
    if layout == "gemm":
        return awq.pack(QuantizedLinear(codes, scales, zeros))
    if layout == "gemv":
        return packers.autoawq_gemv(codes, zeros, scales)
    if layout == "gemv_fast":
        return packers.autoawq_gemv_fast(codes, zeros, scales)
    if layout == "llm-awq":
        return packers.autoawq_gemv_fast(codes, zeros, scales, zeros_name="scaled_zeros")
    if layout.startswith("gptq"):
        return packers.gptq(codes, zeros, scales, groups, 2 if layout == "gptq_v2" else 1)
    return packers.compressed_tensors(codes, zeros if "asymmetric" in layout else None, scales)


def folder(path, modules, quantization, **config):
    path.mkdir(exist_ok=True)
    tensors = {f"{NAME}{name}.{part}": a for name, parts in modules.items() for part, a in parts.items()}
    settings = CONFIG | {"quantization_config": quantization} | config
    (path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, path / "model.safetensors")
    return HFCheckpoint(path)


def equal(got, codes, zeros, scales):
    assert isinstance(got, QuantizedLinear)
    np.testing.assert_array_equal(got.codes, codes)
    assert (got.zeros is None) == (zeros is None)
    assert zeros is None or (got.zeros == zeros).all()
    assert got.scales.dtype == scales.dtype
    np.testing.assert_array_equal(got.scales, scales)


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("layout", CONFIGS)
def test_codes_zeros_and_scales_are_read_bit_for_bit(tmp_path, layout, group):
    truth, modules = {}, {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        g = shape[1] if group == -1 else group
        codes, zeros, scales = truth[name] = random_weight(shape, g, i)
        modules[name] = pack(layout, codes, zeros, scales, np.arange(shape[1]) // g)
    c = folder(tmp_path / "m", modules, config_of(layout, group))
    for name, (codes, zeros, scales) in truth.items():
        equal(c.linear(NAME + name), codes, zeros if layout != "compressed" else None, scales)


@pytest.mark.parametrize("label", ["gemm", "gemv", "gemv_fast", "llm-awq"])
@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast", "llm-awq"])
def test_a_mislabelled_awq_folder_is_read_by_its_tensors(tmp_path, layout, label):
    truth = {name: random_weight(shape, 64) for name, shape in SHAPES.items()}
    modules = {name: pack(layout, *w, None) for name, w in truth.items()}
    c = folder(tmp_path / "m", modules, config_of(label, 64))
    for name, w in truth.items():
        equal(c.linear(NAME + name), *w)


def test_gptq_by_hand(tmp_path):
    # One nibble at a time with Python ints, from the layout's description.
    codes, zeros, scales = random_weight((128, 256), 64)
    order = np.random.default_rng(1).permutation(256)
    groups = np.empty(256, np.int64)
    groups[order] = np.arange(256) // 64
    for version, layout in ((1, "gptq"), (2, "gptq_v2")):
        t = pack(layout, codes, zeros, scales, groups)
        w = np.zeros((128, 256), np.float32)
        for k in range(256):
            for n in range(128):
                q = (int(t["qweight"][k // 8, n]) & 0xFFFFFFFF) >> (4 * (k % 8)) & 15
                z = (int(t["qzeros"][groups[k], n // 8]) & 0xFFFFFFFF) >> (4 * (n % 8)) & 15
                z = (z + 1) % 16 if version == 1 else z
                w[n, k] = np.float32(q - z) * np.float32(t["scales"][groups[k], n])
        c = folder(tmp_path / layout, {"self_attn.k_proj": t}, config_of(layout, 64))
        got = c.linear(NAME + "self_attn.k_proj")
        assert got.perm is not None
        np.testing.assert_array_equal(got.dequantize(), w)


def test_symmetric_gptq_has_zero_8(tmp_path):
    t = pack("gptq", *random_weight((128, 256), 64), np.arange(256) // 64)
    t["qzeros"] = np.full_like(t["qzeros"], 0x77777777)
    c = folder(tmp_path / "m", {"self_attn.k_proj": t}, config_of("gptq", 64))
    got = c.linear(NAME + "self_attn.k_proj")
    assert (got.zeros == 8).all()
    assert got.perm is None


@pytest.mark.parametrize("layout", ["gptq", "compressed"])
def test_groups_ordered_by_activation_become_a_permutation(tmp_path, layout):
    codes, zeros, scales = random_weight((128, 256), 64)
    order = np.random.default_rng(2).permutation(256)
    groups = np.empty(256, np.int64)
    groups[order] = np.arange(256) // 64
    if layout == "gptq":
        tensors = packers.gptq(codes, zeros, scales, groups, 1)
    else:
        tensors = packers.compressed_tensors(codes, zeros, scales, groups)
    c = folder(tmp_path / "m", {"self_attn.k_proj": tensors}, config_of(layout, 64))
    got = c.linear(NAME + "self_attn.k_proj")
    expected = (codes.astype(np.float32) - zeros[:, groups]) * scales[:, groups].astype(np.float32)
    np.testing.assert_array_equal(got.dequantize(), expected)
    # a g_idx that says what no g_idx says needs no permutation, and -1 says that there is none
    for idle in (np.arange(256) // 64, np.full(256, -1)):
        tensors[next(n for n in tensors if "g_idx" in n)] = idle.astype(np.int32)
        c = folder(tmp_path / "m", {"self_attn.k_proj": tensors}, config_of(layout, 64))
        assert c.linear(NAME + "self_attn.k_proj").perm is None


def test_groups_of_several_sizes_are_refused(tmp_path):
    groups = np.sort(np.random.default_rng(0).integers(0, 4, 256))
    t = packers.gptq(*random_weight((128, 256), 64), groups, 1)
    c = folder(tmp_path / "m", {"self_attn.k_proj": t}, config_of("gptq", 64))
    with pytest.raises(CheckpointError, match="g_idx"):
        c.linear(NAME + "self_attn.k_proj")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_compressed_tensors_packs_what_is_read(tmp_path, symmetric, strategy):
    torch = pytest.importorskip("torch")
    packed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from safetensors.torch import save_file as save_torch

    group = 64 if strategy == "group" else 256
    weights = dict(CT_WEIGHTS, symmetric=symmetric, strategy=strategy)
    weights["group_size"] = 64 if strategy == "group" else None
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**weights)
    )
    codes, zeros, scales = random_weight((130, 256), group)  # 130: outputs that are no whole words
    zeros = np.full_like(zeros, 8) if symmetric else zeros
    scales = torch.from_numpy(scales).bfloat16().float().numpy()
    w = (codes.reshape(130, -1, group).astype(np.float32) - zeros[..., None]) * scales[..., None]
    state = {
        "weight": torch.from_numpy(w.reshape(130, 256)),
        "weight_scale": torch.from_numpy(scales),
        "weight_zero_point": torch.from_numpy(zeros.astype(np.int8) - 8),
    }
    tensors = packed.PackedQuantizationCompressor.compress(state, scheme)
    config = compressed_config(**weights)
    (tmp_path / "config.json").write_text(
        json.dumps(CONFIG | {"quantization_config": config, "intermediate_size": 130})
    )
    tensors["weight_scale"] = tensors["weight_scale"].bfloat16()
    save_torch({f"{NAME}mlp.up_proj.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    equal(HFCheckpoint(tmp_path).linear(NAME + "mlp.up_proj"), codes, None if symmetric else zeros, scales)


@pytest.mark.parametrize("v2", [False, True])
def test_an_llm_awq_pt_is_read_as_plain_tensors(tmp_path, v2):
    torch = pytest.importorskip("torch")
    truth = {name: random_weight(shape, 64) for name, shape in SHAPES.items()}
    state = {"model.norm.weight": torch.full((256,), 1.5, dtype=torch.bfloat16)}
    for name, w in truth.items():
        for part, a in pack("llm-awq" if v2 else "gemv", *w, None).items():
            state[f"{NAME}{name}.{part}"] = torch.from_numpy(a)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(state, tmp_path / f"tiny-w4-g64-awq{'-v2' if v2 else ''}.pt")
    c = HFCheckpoint(tmp_path)
    for name, w in truth.items():
        equal(c.linear(NAME + name), *w)
    np.testing.assert_array_equal(c.vector("model.norm"), np.full(256, 1.5, np.float32))
    assert c.fingerprint() == HFCheckpoint(tmp_path).fingerprint()


class Runs:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("what", ["code", "module", "cut", "text", "huge", "list"])
def test_a_pt_that_is_not_plain_tensors_is_refused(tmp_path, what, capsys):
    torch = pytest.importorskip("torch")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "tiny-w4-g64-awq.pt"
    content = {
        "code": {"model.norm.weight": Runs()},
        "module": {"model.norm.weight": torch.nn.Linear(2, 2)},
        "huge": {"model.norm.weight": torch.zeros(1).expand(1 << 40)},
        "list": {"model.norm.weight": [1.0]},
    }
    torch.save(content.get(what, {"model.norm.weight": torch.zeros(256)}), file)
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-300])
    if what == "text":
        file.write_text("no pickle at all")
    with pytest.raises(TinychatError) as e:
        HFCheckpoint(tmp_path)
    assert len(str(e.value).splitlines()) == 2
    assert "this ran" not in capsys.readouterr().out


def test_modules_left_in_16_bits_stay_so_in_every_format(tmp_path):
    for layout in CONFIGS:
        w = random_weight((128, 256), 64)
        dense = np.ones((128, 256), np.float16)
        parts = pack(layout, *w, np.arange(256) // 64)
        modules = {"self_attn.k_proj": parts, "self_attn.v_proj": {"weight": dense}}
        c = folder(tmp_path / "m", modules, config_of(layout, 64))
        assert isinstance(c.linear(NAME + "self_attn.k_proj"), QuantizedLinear)
        assert isinstance(c.linear(NAME + "self_attn.v_proj"), DenseLinear)


def scheme_config(layout, **weights):
    return compressed_config(**weights) | {"format": layout}


REFUSED = {
    "marlin": config_of("gemm", 64) | {"version": "marlin"},
    "AWQ with 8 bits": config_of("gemm", 64) | {"bits": 8},
    "GPTQ with 7 bits": config_of("gptq", 64) | {"bits": 7},
    "GPTQ with 9 bits": config_of("gptq", 64) | {"dynamic": {"+:.*down.*": {"bits": 9}}},
    "gptq_p": config_of("gptq", 64) | {"checkpoint_format": "gptq_p"},
    "quanto": {"quant_method": "quanto"},
    "e5m2": {"quant_method": "fp8", "fmt": "e5m2"},
    "expert_dtype 'fp4'": {"quant_method": "fp8", "expert_dtype": "fp4"},
    "bitsandbytes with the type 'fp4'": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "W4A8_AWQ": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
    "auto_round:llm_compressor": {
        "quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:llm_compressor",
    },
    "mx_fp": {"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"},
    "AutoRound's packing for AWQ": {
        "quant_method": "auto-round", "bits": 3, "packing_format": "auto_round:auto_awq",
    },
    "sparsity_config": compressed_config() | {"sparsity_config": {"format": "sparse-24-bitmask"}},
    "transform_config": compressed_config() | {"transform_config": {"config_groups": {"a": {}}}},
    "marlin-24": compressed_config() | {"format": "marlin-24"},
    "7 bits": compressed_config(num_bits=7),
    "int-quantized with 4 bits": scheme_config("int-quantized", num_bits=4),
    "tensor": compressed_config(strategy="tensor"),
    "attn_head": scheme_config("int-quantized", strategy="attn_head", num_bits=8),
    "float": compressed_config(type="float"),
}  # fmt: skip


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, word):
    with pytest.raises(UnsupportedModelError, match=word) as e:
        folder(tmp_path / "m", {"self_attn.k_proj": {"weight": np.ones(1, np.float16)}}, REFUSED[word])
    assert "pack-quantized" in e.value.todo


@pytest.mark.parametrize("change", ["cut scales", "no zeros", "other shape", "fractions", "no shape"])
def test_tensors_that_contradict_each_other_are_refused(tmp_path, change):
    layout = {"fractions": "gemv_fast", "no shape": "compressed", "other shape": "compressed"}.get(
        change, "gptq"
    )
    t = dict(pack(layout, *random_weight((128, 256), 64), np.arange(256) // 64))
    if change == "cut scales":
        t["scales"] = np.ascontiguousarray(t["scales"][:2])
    elif change == "no zeros":
        del t["qzeros"]
    elif change == "other shape":
        t["weight_shape"] = np.array([256, 128], np.int64)
    elif change == "fractions":
        t["qzeros"] = t["qzeros"] * np.float16(0.7)
    else:
        del t["weight_shape"]
    with pytest.raises(CheckpointError) as e:
        folder(tmp_path / "m", {"self_attn.k_proj": t}, config_of(layout, 64)).linear(
            NAME + "self_attn.k_proj"
        )
    assert len(str(e.value).splitlines()) == 2
