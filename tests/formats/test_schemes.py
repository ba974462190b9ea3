"""Every scheme of quantized folders, against the weights that its own library reads from the same tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import raw_safetensors
from schemes import NAME, config, folder, module, names, settings

from tinychat.base.errors import CheckpointError, TinychatError, UnsupportedModelError
from tinychat.formats.hf import HFCheckpoint
from tinychat.network.weight_form import TABLES
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import QuantizedLinear

# Cases in which the library's own order of float32 operations differs from `value · scale + offset`.
ROUNDED = ("nvfp4-pack-quantized", "llm.int8", "mlx")


@pytest.mark.parametrize("case", names())
def test_a_module_is_what_its_own_library_reads(case, tmp_path):
    checkpoint = folder(tmp_path, case)
    w, expected = checkpoint.linear(NAME), module(case)[2]
    assert isinstance(w, QuantizedLinear)
    if case.startswith(ROUNDED):
        np.testing.assert_allclose(w.dequantize(), expected, rtol=3e-7, atol=1e-7 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(w.dequantize(), expected)
    assert checkpoint.stored(NAME)[0] == w.form  # what is said before anything is read


# Damage, and settings that do not belong to the tensors


def refusal(path, case, read=True, **changes):
    """The error of reading a changed module: two lines, by its name."""

    def run():
        checkpoint = folder(path, case, **changes)
        return checkpoint.linear(NAME) if read else checkpoint

    with pytest.raises(TinychatError) as e:
        run()
    assert len(str(e.value).splitlines()) == 2
    assert NAME in e.value.what
    return e.value


OPTIONAL = (
    "g_idx",
    "input_scale",
    "activation_scale",
    "input_scale_ub",
    "input_global_scale",
    "weight_format",
)
# one of each scheme and shape of scales
DAMAGED = (
    "gptq 3", "auto_round:exllamav2 4", "auto_round:auto_awq 4", "awq 8", "pack-quantized 3 zeros group",
    "pack-quantized 8 symmetric channel", "int-quantized group zeros", "int-quantized channel zeros",
    "float-quantized tensor", "float-quantized channel", "float-quantized group", "float-quantized block",
    "mxfp4-pack-quantized", "nvfp4-pack-quantized", "mxfp8-quantized", "fp8 bfloat16", "fp8 tensor",
    "mxfp8 e8m0", "fbgemm_fp8", "modelopt FP8", "modelopt NVFP4", "mxfp4 blocks", "nf4 nested", "nf4 plain",
    "llm.int8", "mlx 3 bfloat16", "mlx mxfp4", "mlx nvfp4", "mlx mxfp8",
)  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_each_tensor_must_be_there_in_its_shape_and_dtype(case, tmp_path):
    parts, dtypes, _ = module(case)
    for part in parts.keys() - {*OPTIONAL}:
        a = parts[part]
        refusal(tmp_path, case, **{part: None})
        refusal(tmp_path, case, **{part: (np.zeros(a.shape, np.float64), "F64")})
        refusal(tmp_path, case, **{part: (np.zeros((3, *a.shape), a.dtype), dtypes[part])})
        if a.size > 2:
            refusal(tmp_path, case, **{part: (a.reshape(-1)[: a.size // 2], dtypes[part])})


def test_a_part_that_nobody_understands_is_refused_when_a_folder_is_opened(tmp_path):
    for case, part in (
        ("modelopt NVFP4", "pre_quant_scale"),
        ("fp8 tensor", "weight_perm"),
        ("gptq 4", "hadamard"),
    ):
        error = refusal(tmp_path, case, read=False, **{part: np.ones(4, np.float32)})
        assert part in error.what
        assert isinstance(error, UnsupportedModelError)


def test_scales_of_activations_and_of_a_cache_change_nothing(tmp_path):
    extra = {
        part: np.ones(1, np.float32)
        for part in ("input_scale", "input_zero_point", "k_scale", "output_scale")
    }
    w = folder(tmp_path, "fp8 tensor", **extra).linear(NAME)
    np.testing.assert_array_equal(w.dequantize(), module("fp8 tensor")[2])


@pytest.mark.parametrize("case", ["fp8 float32", "float-quantized channel", "mlx mxfp8", "mxfp8 e8m0"])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_no_number_are_refused(case, code, tmp_path):
    parts, dtypes, _ = module(case)
    codes = parts["weight"].copy()
    codes.view(np.uint8)[3, 5] = code
    assert "no number" in refusal(tmp_path, case, weight=(codes, dtypes["weight"])).what


def test_nf4_with_another_state_is_refused(tmp_path):
    parts, *_ = module("nf4 nested")
    part = "weight.quant_state.bitsandbytes__nf4"
    said = parts[part].tobytes().decode()
    for old, new in (
        ('"nf4"', '"fp4"'), ("[32, 64]", "[64, 32]"), ('"blocksize": 64', '"blocksize": 0'), ("{", "["),
        ('"nested_blocksize": 256', '"nested_blocksize": 8.5'), ('"nested_offset": ', '"nested_offset": "x'),
    ):  # fmt: skip
        text = said.replace(old, new)
        assert text != said
        refusal(tmp_path, "nf4 nested", **{part: np.frombuffer(text.encode(), np.uint8)})
    table = parts["weight.quant_map"].copy()
    table[3] += 1e-7
    assert "table" in refusal(tmp_path, "nf4 nested", **{"weight.quant_map": table}).what


def test_a_global_scale_that_divides_by_zero_is_refused(tmp_path):
    zero = np.zeros(1, np.float32)
    assert "global scale" in refusal(tmp_path, "nvfp4-pack-quantized", weight_global_scale=zero).what


def test_float_weights_with_scales_beside_them_are_refused(tmp_path):
    weight = (np.ones((32, 64), np.float16), "F16")
    error = refusal(tmp_path, "float-quantized channel", weight=weight)
    assert "weight_scale" in error.what


def test_llm_int8_in_another_order_is_refused(tmp_path):
    assert "rows" in refusal(tmp_path, "llm.int8", weight_format=np.array(3, np.uint8)).what


# Settings


def same(checkpoint, case):
    np.testing.assert_array_equal(checkpoint.linear(NAME).dequantize(), module(case)[2])


def test_a_folder_may_hold_several_schemes_and_each_module_shows_its_own(tmp_path):
    cases = ["pack-quantized 4 zeros group", "pack-quantized 8 symmetric channel", "float-quantized channel"]
    said = settings(cases[0])["quantization_config"]
    said["config_groups"], said["format"] = {}, "mixed-precision"
    for i, case in enumerate(cases):
        own = settings(case)["quantization_config"]
        group = own["config_groups"]["group_0"] | {"format": own["format"], "targets": [f"re:.*layers.{i}$"]}
        said["config_groups"][f"group_{i}"] = group
    for case in cases:
        same(folder(tmp_path, case, {"quantization_config": said}), case)


def test_rules_for_some_modules_are_followed_by_what_the_tensors_show(tmp_path):
    rules = {"+:.*up.*": {"bits": 8, "group_size": 32}, "-:.*down.*": {}, "+:.*gate.*": {"sym": True}}
    said = settings("gptq 4")["quantization_config"] | {"dynamic": rules}
    for case in ("gptq 4", "gptq 8"):
        same(folder(tmp_path, case, {"quantization_config": said}), case)
    said = settings("auto_round:auto_gptq 4")["quantization_config"]
    said["extra_config"] = {"model.layers.0.mlp.up_proj": {"bits": 3}, "lm_head": {"bits": 16}}
    for case in ("auto_round:auto_gptq 4", "auto_round:auto_gptq 3"):
        same(folder(tmp_path, case, {"quantization_config": said}), case)
    error = refusal(tmp_path, "auto_round:auto_gptq 6", said={"quantization_config": said})
    assert isinstance(error, CheckpointError)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("auto_round:auto_gptq 4", {"packing_format": None}),
        ("auto_round:auto_gptq 4", {"packing_format": "auto_round:gptq", "quant_method": "intel/auto-round"}),
        ("auto_round:exllamav2 4", {"packing_format": None, "backend": "autoround:exllamav2"}),
        ("auto_round:exllamav2 4", {"packing_format": "auto_round"}),
        ("auto_round:auto_awq 4", {"packing_format": "auto_round:awq:gemm"}),
        ("gptq 3", {"format": "gptq", "checkpoint_format": None}),
        ("float-quantized tensor", {"quantization_status": "frozen", "sparsity_config": {"format": "dense"}}),
        ("modelopt NVFP4", {"quant_algo": "MIXED_PRECISION", "ignore": ["lm_head"]}),
    ],
)
def test_other_words_for_the_same_are_understood(case, changes, tmp_path):
    said = settings(case)["quantization_config"] | changes
    same(
        folder(tmp_path, case, {"quantization_config": {k: v for k, v in said.items() if v is not None}}),
        case,
    )


def test_modelopts_own_file_is_read(tmp_path):
    tmp_path.joinpath("hf_quant_config.json").write_text(
        '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}'
    )
    same(folder(tmp_path, "modelopt NVFP4", {}), "modelopt NVFP4")
    tmp_path.joinpath("hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}')
    with pytest.raises(CheckpointError, match="hf_quant_config"):
        folder(tmp_path, "modelopt NVFP4", {})


def test_blocks_may_be_cut_at_both_ends(tmp_path):
    weight = np.arange(20 * 24, dtype=np.uint8).reshape(20, 24) % 120
    scales = np.random.default_rng(0).random((3, 2)).astype(np.float32)
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 16]}}
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale_inv": scales}
    (tmp_path / "config.json").write_text(json.dumps(config(20, 24, **said)))
    raw_safetensors.write(tmp_path / "model.safetensors", tensors, {f"{NAME}.weight": "F8_E4M3"})
    w = HFCheckpoint(tmp_path).linear(NAME)
    for i, j in np.ndindex(20, 24):
        assert w.dequantize()[i, j] == TABLES["e4m3"][weight[i, j]] * scales[i // 8, j // 16]


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("mlx 4 bfloat16", "scales"),
        ("mlx 4 bfloat16", "biases"),
        ("fp8 float32", "weight_scale_inv"),
        ("modelopt NVFP4", "weight_scale_2"),
        ("nf4 plain", "weight.absmax"),
        ("llm.int8", "SCB"),
        ("mxfp8 uint8", "weight_scale_inv"),
        ("mxfp4-pack-quantized", "weight_scale"),
    ],
)
def test_scales_that_make_weights_infinite_are_refused_before_anything_runs(case, part, tmp_path):
    parts, dtypes, _ = module(case)
    a = parts[part].copy()
    huge = {"F32": np.float32(3e38), "BF16": 0x7F7F, "U8": 254}[dtypes[part]]
    a[(0,) * a.ndim] = huge
    checkpoint = folder(tmp_path, case, **{part: (a, dtypes[part])})
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj"):
        WeightPolicy("none", 16).linear(checkpoint, NAME)
