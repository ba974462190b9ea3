"""Random weights of every form, and what the benchmark says of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from tinychat import synthetic
from tinychat.backends.exact_form import Kernels
from tinychat.base.errors import UsageError
from tinychat.bench import forms_per_token
from tinychat.models import FAMILIES
from tinychat.network.weight_policy import WeightPolicy
from tinychat.synthetic import FORMS, GGUF_FORMS, SyntheticCheckpoint, random_linear


@pytest.mark.parametrize("name", FORMS)
def test_random_weights_are_of_the_form_that_was_asked_for(name):
    w = random_linear(FORMS[name], 256, 512)
    assert w.form == FORMS[name]
    weights = w.dequantize()
    assert np.isfinite(weights).all()
    assert abs(weights.mean()) < 0.3 / 512**0.5
    assert 0.5 / 512**0.5 < weights.std() < 2 / 512**0.5
    assert len(np.unique(w.values())) >= min(1 << w.bits, 253) - 1  # e2m1 and e4m3 have two zeros
    for beside in (w.scales, w.offsets):
        if beside is not None and getattr(beside, "codes", beside).dtype.kind in "ui":
            assert len(np.unique(beside.codes)) > 1


@pytest.mark.parametrize("name", GGUF_FORMS)
def test_forms_of_ggufs_take_the_bytes_of_llama_cpps_types(name):
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    assert FORMS[name].n_bytes(32, 512) == 32 * 512 // block * size


@pytest.mark.parametrize("shape", synthetic.SHAPES)
@pytest.mark.parametrize("form", ["q5_0", "q4_k", "gptq3", "nvfp4", "fp8-channel"])
def test_every_shape_takes_a_form_or_says_which_width_does_not(shape, form):
    needed = {"q5_0": 32, "q4_k": 256, "gptq3": 128, "nvfp4": 16, "fp8-channel": 1}[form]
    config = synthetic.SHAPES[shape]
    linears = FAMILIES[config.family].linears(config, 0).values()
    odd = [k for _, k in linears if k % needed]
    if not odd:
        assert SyntheticCheckpoint(shape, form).form == form
    else:
        with pytest.raises(
            UsageError, match=f"groups of {needed} inputs, and {shape} has linears of {odd[0]}"
        ):
            SyntheticCheckpoint(shape, form)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(synthetic.SHAPES, "tiny", synthetic._shape(512, 512, 2, 4, 2, 64, tied=True))


def test_a_form_that_is_rounded_never_lends_its_name_to_what_runs(tiny):
    only_int8 = Kernels(frozenset({("8", "fp16", "none")}))
    body, head = forms_per_token(SyntheticCheckpoint("tiny", "q5_0"), WeightPolicy(), only_int8)
    weights, int8 = 2 * (2 * 512 * 512 + 2 * 256 * 512 + 3 * 512 * 512), "8-bit, groups of 32, fp16 scale"
    assert (body.given, body.given_bytes) == (str(FORMS["q5_0"]), weights * 5.5 / 8)
    assert (body.runs_as, body.bytes, body.rounded) == (int8, weights * 8.5 / 8, True)
    assert (head.given, head.given_bytes) == (str(FORMS["q6_k"]), 64 * 512 * 6.5625 / 8)
    assert (head.runs_as, head.bytes, head.rounded) == (int8, 64 * 512 * 8.5 / 8, True)
    all_of_it = Kernels.of("568", [("fp16", "none"), ("int8", "none")])
    body, head = forms_per_token(SyntheticCheckpoint("tiny", "q5_0"), WeightPolicy(), all_of_it)
    for some in (body, head):
        assert (some.runs_as, some.bytes, some.rounded) == (some.given, some.given_bytes, False)
