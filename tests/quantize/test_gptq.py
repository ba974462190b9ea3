"""GPTQ against the paper's own words, and the folder that it writes."""

from __future__ import annotations

import json

import numpy as np
import packers
import pytest
import torch
from tiny import TinyCheckpoint

from tinychat.base.errors import TinychatError, UsageError
from tinychat.formats.gptq import pack, unpack
from tinychat.formats.hf import HFCheckpoint
from tinychat.quantize import folder, quantize
from tinychat.quantize.gptq import gptq
from tinychat.quantize.grids import Grid
from tinychat.quantize.rounding import nearest


def grid(group: int) -> Grid:
    """Zero points that every version of GPTQ's files holds."""
    return Grid(group=group, lowest=1)


def inputs(k: int, n: int = 400, seed: int = 0) -> torch.Tensor:
    """Correlated, with a few loud channels: float64 [n, k]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=g, dtype=torch.float64) @ torch.randn(
        k, k, generator=g, dtype=torch.float64
    )
    return x / k**0.5 * torch.where(torch.rand(k, generator=g) < 0.1, 8.0, 1.0)


def error(w: torch.Tensor, instead: torch.Tensor, x: torch.Tensor) -> float:
    """Mean square of what rounding changes in the outputs."""
    return float(((w.double() - instead) @ x.T.double()).pow(2).mean())


def by_the_paper(w, h, group, damp, act_order):
    """Equations 2 and 3 word for word: the inverse of what is left of H, made anew at each step; float64."""
    k = w.shape[1]
    w, h = w.double().clone(), h.double() + damp * h.double().diagonal().mean() * torch.eye(k)
    order = h.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(k))
    left, out = list(order), torch.empty_like(w)
    for i, q in enumerate(order):
        if i % group == 0:  # the grid of the next group, from its weights as they are now
            members = order[i : i + group]
            hi = w[:, members].amax(1).clamp_min(0)
            lo = torch.minimum(w[:, members].amin(1).clamp_max(0), -hi / 14)
            scale = ((hi - lo) / 15).half().double()
            zero = (-lo / scale).round()
        inverse = torch.linalg.inv(h[left][:, left])
        at = left.index(q)
        out[:, q] = ((w[:, q] / scale).round() + zero).clamp(0, 15).sub(zero).mul(scale)
        delta = (w[:, q] - out[:, q])[:, None] / inverse[at, at] * inverse[at]
        w[:, left] -= delta
        left.remove(q)
    return out


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(5, 48, 16), (8, 64, 32), (3, 40, 8), (7, 36, 36), (1, 96, 32)]
)
def test_it_is_the_papers_algorithm(n, k, group, act_order):
    torch.manual_seed(n * k)
    w, x = torch.randn(n, k), inputs(k)
    h = (x.T @ x / len(x)).float()
    want = by_the_paper(w, h, group, 0.01, act_order)
    got = gptq(w, h, grid(group), 0.01, act_order).dequantize().double()
    # a weight half way between two levels may go to the other one in float32, and move what comes after it
    rows = ((want - got).abs() < 1e-3).all(1)
    assert rows.float().mean() >= 0.8
    assert error(w, got, x) == pytest.approx(error(w, want, x), rel=0.05)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_change_less_than_by_rounding_to_nearest(seed, act_order):
    torch.manual_seed(seed)
    w, x = torch.randn(32, 128), inputs(128, 1000, seed)
    h = (x.T @ x / len(x)).float()
    ours, plain = gptq(w, h, grid(32), act_order=act_order), nearest(w, Grid(group=32))
    assert error(w, ours.dequantize(), x) < 0.75 * error(w, plain.dequantize(), x)


def test_uncorrelated_inputs_leave_nothing_to_repair():
    torch.manual_seed(0)
    w = torch.randn(16, 64)
    w[:, ::16] = -w[:, ::16].abs()  # so that no group's zero point would be 0
    r, plain = gptq(w, torch.eye(64), grid(16), damp=0.0), nearest(w, Grid(group=16))
    assert torch.equal(r.codes, plain.codes)
    assert torch.equal(r.scales, plain.scales)


def test_inputs_that_were_always_zero_are_rounded_to_nearest():
    torch.manual_seed(0)
    w, x = torch.randn(8, 64), inputs(64)
    dead = [3, 17, 40, 63]
    x[:, dead] = 0
    r = gptq(w, (x.T @ x / len(x)).float(), grid(64))
    got = r.dequantize()
    assert torch.isfinite(got).all()
    steps = (got - w)[:, dead].abs() / r.scales
    assert float(steps.max()) <= 0.5 + 1e-3
    everything = gptq(w, torch.zeros(64, 64), grid(32))
    assert torch.equal(everything.dequantize(), nearest(w, grid(32)).dequantize())


def test_zero_points_are_those_that_every_version_of_the_format_holds():
    w = torch.rand(4, 64) + 0.5  # nothing negative: rounding to nearest puts zero at code 0
    assert nearest(w, Grid(group=32)).canonical(None).zeros.max() == 0
    r = gptq(w, torch.eye(64), grid(32))
    assert r.canonical(None).zeros.min() >= 1
    assert float((r.dequantize() - w).abs().max()) <= float(r.scales.max()) * 0.51


def test_groups_of_act_order_hold_the_loudest_inputs_first():
    torch.manual_seed(0)
    w = torch.randn(4, 64)
    h = torch.diag(torch.arange(64.0) + 1)
    r = gptq(w, h, grid(16), act_order=True)
    assert r.order.tolist() == list(range(63, -1, -1))
    assert r.canonical(None).perm.tolist() == r.order.tolist()
    np.testing.assert_array_equal(r.canonical(None).dequantize(), r.dequantize().numpy())


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="40 inputs"):
        gptq(torch.randn(2, 40), torch.eye(40), grid(16))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, np.random.default_rng(0).integers(32, 127, 3000))))
    return path


@pytest.mark.parametrize("act_order", [False, True])
def test_what_is_packed_is_what_gptqs_own_code_packs(act_order):
    torch.manual_seed(0)
    w, x = torch.randn(16, 96), inputs(96)
    r = gptq(w, (x.T @ x / len(x)).float(), grid(32), act_order=act_order)
    weight = r.canonical(None)
    order = np.arange(96) if weight.perm is None else weight.perm
    codes, groups = np.empty_like(weight.codes), np.empty(96, np.int64)
    codes[:, order], groups[order] = weight.codes, np.arange(96) // 32
    tensors = pack(weight)
    for name, want in packers.gptq(codes, weight.zeros, weight.scales, groups, version=1).items():
        np.testing.assert_array_equal(tensors[name], want, err_msg=name)
    parts = (tensors[n] for n in ("qweight", "qzeros", "scales", "g_idx"))
    np.testing.assert_array_equal(unpack(*parts, version=1).dequantize(), r.dequantize().numpy())


def read_as_gptq_does(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """A weight [out, in] from the files alone, in the way of AutoGPTQ's torch code, version 1."""
    shifts = torch.arange(0, 32, 4)
    qweight, qzeros = tensors[f"{module}.qweight"], tensors[f"{module}.qzeros"]
    codes = ((qweight[:, None] >> shifts[None, :, None]) & 15).flatten(0, 1)
    zeros = ((qzeros[:, :, None] >> shifts) & 15).flatten(1) + 1
    g_idx = tensors[f"{module}.g_idx"].long()
    return ((codes - zeros[g_idx]) * tensors[f"{module}.scales"].float()[g_idx]).T


@pytest.mark.parametrize("act_order", [False, True])
def test_the_folder_is_gptqs(act_order, tmp_path, text, monkeypatch):
    from safetensors.torch import load_file
    from transformers.quantizers.auto import AutoQuantizationConfig

    from tinychat.backends.cpu import CpuBackend
    from tinychat.backends.interface import Step
    from tinychat.backends.reference import ReferenceBackend
    from tinychat.models.llama import linears
    from tinychat.network.weight_policy import WeightPolicy

    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    facts = quantize(TinyCheckpoint(), tmp_path / "out", method="gptq", act_order=act_order, calib_file=text)
    assert (facts["method"], facts["group_size"]) == ("gptq", 32)
    q = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (q["quant_method"], q["bits"], q["desc_act"], q["sym"]) == ("gptq", 4, act_order, False)
    assert AutoQuantizationConfig.from_dict(q).desc_act == act_order
    tensors, ours = load_file(tmp_path / "out" / "model.safetensors"), HFCheckpoint(tmp_path / "out")
    reordered = 0
    for layer in range(2):
        for name in linears(ours.config, layer):
            weight = ours.linear(name)
            assert torch.equal(read_as_gptq_does(tensors, name), torch.from_numpy(weight.dequantize()))
            reordered += weight.perm is not None
    assert reordered == (14 if act_order else 0)
    policy, out = WeightPolicy("none", 16), []
    for b in (ReferenceBackend(ours, policy), CpuBackend(ours, policy, threads=1, act_bits=16)):
        b.allocate_kv(4)
        out.append(b.step(Step.of(np.arange(40, 80, dtype=np.int32), 0, 0, np.arange(4, dtype=np.int32), 0)))
    assert np.linalg.norm(out[1] - out[0]) < 3e-3 * np.linalg.norm(out[0])


def test_a_run_that_was_stopped_goes_on_and_gives_the_same_folder(tmp_path, text, monkeypatch):
    options = dict(method="gptq", act_order=True, calib_file=text)
    write, stop = folder.OutputFolder.write_block, TinychatError("Stopped.", "Go on.")

    def write_one(self, layer, tensors):
        if layer == 1:
            raise stop
        write(self, layer, tensors)

    with monkeypatch.context() as m:
        m.setattr(folder.OutputFolder, "write_block", write_one)
        with pytest.raises(TinychatError):
            quantize(TinyCheckpoint(), tmp_path / "out", **options)
    assert len(list((tmp_path / ".out.partial").glob("block-*"))) == 1
    quantize(TinyCheckpoint(), tmp_path / "out", **options)
    quantize(TinyCheckpoint(), tmp_path / "whole", **options)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_act_order_belongs_to_gptq(tmp_path, text):
    with pytest.raises(UsageError, match="act-order"):
        quantize(TinyCheckpoint(), tmp_path / "out", act_order=True, calib_file=text)
