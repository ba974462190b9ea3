"""Tuning against transformers' own forward pass, and what it may change in a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_logits import logits
from tiny import TinyCheckpoint, files

from tinychat.base import machine
from tinychat.base.errors import MemoryBudgetError, UsageError
from tinychat.formats.hf import HFCheckpoint
from tinychat.network.weight_form import Coded
from tinychat.network.weights import QuantizedLinear
from tinychat.quantize import folder, quantize, settings, tune
from tinychat.quantize.layouts import StoredBlock
from tinychat.quantize.tune import Schedule, TunedBlock, TunedLinear, Tuner

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A schedule for a tiny model."""
    monkeypatch.setattr(tune, "PLAN", Schedule(steps=24, rate=2e-3, warmup=4, held_out=4, every=8))


def model() -> TinyCheckpoint:
    """A float model whose windows are short."""
    return TinyCheckpoint(context_length=64)


def stored_blocks(path: Path) -> list[StoredBlock]:
    c, blocks = HFCheckpoint(path), []
    for layer in range(c.config.n_layers):
        prefix = f"model.layers.{layer}."
        names = [*LINEARS, "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"]
        norms = ("input_layernorm", "post_attention_layernorm")
        blocks.append(
            StoredBlock(
                layer, {n: c.linear(prefix + n) for n in names}, {n: c.vector(prefix + n) for n in norms}
            )
        )
    return blocks


def divergence(path: Path, source: TinyCheckpoint, ids: np.ndarray) -> float:
    """KL(float ‖ quantized) by transformers, in nats a token."""
    p, q = (logits(c, ids).double().log_softmax(-1) for c in (source, HFCheckpoint(path)))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_gradients_are_those_of_transformers_own_forward_pass(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = model()
    quantize(source, tmp_path / "out", method="rtn", ranges="whole", group_size=32)
    blocks = [TunedBlock(b) for b in stored_blocks(tmp_path / "out")]
    tuner = Tuner(source, blocks, Schedule())
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 40)))
    with torch.no_grad():
        wanted = tuner._float_states(ids)
    tuner._backward(ids, wanted)
    first = [s.grad.clone() for s in tuner._shares]
    tuner.keeps = not tuner.keeps  # memory decides whether blocks run twice, which changes no bit
    for share in tuner._shares:
        share.grad = None
    tuner._backward(ids, wanted)
    assert all(torch.equal(a, s.grad) for a, s in zip(first, tuner._shares, strict=True))

    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings.hf_config(source.config)))
    stored, state, scales = HFCheckpoint(tmp_path / "out"), {}, {}
    table = torch.from_numpy(source.linear("model.embed_tokens").dequantize())
    for name in theirs.state_dict():
        module = name.removesuffix(".weight")
        if "proj" in name:  # w = (q - zero) · scale, with the scale in the graph
            w = stored.linear(module)
            codes, zeros = (torch.from_numpy(a.astype(np.float32)) for a in (w.codes, w.zeros))
            scales[module] = torch.from_numpy(w.scales.astype(np.float32)).requires_grad_()
            steps = codes - zeros.repeat_interleave(32, 1)
            state[name] = steps * scales[module].repeat_interleave(32, 1)
        elif "norm" in name:
            scales[module] = torch.from_numpy(stored.vector(module).copy()).requires_grad_()
            state[name] = scales[module]
        else:
            state[name] = table
    q = torch.func.functional_call(theirs.eval(), state, (ids,)).logits.log_softmax(-1)
    with torch.no_grad():
        p = torch.stack([logits(source, row) for row in ids.numpy()]).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    kl.backward()
    assert tuner._divergence(ids, wanted) == pytest.approx(kl.item(), rel=1e-3)
    for block in blocks:
        prefix = f"model.layers.{block.layer}."
        moving = {n: (w.scales, scales[prefix + n]) for n, w in block.linear.items()}
        moving |= {n: (v, scales[prefix + n]) for n, v in block.norm.items()}
        for name, (ours, their) in moving.items():
            want = their.grad * their.detach()  # a share of itself, and not a number, is what moves
            assert torch.allclose(ours.share.grad, want, rtol=1e-2, atol=1e-3 * float(want.abs().max())), name


@pytest.mark.parametrize(
    "wishes",
    [
        {"method": "awq"},
        {"method": "gptq", "act_order": True},
        {"method": "rtn", "bits": 3, "format": "compressed-tensors", "ranges": "whole"},
    ],
    ids=["awq", "gptq act-order", "rtn of 3 bits"],
)
def test_only_scales_and_norms_move_and_the_divergence_falls_on_text_that_was_not_seen(
    tmp_path, text, wishes
):
    source = model()
    quantize(source, tmp_path / "plain", calib_file=text, **wishes)
    with torch.inference_mode():  # whatever the caller is in
        facts = quantize(source, tmp_path / "tuned", calib_file=text, tune=True, **wishes)
    assert facts["tuned"]["divergence_after"] < facts["tuned"]["divergence_before"]
    assert json.loads((tmp_path / "tuned" / "quantize.json").read_text())["tuned"] == facts["tuned"]
    before, after = HFCheckpoint(tmp_path / "plain"), HFCheckpoint(tmp_path / "tuned")
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"):
        a, b = before.linear(name), after.linear(name)
        assert np.array_equal(a.codes, b.codes)
        assert np.array_equal(a.zeros, b.zeros)
        assert a.perm is None or np.array_equal(a.perm, b.perm)
        assert b.scales.dtype == np.float16
        change = b.scales.astype(np.float64) / a.scales - 1
        assert 0 < np.abs(change).max() < 0.1
    norm = "model.layers.1.input_layernorm"
    assert not np.array_equal(before.vector(norm), after.vector(norm))
    assert np.array_equal(before.vector("model.norm"), after.vector("model.norm"))
    ids = np.random.default_rng(7).integers(32, 127, 60)
    plain, tuned = (divergence(tmp_path / n, source, ids) for n in ("plain", "tuned"))
    assert tuned < plain


def test_steps_that_make_it_worse_are_not_kept(tmp_path, text, monkeypatch):
    monkeypatch.setattr(tune, "PLAN", Schedule(steps=6, rate=3.0, warmup=1, held_out=4, every=2))
    plain = {"method": "rtn", "ranges": "whole", "calib_file": text}
    quantize(model(), tmp_path / "plain", **plain)
    facts = quantize(model(), tmp_path / "tuned", tune=True, **plain)
    assert facts["tuned"]["steps"] == 0
    assert facts["tuned"]["divergence_after"] == facts["tuned"]["divergence_before"]
    name = "model.safetensors"
    assert files(tmp_path / "plain")[name] == files(tmp_path / "tuned")[name]


def test_a_run_that_stopped_between_tuned_blocks_gives_the_same_folder(tmp_path, text, monkeypatch):
    wishes = {"method": "rtn", "ranges": "whole", "calib_file": text, "tune": True}
    write = folder.OutputFolder.write_block

    def stop(self, layer, tensors, tuned=False):
        write(self, layer, tensors, tuned)
        if tuned:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(folder.OutputFolder, "write_block", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(model(), tmp_path / "out", **wishes)
    assert (tmp_path / ".out.partial" / "tuned-00000.safetensors").is_file()
    assert not (tmp_path / "out").exists()
    quantize(model(), tmp_path / "out", **wishes)
    quantize(model(), tmp_path / "whole", **wishes)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert os.listdir(tmp_path / "out") == os.listdir(tmp_path / "whole")


def test_too_little_memory_is_said_before_anything_is_written(tmp_path, text, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 20)
    with pytest.raises(MemoryBudgetError, match="Tuning this model needs"):
        quantize(model(), tmp_path / "out", method="rtn", ranges="whole", calib_file=text, tune=True)
    assert os.listdir(tmp_path) == ["text.txt"]


def test_smoothquant_has_nothing_to_tune(tmp_path):
    with pytest.raises(UsageError, match="nothing to tune"):
        quantize(model(), tmp_path / "out", method="smoothquant", tune=True)


def linear(kind: str) -> QuantizedLinear:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (6, 512), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.1, (6, 16)).astype(np.float16)
    if kind == "offsets":
        return QuantizedLinear(codes, scales, offsets=(-8 * scales).astype(np.float16))
    if kind == "symmetric":
        return QuantizedLinear(codes, scales)
    if kind == "coded":  # Q4_K
        six = Coded("int6", rng.integers(1, 64, (6, 16), dtype=np.uint8), scales[:, :2])
        mins = Coded("int6", rng.integers(0, 64, (6, 16), dtype=np.uint8), -scales[:, 2:4])
        return QuantizedLinear(codes, six, offsets=mins)
    if kind == "powers of two":  # MXFP4: scales that cannot move by shares
        return QuantizedLinear(codes, Coded("e8m0", np.full((6, 16), 120, np.uint8)), table="e2m1")
    return QuantizedLinear(codes, scales[:2], rows=3, table="iq4_nl")


@pytest.mark.parametrize("kind", ["offsets", "symmetric", "coded", "powers of two", "blocks"])
def test_every_form_decodes_as_it_is_stored_and_keeps_its_words(kind):
    w = linear(kind)
    tuned = TunedLinear(w)
    np.testing.assert_allclose(tuned.weight().detach().numpy(), w.dequantize(), rtol=1e-5, atol=1e-6)
    for m in tuned.moving():
        if m.share is not None:
            with torch.no_grad():
                m.share += 0.25
    assert tuned.stored().form == w.form
    want = w.dequantize() * (1 if kind == "powers of two" else 1.25)
    np.testing.assert_allclose(tuned.stored().dequantize(), want, rtol=2e-3, atol=2e-3 * np.abs(want).max())
