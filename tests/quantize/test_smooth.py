"""SmoothQuant: the function stays, loud channels no longer drown quiet ones, the folder is the format's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from llama_logits import logits
from safetensors.numpy import load_file
from tiny import TinyCheckpoint

import tinychat
from tinychat.base.errors import UsageError
from tinychat.formats.hf import HFCheckpoint
from tinychat.network.weight_form import ROW
from tinychat.quantize import quantize, smooth
from tinychat.quantize.block import round_to_nearest
from tinychat.quantize.forward import Forward, read_block
from tinychat.quantize.grids import Symmetric
from tinychat.quantize.nodes import BlockWeights


def grid(k: int) -> Symmetric:
    """Int8 with one scale a row."""
    return Symmetric(8, k, cropped=True)


def loud(w: BlockWeights, channel: int = 5, by: float = 50.0) -> BlockWeights:
    """The same function with one input of q, k, v and one of gate and up `by` times as loud."""
    w = w.copy()
    for norm, readers in {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }.items():
        w.norm[norm][channel] *= by
        for name in readers:
            w.linear[name][:, channel] /= by
    return w


@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_moving_channels_leaves_the_float_function_as_it_is(n_kv_heads, monkeypatch):
    source = TinyCheckpoint(n_kv_heads=n_kv_heads)
    f, w = Forward(source.config), loud(read_block(source, 0))
    w.bias = {n: torch.randn(len(t)) for n, t in w.linear.items()}
    torch.manual_seed(0)
    x = torch.randn(4, 64, 64)
    before = f.block(x, w)
    monkeypatch.setattr(smooth, "round_to_nearest", lambda w, grid, cfg: w)
    folded, after = smooth.SmoothQuantizer(f, grid, alphas=(0.7,))(w, x.clone())
    scale = float(before.abs().max())
    assert torch.allclose(after, before, atol=1e-3 * scale)
    assert torch.allclose(f.block(x, folded), before, atol=1e-3 * scale)
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert float(w.norm[name][5] / folded.norm[name][5]) > 4  # far quieter now


def test_a_loud_channel_costs_plain_rounding_dear_and_smoothquant_little():
    source = TinyCheckpoint()
    f, w = Forward(source.config), loud(read_block(source, 0))
    rounded = Forward(source.config, smooth.per_token)
    torch.manual_seed(0)
    x, held_out = torch.randn(4, 64, 64), torch.randn(4, 64, 64)
    want = f.block(held_out, w)

    def error(quantized: BlockWeights) -> float:
        return float((rounded.block(held_out, quantized) - want).pow(2).mean())

    plain = error(round_to_nearest(w, grid, source.config).weights())
    smoothed = error(smooth.SmoothQuantizer(f, grid)(w, x)[0].weights())
    assert smoothed < 0.2 * plain


def test_activations_are_rounded_with_one_scale_a_token():
    x = torch.tensor([[[127.0, 0.6, -2.4, 0.4], [0.0, 0.0, 0.0, 0.0]]])
    assert smooth.per_token(x).tolist() == [[[127.0, 1.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]


def test_the_folder_is_int_quantized_as_compressed_tensors_names_it(tmp_path, text):
    source = TinyCheckpoint(template=None)
    facts = quantize(source, tmp_path / "out", method="smoothquant", calib_file=text)
    assert (facts["format"], facts["bits"], facts["activation_bits"]) == ("compressed-tensors", 8, 8)
    q = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (q["quant_method"], q["format"]) == ("compressed-tensors", "int-quantized")
    (scheme,) = q["config_groups"].values()
    weights, inputs = scheme["weights"], scheme["input_activations"]
    assert [weights[k] for k in ("num_bits", "type", "symmetric", "strategy", "dynamic")] == [
        8, "int", True, "channel", False,
    ]  # fmt: skip
    assert inputs == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

    tensors = load_file(tmp_path / "out" / "model.safetensors")

    class Plain(TinyCheckpoint):
        """The folder by the format's formula: weight · weight_scale."""

        def linear(self, name):
            if name + ".weight_scale" not in tensors:
                return super().linear(name)
            codes, scale = tensors[name + ".weight"], tensors[name + ".weight_scale"]
            assert codes.dtype == np.int8
            assert scale.shape == (len(codes), 1)
            assert int(codes.min()) >= -127
            self.weights[name] = codes.astype(np.float32) * scale.astype(np.float32)
            return super().linear(name)

        def vector(self, name):
            return tensors[name + ".weight"].astype(np.float32)

    ids = np.frombuffer(b"They say the lazy fox jumps 9 times over 8 dogs.", np.uint8).astype(np.int64)
    want, got = logits(source, ids), logits(Plain(), ids)
    assert float((got - want).pow(2).mean()) < 1e-2 * float(want.pow(2).mean())
    ours = HFCheckpoint(tmp_path / "out").linear("model.layers.0.mlp.down_proj")
    assert (ours.codes.dtype, ours.form.group) == (np.int8, ROW)
    plain = Plain()
    np.testing.assert_array_equal(
        ours.dequantize(), plain.linear("model.layers.0.mlp.down_proj").dequantize()
    )
    with tinychat.load(tmp_path / "out", device="cpu", head_bits=16) as model:
        run = model.logits(ids.tolist())
    assert np.square(run - got.numpy()).mean() < 1e-2 * float(want.pow(2).mean())


@pytest.mark.parametrize(
    "wishes", [{"bits": 4}, {"format": "gptq"}, {"group_size": 32}, {"act_order": True}], ids=str
)
def test_what_w8a8_does_not_have_is_refused(tmp_path, wishes):
    with pytest.raises(UsageError, match="one form"):
        quantize(TinyCheckpoint(), tmp_path / "out", method="smoothquant", **wishes)
    assert not (tmp_path / "out").exists()
