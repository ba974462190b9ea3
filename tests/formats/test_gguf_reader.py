"""GGUF weights against the `gguf` package's own dequantization; damaged files refused in two lines."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from families import random_model
from family_gguf import write as write_family
from ggml_blocks import HALVES, Kind
from tiny_gguf import weights, write

from tinychat.base.errors import CheckpointError, TinychatError, UnsupportedModelError
from tinychat.formats.gguf import GGUFCheckpoint
from tinychat.network.weight_policy import WeightPolicy

READ_AS = {
    Kind.F32: "fp32",
    Kind.F16: "fp16",
    Kind.BF16: "bf16",
    Kind.Q4_0: "4-bit, groups of 32, fp16 scale",
    Kind.Q4_1: "4-bit, groups of 32, fp16 scale and offset",
    Kind.Q5_0: "5-bit, groups of 32, fp16 scale",
    Kind.Q5_1: "5-bit, groups of 32, fp16 scale and offset",
    Kind.MXFP4: "4-bit e2m1, groups of 32, e8m0 scale",
    Kind.Q8_0: "8-bit, groups of 32, fp16 scale",
}


@pytest.mark.parametrize("kind", READ_AS, ids=lambda k: k.name)
def test_weights_are_exactly_what_the_gguf_package_dequantizes(tmp_path, kind):
    truth = write(tmp_path / "m.gguf", kind)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    for name, expected in truth.items():
        w = checkpoint.linear(name)
        assert str(w.form) == READ_AS[kind]
        np.testing.assert_array_equal(w.dequantize(), expected, err_msg=name)


def test_the_model_computes_what_its_float_weights_compute(tmp_path):
    """Rows of q and k are put back in order: otherwise rotary embedding would rotate the wrong pairs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import tinychat

    write(tmp_path / "m.gguf")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    hf = LlamaForCausalLM(config).eval()
    state = {f"{k}.weight": torch.from_numpy(v) for k, v in weights().items()}
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{i}.{norm}.weight"] = torch.linspace(0.5, 1.5, 64)
    state["model.norm.weight"] = torch.ones(64)
    hf.load_state_dict(state, strict=False)
    ids = list(range(0, 250, 5))
    with torch.no_grad():
        theirs = hf(torch.tensor([ids])).logits[0].numpy()
    with tinychat.load(tmp_path / "m.gguf", device="reference", quantize="none", head_bits=16) as m:
        ours = m.logits(ids)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    cuts = [0, 3, 7, 15, 23, 24, 100, 1000, 5000, len(content) // 2, len(content) - 40]
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(content[:cut])
        with pytest.raises(CheckpointError) as e:
            GGUFCheckpoint(tmp_path / "cut.gguf")
        assert e.value.what
        assert e.value.todo
        assert "\n" not in e.value.what + e.value.todo


def test_random_damage_to_the_header_never_escapes_as_another_error(tmp_path):
    write(tmp_path / "m.gguf")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for at in rng.integers(0, 9000, rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        (tmp_path / "d.gguf").write_bytes(damaged)
        try:
            checkpoint = GGUFCheckpoint(tmp_path / "d.gguf")
            checkpoint.tokenizer()
            checkpoint.linear("model.layers.0.self_attn.q_proj")
        except TinychatError:
            pass


@pytest.mark.parametrize(
    ("at", "value", "format"),
    [
        (0, 0x12345678, "<I"),  # magic
        (4, 99, "<I"),  # version
        (8, 1 << 60, "<Q"),  # tensor count
        (16, 1 << 60, "<Q"),  # metadata count
        (24, 1 << 62, "<Q"),  # length of the first key
    ],
)
def test_absurd_headers_are_refused_at_once(tmp_path, at, value, format):
    write(tmp_path / "m.gguf")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    struct.pack_into(format, content, at, value)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_other_architectures_and_rope_scalings_are_refused_by_name(tmp_path):
    write(tmp_path / "a.gguf", arch="mamba")
    with pytest.raises(UnsupportedModelError, match="mamba"):
        GGUFCheckpoint(tmp_path / "a.gguf")
    write(tmp_path / "r.gguf", change=lambda w: w.add_string("llama.rope.scaling.type", "longrope"))
    with pytest.raises(UnsupportedModelError, match="longrope"):
        GGUFCheckpoint(tmp_path / "r.gguf")


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path):
    write(tmp_path / "s.gguf", shapes={"blk.1.ffn_up.weight": (32, 64)})
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up|layers\.1\.mlp\.up_proj"):
        GGUFCheckpoint(tmp_path / "s.gguf").linear("model.layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("kind", "at", "bits"),
    [
        (Kind.Q4_0, 0, (0x7E00, "<H")),  # the scale, NaN in fp16
        (Kind.Q4_1, 2, (0x7C00, "<H")),  # the offset, infinite
        (Kind.Q8_0, 0, (0xFE00, "<H")),
        (Kind.F16, 6, (0x7E00, "<H")),
        (Kind.BF16, 6, (0x7FC0, "<H")),
        (Kind.F32, 8, (0xFF800000, "<I")),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_weights_and_scales_that_are_not_numbers_are_refused(tmp_path, kind, at, bits):
    write(tmp_path / "n.gguf", kind)
    content = bytearray((tmp_path / "n.gguf").read_bytes())
    name = "model.layers.0.mlp.down_proj"
    tensor = next(t for t in _tensors(tmp_path / "n.gguf") if t[0] == "blk.0.ffn_down.weight")
    struct.pack_into(bits[1], content, tensor[1] + at, bits[0])
    (tmp_path / "n.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="NaN"):
        WeightPolicy().linear(GGUFCheckpoint(tmp_path / "n.gguf"), name)


@pytest.mark.parametrize("kind", [k for k in HALVES if k != Kind.Q8_0], ids=lambda k: k.name)
def test_a_scale_that_is_no_number_is_refused_by_the_name_of_its_module(kind, tmp_path):
    hf = random_model("LlamaForCausalLM", hidden_size=256, num_hidden_layers=1)
    write_family(
        tmp_path / "m.gguf", hf, "llama", lambda name: kind if name == "blk.0.attn_v.weight" else None
    )
    name = "model.layers.0.self_attn.v_proj"
    WeightPolicy().linear(GGUFCheckpoint(tmp_path / "m.gguf"), name)
    start = dict(_tensors(tmp_path / "m.gguf"))["blk.0.attn_v.weight"]
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    at = HALVES[kind][-1] + 1 if HALVES[kind] else 0
    content[start + at] = 0x7F  # of NVFP4 no number at all, of MXFP4 one
    if kind == Kind.MXFP4:
        content[start] = 0xFF
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} hold NaN") as e:
        WeightPolicy().linear(GGUFCheckpoint(tmp_path / "m.gguf"), name)
    assert len(str(e.value).splitlines()) == 2


def test_weights_too_large_for_int8_are_refused_by_name(tmp_path):
    write(tmp_path / "m.gguf")
    start = dict(_tensors(tmp_path / "m.gguf"))["blk.1.ffn_down.weight"]
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[start + 400 : start + 404] = np.float32(1e9).tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj.*too large") as e:
        WeightPolicy().linear(GGUFCheckpoint(tmp_path / "m.gguf"), "model.layers.1.mlp.down_proj")
    assert len(str(e.value).splitlines()) == 2
    policy = WeightPolicy("none")
    assert policy.linear(GGUFCheckpoint(tmp_path / "m.gguf"), "model.layers.1.mlp.down_proj") is not None


def _tensors(path):
    from gguf import GGUFReader

    return [(t.name, t.data_offset) for t in GGUFReader(path).tensors]
