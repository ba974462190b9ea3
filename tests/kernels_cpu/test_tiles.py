"""AMX's tiles, in plain loops where the CPU has none: every bit is that of the AVX-512 kernels."""

from __future__ import annotations

import numpy as np
import pytest
from backend_steps import IDS, cpu, run
from programs import CODED, FORMS, ISAS, random_coded, random_linear, run_linear
from tiny import TinyCheckpoint

from tinychat.backends.cpu_pack import pack
from tinychat.kernels_cpu import _native
from tinychat.network.weight_policy import WeightPolicy

pytestmark = pytest.mark.skipif("avx512vnni" not in ISAS, reason="needs a CPU with AVX-512-VNNI")
TILED = ["amx-emulated", *(isa for isa in ISAS if isa == "amx")]
FEWEST = 16  # rows that tiles are used for


def rows_with_outliers(rng: np.random.Generator, rows: int, k: int) -> np.ndarray:
    x = rng.normal(size=(rows, k)).astype(np.float32)
    x[:, rng.integers(0, k, 3)] *= 50
    x[rng.integers(0, rows), :32] = 0
    return x


@pytest.mark.parametrize("isa", TILED)
@pytest.mark.parametrize("form", [*FORMS, *CODED])
def test_tiles_give_the_bits_of_avx512(form, isa):
    rng = np.random.default_rng(len(form))
    for rows in (FEWEST - 1, FEWEST, int(rng.integers(17, 64)), int(rng.integers(65, 90))):
        n = int(rng.integers(1, 70))
        if form in CODED:
            k = 1536 if CODED[form][2] == 96 else int(rng.choice([256, 768, 1280]))
            w = pack(random_coded(rng, form, n, k, bias=True))
        else:
            k, group = [(64, 32), (576, 64), (288, 96), (576, 576), (2304, 128), (1024, 1024), (2048, 2048)][
                rng.integers(0, 7)
            ]
            w = pack(random_linear(rng, form, n, k, 32 if form.startswith("int8") else group))
        x = rows_with_outliers(rng, rows, k)
        expected = run_linear([w], x, isa="avx512vnni")
        np.testing.assert_array_equal(run_linear([w], x, isa=isa), expected)
        np.testing.assert_array_equal(run_linear([w], x[-3:], isa=isa), expected[-3:])  # rows of decoding


@pytest.mark.parametrize("isa", TILED)
def test_activations_of_16_bits_and_floats_take_no_tiles(isa):
    rng = np.random.default_rng(1)
    x = rows_with_outliers(rng, 20, 256)
    for form, act_bits in (("zeros", 16), ("int8", 16), ("nf4", 8), ("fp8", 8)):
        make = random_coded(rng, form, 30, 256) if form in CODED else random_linear(rng, form, 30, 256, 32)
        expected = run_linear([pack(make)], x, isa="avx512vnni", act_bits=act_bits)
        np.testing.assert_array_equal(run_linear([pack(make)], x, isa=isa, act_bits=act_bits), expected)


@pytest.mark.parametrize("isa", TILED)
def test_a_nan_stays_in_its_row(isa):
    rng = np.random.default_rng(2)
    w = pack(random_linear(rng, "zeros", 32, 128, 64))
    x = rows_with_outliers(rng, 20, 128)
    clean = run_linear([w], x, isa=isa)
    x[7, 100] = np.nan
    got = run_linear([w], x, isa=isa)
    assert not np.isfinite(got[7]).any()
    np.testing.assert_array_equal(np.delete(got, 7, 0), np.delete(clean, 7, 0))


@pytest.mark.parametrize("isa", TILED)
def test_a_prompt_in_tiles_is_a_prompt_in_vectors(isa, monkeypatch):
    logits = {}
    for name in ("avx512vnni", isa):
        monkeypatch.setenv("TINYCHAT_ISA", name)
        backend = cpu(TinyCheckpoint(1), WeightPolicy("rtn"))
        assert backend.describe()["isa"] == name
        logits[name] = run(backend, IDS[:90], (63, 16, 1, 10))
    np.testing.assert_array_equal(logits[isa], logits["avx512vnni"])


def test_emulated_tiles_are_never_chosen(monkeypatch):
    monkeypatch.delenv("TINYCHAT_ISA", raising=False)
    assert "amx-emulated" not in _native.isas()
    assert ("amx" in ISAS) == (_native.amx_problem() is None)
    assert _native.isa() == ISAS[0]
