"""Codes in integer words, against shifting them into one large integer."""

from __future__ import annotations

import numpy as np
import pytest

from tinychat.formats import nibbles


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [32, 40, 7, 96])
def test_codes_lie_one_behind_the_other_lowest_bits_first(bits, n):
    codes = np.random.default_rng(n).integers(0, 1 << bits, (3, n)).astype(np.uint8)
    words = nibbles.pack(codes, bits)
    assert words.dtype == np.int32
    assert words.shape == (3, -(-n * bits // 32))
    for row, packed in zip(codes.tolist(), words, strict=True):
        want = sum(code << (i * bits) for i, code in enumerate(row))
        assert int.from_bytes(packed.astype("<i4").tobytes(), "little") == want
    np.testing.assert_array_equal(nibbles.unpack(words, bits)[:, :n], codes)
