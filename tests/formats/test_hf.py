"""Hugging Face folders: what is read, bit for bit, and what is refused, in two lines."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tinychat.base.errors import CheckpointError, ModelNotFoundError, TinychatError, UnsupportedModelError
from tinychat.formats import awq, open_checkpoint
from tinychat.formats.hf import HFCheckpoint, read_config
from tinychat.models.llama import linears
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import DenseLinear, QuantizedLinear, bf16_to_f32, quantize_rtn

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
Q0 = "model.layers.0.self_attn.q_proj"


def float_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (40, 64), "model.norm": (64,)}
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{n}_layernorm": (64,) for n in ("input", "post_attention")}
        for name, (n, k) in _linears(layer).items():
            shapes[name] = (n, k)
    return {name + ".weight": rng.normal(0, 0.02, s).astype(np.float16) for name, s in shapes.items()}


def _linears(layer: int) -> dict[str, tuple[int, int]]:

    return linears(read_config(CONFIG), layer)


def write(folder: Path, tensors: dict[str, np.ndarray], **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def awq_tensors(tensors: dict[str, np.ndarray], group: int = 32) -> tuple[dict, dict[str, QuantizedLinear]]:
    out, truth = dict(tensors), {}
    for layer in range(2):
        for name in _linears(layer):
            truth[name] = quantize_rtn(out.pop(name + ".weight").astype(np.float32), group)
            out |= {f"{name}.{part}": a for part, a in awq.pack(truth[name]).items()}
    return out, truth


def refused(folder: Path, error: type[TinychatError], *words: str, read: str | None = None) -> None:
    """Opening (or reading module `read`) raises `error` as two lines that name `words`."""
    if read:
        c = HFCheckpoint(folder)
    with pytest.raises(error) as e:
        _ = c.linear(read) if read else HFCheckpoint(folder)
    assert len(str(e.value).splitlines()) == 2
    for word in words:
        assert word in str(e.value)


def test_dense_weights_are_views_of_the_mapped_file(tmp_path):
    tensors = float_tensors()
    c = HFCheckpoint(write(tmp_path / "m", tensors))
    w = c.linear(Q0)
    assert isinstance(w, DenseLinear)
    assert not w.bf16
    assert not w.weight.flags.owndata
    assert not w.weight.flags.writeable
    for name, a in tensors.items():
        got = c.vector(name[:-7]) if "norm" in name else c.linear(name[:-7]).weight
        assert np.array_equal(got, a), name
    assert c.has("model.embed_tokens")
    assert not c.has("lm_head")
    assert c.config.tie_embeddings


def test_bfloat16_is_read_as_its_bits(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    truth = {k: torch.from_numpy(v).bfloat16() for k, v in float_tensors().items()}
    folder = write(tmp_path / "m", {})
    save_torch(truth, folder / "model.safetensors")
    c = HFCheckpoint(folder)
    w = c.linear(Q0)
    assert w.bf16
    assert np.array_equal(w.dequantize(), truth[Q0 + ".weight"].float().numpy())
    assert np.array_equal(c.vector("model.norm"), truth["model.norm.weight"].float().numpy())
    assert np.array_equal(bf16_to_f32(w.weight), w.dequantize())


def test_awq_modules_are_bit_exact_and_the_rest_stays_dense(tmp_path):
    tensors, truth = awq_tensors(float_tensors())
    c = HFCheckpoint(write(tmp_path / "m", tensors, quantization_config=AWQ))
    for name, w in truth.items():
        got = c.linear(name)
        assert np.array_equal(got.codes, w.codes)
        assert np.array_equal(got.zeros, w.zeros)
        assert np.array_equal(got.scales.view(np.uint16), w.scales.view(np.uint16))
    assert isinstance(c.linear("model.embed_tokens"), DenseLinear)


def test_each_module_is_decided_by_its_own_tensors(tmp_path):
    floats = float_tensors()
    tensors, _ = awq_tensors(floats)
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"{Q0}.{part}"]
    tensors[Q0 + ".weight"] = floats[Q0 + ".weight"]
    config = AWQ | {"modules_to_not_convert": ["does_not_matter"]}
    c = HFCheckpoint(write(tmp_path / "m", tensors, quantization_config=config))
    assert isinstance(c.linear(Q0), DenseLinear)
    assert isinstance(c.linear(Q0.replace("q_proj", "k_proj")), QuantizedLinear)


def test_group_size_minus_one_is_the_whole_row(tmp_path):
    floats = float_tensors()
    tensors, _ = awq_tensors(floats)
    for layer in range(2):
        for name in _linears(layer):
            w = quantize_rtn(floats[name + ".weight"].astype(np.float32), floats[name + ".weight"].shape[1])
            tensors |= {f"{name}.{part}": a for part, a in awq.pack(w).items()}
    c = HFCheckpoint(write(tmp_path / "m", tensors, quantization_config=AWQ | {"group_size": -1}))
    assert c.linear("model.layers.1.mlp.down_proj").group == 96


def test_shards_are_read_through_the_index(tmp_path):
    tensors = float_tensors()
    folder = write(tmp_path / "m", {})
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:9], names[9:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    c = HFCheckpoint(folder)
    for name, a in tensors.items():
        got = c.vector(name[:-7]) if "norm" in name else c.linear(name[:-7]).weight
        assert np.array_equal(got, a)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, CheckpointError, "model-00002-of-00002.safetensors", "missing")
    save_file({"other": tensors["model.norm.weight"]}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor model\.norm\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", 7]
)
def test_an_index_that_points_outside_the_folder_is_refused(tmp_path, file):
    save_file({"model.norm.weight": np.ones(64, np.float32)}, tmp_path / "secret.safetensors")
    folder = write(tmp_path / "m", {})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, CheckpointError, "plain file name")


def test_an_untied_head_is_found(tmp_path):
    tensors = float_tensors() | {"lm_head.weight": np.ones((40, 64), np.float16)}
    c = HFCheckpoint(write(tmp_path / "m", tensors, tie_word_embeddings=False))
    assert c.has("lm_head")
    assert c.linear("lm_head").shape == (40, 64)
    assert not c.config.tie_embeddings


def test_biases_are_read_where_the_config_has_them(tmp_path):
    tensors = float_tensors()
    for layer in range(2):
        for name, (n, _) in _linears(layer).items():
            if "self_attn" in name:
                tensors[name + ".bias"] = np.arange(n, dtype=np.float16)
    c = HFCheckpoint(write(tmp_path / "m", tensors, attention_bias=True))
    assert np.array_equal(c.linear(Q0).bias, np.arange(64, dtype=np.float32))
    assert c.linear("model.layers.0.mlp.up_proj").bias is None
    del tensors[Q0 + ".bias"]
    refused(write(tmp_path / "m", tensors, attention_bias=True), CheckpointError, Q0 + ".bias", read=Q0)


def test_fingerprint_changes_with_the_content(tmp_path):
    folder = write(tmp_path / "m", float_tensors())
    first = HFCheckpoint(folder).fingerprint()
    assert HFCheckpoint(write(tmp_path / "copy", float_tensors())).fingerprint() == first
    changed = float_tensors()
    changed["model.norm.weight"][0] += 1
    assert HFCheckpoint(write(tmp_path / "m", changed)).fingerprint() != first
    assert HFCheckpoint(write(tmp_path / "m", float_tensors(), rope_theta=5e5)).fingerprint() != first


def test_a_missing_folder_or_config_is_a_model_that_is_not_there(tmp_path):
    refused(tmp_path, ModelNotFoundError, "config.json")


def test_wrong_shapes_and_missing_tensors_are_refused(tmp_path):
    tensors = float_tensors()
    tensors[Q0 + ".weight"] = np.zeros((64, 32), np.float16)
    refused(write(tmp_path / "m", tensors), CheckpointError, Q0, "[64, 32]", "[64, 64]", read=Q0)
    del tensors[Q0 + ".weight"]
    refused(write(tmp_path / "m", tensors), CheckpointError, Q0, read=Q0)
    packed, _ = awq_tensors(float_tensors())
    packed[Q0 + ".scales"] = packed[Q0 + ".scales"][:1]
    folder = write(tmp_path / "m", packed, quantization_config=AWQ)
    refused(folder, CheckpointError, Q0 + ".scales", read=Q0)
    del packed[Q0 + ".scales"]
    refused(write(tmp_path / "m", packed, quantization_config=AWQ), CheckpointError, Q0 + ".scales", read=Q0)
    refused(
        write(tmp_path / "m", awq_tensors(float_tensors())[0], quantization_config=AWQ | {"group_size": 48}),
        UnsupportedModelError,
        "48",
        read=Q0,
    )


def test_quantized_tensors_without_a_description_are_refused(tmp_path):
    folder = write(tmp_path / "m", awq_tensors(float_tensors())[0])
    refused(folder, UnsupportedModelError, "quantization_config", read=Q0)


def test_an_old_quant_config_file_is_understood(tmp_path):
    tensors, truth = awq_tensors(float_tensors())
    folder = write(tmp_path / "m", tensors)
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(old))
    assert np.array_equal(HFCheckpoint(folder).linear(Q0).codes, truth[Q0].codes)


@pytest.mark.parametrize("group", [0, -2, "32", True, 1 << 40])
def test_a_group_size_that_makes_no_sense_is_refused(tmp_path, group):
    refused(
        write(tmp_path / "m", {}, quantization_config=AWQ | {"group_size": group}), CheckpointError, "group"
    )


def test_damaged_safetensors_are_refused(tmp_path):
    folder = write(tmp_path / "m", float_tensors())
    file = folder / "model.safetensors"
    good = file.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    huge = json.loads(json.dumps(header))
    huge["model.norm.weight"]["shape"] = [1 << 60, 1 << 60]
    overlap = json.loads(json.dumps(header))
    overlap["model.norm.weight"]["data_offsets"] = [0, 128]

    def with_header(h: dict) -> bytes:
        raw = json.dumps(h).encode()
        return struct.pack("<Q", len(raw)) + raw + good[8 + length :]

    damaged = {
        "cut short": good[: len(good) // 2],
        "cut in the header": good[:40],
        "empty": b"",
        "wrong magic": b"PK\x03\x04" + good[4:],
        "header length absurd": struct.pack("<Q", 1 << 62) + good[8:],
        "trailing bytes": good + b"\0" * 64,
        "shape absurd": with_header(huge),
        "offsets overlap": with_header(overlap),
        "not JSON": good[:8] + b"x" * length + good[8 + length :],
    }
    for what, content in damaged.items():
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as e:
            HFCheckpoint(folder)
        assert len(str(e.value).splitlines()) == 2, what


@pytest.mark.parametrize("content", ["", "[]", "{", "nul", '{"a": ' * 2000, '"\ud800"'])
def test_damaged_config_json_is_refused(tmp_path, content):
    folder = write(tmp_path / "m", float_tensors())
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(folder, CheckpointError, "config.json")


def test_pickles_are_refused_and_never_read(tmp_path):
    folder = write(tmp_path / "m", {})
    (folder / "model.safetensors").unlink()
    refused(folder, CheckpointError, "safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(folder, UnsupportedModelError, "pickle")


def test_nan_in_a_norm_is_refused(tmp_path):
    tensors = float_tensors()
    tensors["model.norm.weight"][3] = np.nan
    with pytest.raises(CheckpointError, match=r"model\.norm"):
        HFCheckpoint(write(tmp_path / "m", tensors)).vector("model.norm")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_scale_that_is_not_a_number_is_refused_by_name(tmp_path, bad):
    tensors, _ = awq_tensors(float_tensors())
    scales = tensors[Q0 + ".scales"].copy()
    scales[1, 7] = bad
    folder = write(tmp_path / "m", tensors | {Q0 + ".scales": scales}, quantization_config=AWQ)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj") as e:
        WeightPolicy().linear(HFCheckpoint(folder), Q0)
    assert len(str(e.value).splitlines()) == 2
    dense = float_tensors()
    dense[Q0 + ".weight"][3, 5] = bad
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj"):
        WeightPolicy().linear(HFCheckpoint(write(tmp_path / "d", dense)), Q0)


def test_an_unknown_dtype_is_refused_by_name(tmp_path):
    tensors = float_tensors()
    tensors[Q0 + ".weight"] = np.zeros((64, 64), np.int8)
    refused(write(tmp_path / "m", tensors), UnsupportedModelError, "I8", read=Q0)


def test_a_config_with_a_word_for_a_number_is_refused(tmp_path):
    folder = write(tmp_path / "m", float_tensors())
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": "two"}))
    refused(folder, CheckpointError, "n_layers", "two")
