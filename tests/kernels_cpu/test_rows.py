"""What stands between two linears: norms, SwiGLU, rotary embedding, embedding rows, the greedy head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from programs import CODED, ISAS, Bench, input_rows, random_coded, random_dense, random_linear

from tinychat.backends.cpu_pack import pack


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 15, 64, 100, 576, 4096])
def test_rms_norm(isa, k):
    rng = np.random.default_rng(k)
    x, w = rng.normal(size=(5, k)).astype(np.float32) * 3, rng.normal(size=k).astype(np.float32)
    b = Bench(isa)
    out = b.p.rows(k, True, 8 if k % 32 == 0 else 0, 32)
    b.p.rms_norm(b.input(x), w, 1e-5, out, False)
    b.run(5)
    expected = torch.nn.functional.rms_norm(
        torch.from_numpy(x).double(), (k,), torch.from_numpy(w).double(), 1e-5
    )
    np.testing.assert_allclose(b.view(out.floats, 5), expected.numpy(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [3, 16, 96, 5000])
def test_silu_mul(isa, k):
    rng = np.random.default_rng(k)
    x = (rng.normal(size=(3, 2 * k)) * 10).astype(np.float32)
    x[0, : min(k, 8)] = [0.0, -0.0, 100.0, -100.0, 1e30, -1e30, 88.5, -88.5][: min(k, 8)]
    b = Bench(isa)
    out = b.p.rows(k, True, 0, 0)
    b.p.silu_mul(b.input(x), out)
    b.run(3)
    gate, up = torch.from_numpy(x).double().chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up).numpy()
    np.testing.assert_allclose(b.view(out.floats, 3), expected, rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [3, 16, 96, 5000])
def test_gelu_mul(isa, k):
    rng = np.random.default_rng(k)
    x = (rng.normal(size=(3, 2 * k)) * 3).astype(np.float32)
    x[0, : min(k, 8)] = [0.0, -0.0, 100.0, -100.0, 1e30, -1e30, 12.5, -4.0][: min(k, 8)]
    b = Bench(isa)
    out = b.p.rows(k, True, 0, 0)
    b.p.gelu_mul(b.input(x), out)
    b.run(3)
    gate, up = torch.from_numpy(x).double().chunk(2, dim=-1)
    expected = (torch.nn.functional.gelu(gate, approximate="tanh") * up).numpy()
    np.testing.assert_allclose(b.view(out.floats, 3), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [3, 96, 5000])
def test_clamped_mul(isa, k):
    rng = np.random.default_rng(k)
    x = (rng.normal(size=(3, 2 * k)) * 5).astype(np.float32)
    x[0, : min(k, 8)] = [0.0, -0.0, 100.0, -100.0, 7.0, -7.0, 1e30, -30.0][: min(k, 8)]
    b = Bench(isa)
    out = b.p.rows(k, True, 0, 0)
    b.p.clamped_mul(b.input(x), out, 7.0, 1.702)
    b.run(3)
    gate, up = torch.from_numpy(x).double().chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    expected = (gate * torch.sigmoid(1.702 * gate) * (up + 1)).numpy()
    np.testing.assert_allclose(b.view(out.floats, 3), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [5, 64, 100])
def test_a_norm_is_added_to_the_residual(isa, k):
    rng = np.random.default_rng(k)
    x, y, w = (rng.normal(size=s).astype(np.float32) for s in ((5, k), (5, k), k))
    b = Bench(isa)
    residual = b.input(y)
    b.p.rms_norm_add(b.input(x), w, 1e-5, residual)
    b.run(5)
    normed = torch.nn.functional.rms_norm(torch.from_numpy(x), (k,), torch.from_numpy(w), 1e-5).numpy()
    np.testing.assert_allclose(b.view(residual, 5), y + normed, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("widths", [(20, 20), (8, 40), (80, 40)])
def test_queries_and_keys_are_normed_and_values_are_not(isa, widths):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 80 + 40 + 40)).astype(np.float32)
    q, k = (rng.normal(size=n).astype(np.float32) for n in widths)
    b = Bench(isa)
    qkv = b.input(x)
    b.p.norm_heads(qkv, q, k, 80, 40, 1e-5)
    b.run(5)

    def norm(part, weight):
        spans = torch.from_numpy(part).unflatten(1, (-1, len(weight)))
        return torch.nn.functional.rms_norm(spans, (len(weight),), torch.from_numpy(weight), 1e-5).flatten(1)

    expected = np.concatenate([norm(x[:, :80], q), norm(x[:, 80:120], k), x[:, 120:]], axis=1)
    np.testing.assert_allclose(b.view(qkv, 5), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_logits_are_scaled_and_capped_and_greedy_agrees(isa, cap):
    rng = np.random.default_rng(3)
    w, x = pack(random_linear(rng, "int8", 777, 64, 32)), rng.normal(size=(5, 64)).astype(np.float32) * 30

    def program(**finish):
        b = Bench(isa)
        rows = input_rows(b.p, w, 8)
        b.p.quantize(b.input(x), None, rows, True)
        b.p.lm_head(w.native, rows, **finish)
        return b

    plain = run_head(program(), 5, 0, 777, False)
    finished = program(scale=1.5, cap=cap)
    expected = 30 * np.tanh(plain.astype(np.float64) * 1.5 / 30) if cap else plain * np.float32(1.5)
    got = run_head(finished, 5, 0, 777, False)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(run_head(finished, 5, 0, 777, True), got.argmax(axis=1))


def test_silu_mul_has_the_same_bits_on_every_isa_and_keeps_nan():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 192)) * 30).astype(np.float32)
    x[1, 3] = np.nan
    results = []
    for isa in ISAS:
        b = Bench(isa)
        out = b.p.rows(96, True, 8, 96)
        b.p.silu_mul(b.input(x), out)
        b.run(4)
        results.append(b.view(out.floats, 4))
    assert np.isnan(results[0][1, 3])
    assert np.isnan(results[0]).sum() == 1
    for r in results[1:]:
        np.testing.assert_array_equal(r, results[0])


def head_program(w, x, isa="scalar", tail=True, threads=2):
    b = Bench(isa, threads=threads, max_rows=256)
    rows = input_rows(b.p, w, 8)
    b.p.quantize(b.input(x), None, rows, tail)
    b.p.lm_head(w.native, rows)
    return b


def run_head(b, rows, start, vocab, greedy):
    logits = None if greedy else np.empty((rows - start, vocab), np.float32)
    ids = np.empty(rows - start, np.int32) if greedy else None
    b.p.run(((np.zeros(rows, np.int32), 0, start, ()),), logits, ids)
    return ids if greedy else logits


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 5, 33, 130])
def test_greedy_is_the_argmax_of_the_logits(isa, rows):
    rng = np.random.default_rng(rows)
    vocab = 777
    w = pack(random_linear(rng, "int8", vocab, 64, 32))
    x = rng.normal(size=(rows, 64)).astype(np.float32)
    b = head_program(w, x, isa)
    for start in {0, rows // 2, rows - 1}:
        logits = run_head(b, rows, start, vocab, greedy=False)
        np.testing.assert_array_equal(run_head(b, rows, start, vocab, greedy=True), logits.argmax(axis=1))
    assert run_head(b, rows, rows, vocab, greedy=True).shape == (0,)


@pytest.mark.parametrize("isa", ISAS)
def test_greedy_takes_the_lowest_id_of_a_tie(isa):
    rng = np.random.default_rng(1)
    w = random_linear(rng, "int8", 600, 64, 32)
    w.codes[:] = rng.integers(-100, 100, 64, dtype=np.int8)  # all rows alike
    w.scales[:] = np.float16(0.01)
    x = rng.normal(size=(3, 64)).astype(np.float32)
    for first in (0, 17, 599):
        v = w.scales.copy()
        v[:first] = 0.0
        up = np.sign(w.dequantize()[0] @ x[0])
        tied = replace(w, scales=(v * up).astype(np.float16))
        got = run_head(head_program(pack(tied), x, isa, threads=3), 3, 0, 600, greedy=True)
        assert got[0] == first


@pytest.mark.parametrize("isa", ISAS)
def test_embedding_rows_are_the_dequantized_rows(isa):
    rng = np.random.default_rng(2)
    forms = [
        "symmetric",
        "zeros",
        "zeros16",
        "offsets",
        "float",
        "int8",
        "int8-float",
        "fp32",
        "fp16",
        "bf16",
    ]
    for form in forms:
        dense = form in ("fp32", "fp16", "bf16")
        w = random_dense(rng, form, 100, 96) if dense else random_linear(rng, form, 100, 96, 32)
        b = Bench(isa)
        out = b.p.floats(96)
        b.p.embed(pack(w).native, out)
        ids = np.array([0, 99, 17, 16, 15, 17, 64, 3, 50], np.int32)
        b.p.run(((ids, 0, len(ids), ()),))
        np.testing.assert_allclose(b.view(out, 9), w.dequantize()[ids], rtol=1e-6, atol=1e-9, err_msg=form)


@pytest.mark.parametrize("isa", ISAS)
def test_embeddings_of_every_form_read_their_own_rows(isa):
    rng = np.random.default_rng(2)
    for form in CODED:
        w = random_coded(rng, form, 100, 768)
        b = Bench(isa)
        out = b.p.floats(768)
        b.p.embed(pack(w).native, out)
        ids = np.array([0, 99, 17, 16, 15, 17, 64, 3, 50], np.int32)
        b.p.run(((ids, 0, len(ids), ()),))
        size = np.abs(w.dequantize()).max()
        np.testing.assert_allclose(
            b.view(out, 9), w.dequantize()[ids], rtol=1e-6, atol=size * 1e-6, err_msg=form
        )


def test_wrong_inputs_are_exceptions():
    rng = np.random.default_rng(3)
    b = Bench()
    b.p.embed(pack(random_linear(rng, "int8", 10, 32, 32)).native, b.p.floats(32))
    for ids in ([10], [-1], [], [0] * 65):
        with pytest.raises(ValueError, match=r"token|step"):
            b.p.run(((np.array(ids, np.int32), 0, len(ids), ()),))
    with pytest.raises(ValueError, match="no place"):
        b.p.run(((np.zeros(1, np.int32), 0, 0, ()),))
    with pytest.raises(ValueError, match="negative"):
        b.p.run(((np.zeros(1, np.int32), -1, 1, ()),))
