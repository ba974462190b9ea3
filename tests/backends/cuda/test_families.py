"""Families with parts of their own, on the (emulated) GPU against transformers: sinks, clamped gates, gated
experts.
"""

from __future__ import annotations

import numpy as np
import pytest
from backend_steps import BLOCKS, TABLE
from emulation import bench, needs_device
from families import CASES, FromTransformers, logits_of, random_model, usual_error
from memories import allocate, step_of

from tinychat.backends.cuda import CudaBackend
from tinychat.network.weight_policy import WeightPolicy

pytestmark = needs_device

IDS = np.random.default_rng(1).integers(0, 258, 64).astype(np.int32)


def run(checkpoint, cuts):
    """Logits of IDS, fed in pieces of these sizes: windows of 30 end in the middle of a block."""
    b = allocate(CudaBackend(checkpoint, WeightPolicy("none", 16), modules=bench().modules), BLOCKS)
    at, out = 0, []
    for n in cuts:
        out.append(b.step(step_of(b, IDS[at : at + n], at, at, TABLE, 0)))
        at += n
    return np.concatenate(out)


OWN = ("gpt-oss", "granite_swa", "qwen2moe")
STATES = {  # one of each kind; the others are slow
    "ministral3 window",
    "lfm2",
    "lfm3 listed",
    "qwen3.5moe",
    "qwen3next",
    "falcon-h1 factors",
    "nemotron-h moe",
    "granite-h moe",
}
SLOW = {
    name for name in CASES if name.startswith(tuple(s.split()[0].removesuffix("moe") for s in STATES))
} - STATES
ALL = [name for name in CASES if name.startswith(OWN) or name in STATES]
ALL += [pytest.param(name, marks=pytest.mark.slow) for name in sorted(SLOW)]


@pytest.mark.parametrize("case", ALL)
def test_logits_are_those_of_transformers_however_a_prompt_is_cut(case):
    cls, changes = CASES[case]
    hf = random_model(cls, **changes)
    checkpoint = FromTransformers(hf)
    whole = run(checkpoint, (len(IDS),))
    assert usual_error(whole, logits_of(hf, IDS)) < 4e-3
    np.testing.assert_array_equal(run(checkpoint, (50, 1, 5, 8)), whole)  # spread and walked alike
