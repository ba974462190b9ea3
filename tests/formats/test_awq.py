"""AutoAWQ's gemm layout, against unpackers that share no code with ours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.formats import awq
from tinychat.network.weights import QuantizedLinear


def random_linear(n: int, k: int, group: int, seed: int = 0) -> QuantizedLinear:
    rng = np.random.default_rng(seed)
    return QuantizedLinear(
        codes=rng.integers(0, 16, (n, k), dtype=np.uint8),
        scales=rng.uniform(1e-4, 1e-1, (n, k // group)).astype(np.float16),
        zeros=rng.integers(0, 16, (n, k // group), dtype=np.uint8),
    )


def scalar_dequantize(qweight, qzeros, scales, group):
    """One nibble at a time with Python ints, from AutoAWQ's description of the layout."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    k, words = qweight.shape
    w = np.zeros((words * 8, k), np.float32)
    for row in range(k):
        for word in range(words):
            code_word = int(qweight[row, word]) & 0xFFFFFFFF
            zero_word = int(qzeros[row // group, word]) & 0xFFFFFFFF
            for i in range(8):
                out = word * 8 + order[i]
                q, z = (code_word >> (4 * i)) & 0xF, (zero_word >> (4 * i)) & 0xF
                w[out, row] = np.float32(q - z) * np.float32(scales[row // group, out])
    return w


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpacking_gives_back_what_was_packed(n, groups, group, seed):
    w = random_linear(8 * n, groups * group, group, seed)
    back = awq.unpack(**awq.pack(w))
    assert np.array_equal(back.codes, w.codes)
    assert np.array_equal(back.zeros, w.zeros)
    assert np.array_equal(back.scales.view(np.uint16), w.scales.view(np.uint16))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), words=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_any_words_survive_unpack_and_pack(rows, words, seed):
    raw = np.random.default_rng(seed).integers(-(2**31), 2**31, (rows, words)).astype(np.int32)
    assert np.array_equal(awq.pack_nibbles(np.ascontiguousarray(awq.unpack_words(raw).T)), raw)


def test_an_independent_scalar_unpacker_reads_the_same_weights():
    w = random_linear(24, 128, 32, seed=3)
    t = awq.pack(w)
    assert t["qweight"].dtype == np.int32
    assert t["qweight"].shape == (128, 3)
    assert t["qzeros"].shape == (4, 3)
    assert t["scales"].shape == (4, 24)
    assert np.array_equal(scalar_dequantize(t["qweight"], t["qzeros"], t["scales"], 32), w.dequantize())


def test_nibble_order_of_one_word_by_hand():
    # Outputs 0…7 carry the codes 0…7; the word lists outputs 0,2,4,6,1,3,5,7 from its lowest nibble up.
    assert awq.pack_nibbles(np.arange(8, dtype=np.uint8)[None]) == np.array([[0x75316420]], np.int32)


def test_gptqmodel_reads_the_same_weights():
    torch = pytest.importorskip("torch")
    qlinear = pytest.importorskip(
        "gptqmodel.nn_modules.qlinear.torch_awq", reason="gptqmodel is not installed"
    )
    w = random_linear(64, 256, 64, seed=5)
    module = qlinear.AwqTorchLinear(
        bits=4,
        group_size=64,
        sym=False,
        desc_act=False,
        in_features=256,
        out_features=64,
        bias=False,
        register_buffers=True,
    )
    for name, a in awq.pack(w).items():
        getattr(module, name).copy_(torch.from_numpy(a))
    module.post_init()
    # Its forward works in 16 bits, so feed one-hot inputs: each output is one weight, in fp16.
    got = module(torch.eye(256, dtype=torch.float16)).T.float().detach().numpy()
    np.testing.assert_allclose(got, w.dequantize(), rtol=1e-3, atol=0)


def test_bias_is_carried():
    w = random_linear(8, 32, 32)
    w = QuantizedLinear(w.codes, w.scales, w.zeros, bias=np.arange(8, dtype=np.float32))
    assert np.array_equal(awq.unpack(**awq.pack(w)).bias, w.bias)


def test_what_the_layout_cannot_hold_is_refused():
    w = random_linear(8, 32, 32)
    with pytest.raises(ValueError, match="up to 15"):
        awq.pack(QuantizedLinear(w.codes, w.scales, np.full_like(w.zeros, 16)))
    with pytest.raises(ValueError, match="integer zero points"):
        awq.pack(QuantizedLinear(w.codes, w.scales, offsets=w.scales))
    with pytest.raises(ValueError, match="not exact"):
        awq.pack(QuantizedLinear(w.codes, w.scales.astype(np.float32) + np.float32(1e-7), w.zeros))
    with pytest.raises(ValueError, match="multiple of 8"):
        awq.pack(random_linear(12, 32, 32))


def test_shapes_that_do_not_belong_together_are_refused():
    t = awq.pack(random_linear(16, 64, 32))
    with pytest.raises(ValueError, match="do not fit"):
        awq.unpack(t["qweight"], t["qzeros"], t["scales"][:, :8])
    with pytest.raises(ValueError, match="do not fit"):
        awq.unpack(t["qweight"], t["qzeros"][:1], t["scales"])
