"""Bits, groups and formats that the quantizer writes, read by the formats' own ways and by ours."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from tiny import TinyCheckpoint

from tinychat.base.errors import UnsupportedModelError, UsageError
from tinychat.formats.hf import HFCheckpoint
from tinychat.models.llama import linears
from tinychat.quantize import layouts, quantize
from tinychat.quantize.grids import Grid, Offsets, SixBit, Symmetric
from tinychat.quantize.rounding import Metric, compensated, nearest, refine
from tinychat.quantize.target import BITS, choose

GRIDS = {
    "2 bits": Grid(2, 64),
    "3 bits": Grid(3, 64, lowest=1),
    "4 bits": Grid(4, 32),
    "8 bits, the row": Grid(8, 256),
    "symmetric": Symmetric(4, 64),
    "Q4_0": Symmetric(4, 32, signed=True),
    "Q4_1": Offsets(4, 32),
    "Q4_K": SixBit(),
    "Q5_0": Symmetric(5, 32, signed=True),
    "Q8_0": Symmetric(8, 32, cropped=True),
}


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [24, 256] and H [256, 256] of inputs that are correlated, a few of them loud."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(24, 256, generator=g)
    x = torch.randn(600, 256, generator=g) @ torch.randn(256, 256, generator=g) / 16
    x = x * torch.where(torch.rand(256, generator=g) < 0.05, 10.0, 1.0)
    return w, x.T @ x / len(x)


def loss(w, h, r) -> float:
    d = w - r.dequantize()
    return float(((d @ h) * d).sum())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_what_is_written_is_what_was_fitted(grid):
    w, h = problem()
    metric = Metric.of(h, grid)
    r = refine(w, metric, compensated(w, metric, grid))
    stored = r.canonical(None)
    assert stored.bits == grid.bits
    np.testing.assert_array_equal(stored.dequantize(), r.dequantize().numpy())
    assert stored.codes.max() < 1 << grid.bits
    divided = torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.5
    before = r.dequantize()
    r.divide_rows(divided)
    assert torch.allclose(r.dequantize() * divided[:, None], before, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_each_step_loses_less_than_the_one_before(grid):
    w, h = problem()
    metric = Metric.of(h, grid)
    plain = loss(w, metric.h, nearest(w, grid))
    weighed_metric = Metric.diagonal(h.diagonal())
    weighed = loss(w, metric.h, refine(w, weighed_metric, compensated(w, weighed_metric, grid)))
    searched = compensated(w, metric, grid)
    found = loss(w, metric.h, searched)
    refined = loss(w, metric.h, refine(w, metric, searched))
    assert refined <= found * 1.0001
    assert refined < weighed < plain * 1.02
    assert refined < plain * (0.8 if grid.bits < 8 else 1.0)


def test_importance_moves_ranges_towards_the_inputs_that_matter():
    """Two inputs carry all of the error that counts: a grid of few levels is laid through them."""
    w, _ = problem()
    weight = torch.full((256,), 1e-3)
    weight[::32] = 1.0
    grid = Grid(2, 32)
    metric = Metric.diagonal(weight)
    found, plain = refine(w, metric, compensated(w, metric, grid)), nearest(w, grid)
    errors = [(w - r.dequantize())[:, ::32].square().mean() for r in (found, plain)]
    assert errors[0] < 0.3 * errors[1]


def test_weights_that_a_grid_holds_are_kept_bit_for_bit():
    g = torch.Generator().manual_seed(0)
    for grid in (Grid(4, 32), Symmetric(4, 32, signed=True), Offsets(4, 32), Symmetric(8, 32, cropped=True)):
        codes = torch.randint(grid.least, grid.levels + 1, (8, 256), generator=g).float()
        codes[:, ::32], codes[:, 1::32] = grid.least, grid.levels
        scale = (torch.rand(8, 8, generator=g) + 0.5).half().float()
        second = (-3 * scale).half().float() if isinstance(grid, Offsets) else torch.full_like(scale, 8)
        if isinstance(grid, Symmetric):
            second = torch.full_like(scale, grid.half)
        s, o = grid.values((scale, second))
        w = (codes.view(8, 8, 32) * s[..., None] + o[..., None]).view(8, 256)
        r = compensated(w, Metric.diagonal(torch.ones(256)), grid)
        assert torch.equal(r.dequantize(), w), grid


def unpacked_by_shifting(words: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Codes [rows, n] of int32 words [rows, W]: the row is one large integer, lowest bits first."""
    rows = [int.from_bytes(row.astype("<i4").tobytes(), "little") for row in words]
    return np.array([[(row >> (i * bits)) & ((1 << bits) - 1) for i in range(n)] for row in rows])


def read_gptq(t: dict[str, torch.Tensor], name: str, bits: int, k: int) -> np.ndarray:
    """A weight [out, in] in gptqmodel's way (version 1: the zero point less one is stored)."""
    n = t[f"{name}.scales"].shape[1]
    codes = unpacked_by_shifting(t[f"{name}.qweight"].numpy().T, bits, k)
    zeros = unpacked_by_shifting(t[f"{name}.qzeros"].numpy(), bits, n) + 1
    g_idx = t[f"{name}.g_idx"].numpy()
    return (codes - zeros[g_idx].T) * t[f"{name}.scales"].float().numpy()[g_idx].T


def read_compressed(t: dict[str, torch.Tensor], name: str, bits: int, k: int) -> np.ndarray:
    """A weight [out, in] in compressed-tensors' way: codes and zero points are signed, stored plus half."""
    scale = t[f"{name}.weight_scale"].float().numpy()
    n, groups = scale.shape
    half = 1 << (bits - 1)
    codes = unpacked_by_shifting(t[f"{name}.weight_packed"].numpy(), bits, k) - half
    zeros = np.zeros((n, groups))
    if f"{name}.weight_zero_point" in t:
        zeros = unpacked_by_shifting(t[f"{name}.weight_zero_point"].numpy().T, bits, n).T - half
    assert t[f"{name}.weight_shape"].tolist() == [n, k]
    groups_of = np.arange(k) // (k // groups)
    return (codes - zeros[:, groups_of]) * scale[:, groups_of]


@pytest.mark.parametrize(("format", "bits"), itertools.product(["gptq", "compressed-tensors"], [2, 3, 4, 8]))
def test_folders_are_read_as_their_format_says(tmp_path, text, format, bits, monkeypatch):
    from safetensors.torch import load_file

    wrote = {}
    packed = layouts.packed
    monkeypatch.setattr(
        layouts, "packed", lambda b, *a: wrote.update({b.layer: b.weights()}) or packed(b, *a)
    )
    source = TinyCheckpoint(n_layers=1)
    options = dict(format=format, bits=bits, method="rtn" if bits == 8 else "awq", calib_file=text)
    if bits == 8:
        options |= dict(group_size=-1, symmetric=True)
    facts = quantize(source, tmp_path / "out", **options)
    assert (facts["format"], facts["bits"]) == (format, bits)
    q = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if format == "gptq":
        assert (q["bits"], q["sym"], q["group_size"]) == (bits, bits == 8, -1 if bits == 8 else 32)
    else:
        w = q["config_groups"]["group_0"]["weights"]
        assert (w["num_bits"], w["strategy"]) == (bits, "channel" if bits == 8 else "group")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    read = read_gptq if format == "gptq" else read_compressed
    for name, (_, k) in linears(source.config, 0).items():
        got = read(tensors, name, bits, k).astype(np.float32)
        np.testing.assert_array_equal(got, wrote[0].linear[name.split(".", 3)[3]].numpy())
        np.testing.assert_array_equal(got, HFCheckpoint(tmp_path / "out").linear(name).dequantize())


@pytest.mark.parametrize(
    "wishes",
    [
        {"format": "awq", "bits": 3},
        {"format": "gguf", "bits": 2},
        {"format": "gptq", "bits": 5},
        {"format": "zip"},
        {"method": "guess"},
        {"act_order": True},
        {"method": "gptq", "format": "awq", "act_order": True},
        {"format": "awq", "symmetric": True},
        {"format": "gguf", "group_size": 64},
        {"format": "gptq", "type": "Q4_0"},
        {"format": "gguf", "type": "Q8_0", "bits": 4},
        {"group_size": 48},
    ],
)
def test_wishes_that_do_not_go_together_are_refused_with_those_that_do(wishes):
    with pytest.raises(UsageError) as e:
        choose(TinyCheckpoint().config, **wishes)
    assert e.value.what.endswith(".")
    assert e.value.todo.startswith(("Use", "Leave"))


def test_every_format_is_chosen_for_the_bits_that_it_holds():
    cfg = TinyCheckpoint().config
    for format, widths in BITS.items():
        for bits in widths:
            assert choose(cfg, format=format, bits=bits).bits == bits
    assert choose(cfg).format == "awq"
    assert choose(cfg, method="gptq").format == "gptq"
    assert choose(cfg, bits=3).format == "gptq"
    assert choose(cfg, type="Q4_1").format == "gguf"
    assert choose(cfg, type="Q8_0").bits == 8


def test_outputs_that_do_not_fill_words_are_refused_before_work_begins():
    cfg = TinyCheckpoint(n_heads=4, n_kv_heads=1, head_dim=16, hidden_size=64).config
    with pytest.raises(UnsupportedModelError, match="multiple of 32") as e:
        choose(cfg, bits=3, format="gptq")
    assert "compressed-tensors" in e.value.todo
    assert choose(cfg, bits=3, format="compressed-tensors").bits == 3


def test_what_it_takes_is_said_before_work_begins_and_grows_with_the_work(
    tmp_path, text, capsys, monkeypatch
):
    from tinychat.quantize import _bar, estimate

    monkeypatch.setattr(estimate, "rate", lambda: 1e11)
    cfg = TinyCheckpoint().config
    awq, gptq, rtn = (estimate.seconds(cfg, 49152, 512, m) for m in ("awq", "gptq", "rtn"))
    assert awq > gptq > rtn > estimate.seconds(cfg, 0, 0, "rtn")
    assert estimate.seconds(cfg, 2 * 49152, 512, "gptq") > 1.5 * gptq
    assert estimate.in_words("1 GB", 540) == "about 9 minutes and 1 GB of memory"
    assert estimate.in_words("1 GB", 9) == "less than a minute and 1 GB of memory"
    assert estimate.in_words("1 GB", 4 * 3600) == "about 4 hours and 1 GB of memory"
    with _bar() as progress:
        quantize(TinyCheckpoint(), tmp_path / "out", method="rtn", calib_file=text, progress=progress)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Quantizing 2 blocks: less than a minute and ")
