"""The CUDA backend's logits against the torch reference. Kernels, launches and graphs are the real ones; only
the device is emulated (emulation.py).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from backend_steps import IDS, cuda, run, truth
from emulation import ON_GPU, bench, needs_device, needs_emulation
from families import CASES, FromTransformers, random_model, relative_error, usual_error
from programs import random_linear
from tiny import TinyCheckpoint

from tinychat import synthetic
from tinychat.backends.cuda import CudaBackend
from tinychat.backends.interface import BLOCK, Step
from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import UnsupportedModelError
from tinychat.formats import open_checkpoint
from tinychat.network.config import ExpertsConfig, RopeConfig
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import QuantizedLinear

pytestmark = needs_device


SHAPES = {
    "tied": {},
    "untied": dict(tie_embeddings=False),
    "odd": dict(
        hidden_size=96, n_heads=6, n_kv_heads=3, head_dim=24, rope=RopeConfig(dim=24), intermediate_size=160
    ),
    "dense widths": dict(hidden_size=40, n_heads=2, n_kv_heads=1, head_dim=20, rope=RopeConfig(dim=20)),
}


@pytest.mark.parametrize(
    ("shape", "quantize"),
    [(s, q) for s in SHAPES for q in ("auto", "rtn", "none") if s == "odd" or q == "auto"],
)
def test_logits_are_the_references(shape, quantize):
    checkpoint, policy = TinyCheckpoint(3, **SHAPES[shape]), WeightPolicy(quantize)
    cuts = [40, 1, 1, 1, 5, 33]
    expected = run(truth(checkpoint, policy), IDS, cuts)
    got, spread = run(cuda(checkpoint, policy), IDS, cuts), expected.std()
    # Halves as activations, keys, values and probabilities, against fp32 everywhere.
    assert np.abs(got - expected).max() < 0.03 * spread
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.003 * spread


class KQuants(TinyCheckpoint):
    """As llama.cpp makes Q4_K_M: 4 bits with 6-bit scales, and 6 bits for v, down and the embedding."""

    def linear(self, name):
        six = name.endswith(("v_proj", "down_proj", "embed_tokens"))
        return synthetic.random_linear(synthetic.FORMS["q6_k" if six else "q4_k"], *self.weights[name].shape)

    def fingerprint(self, tell=None):
        return "k-quants " + super().fingerprint(tell)


def test_a_model_in_k_quants_is_the_references():
    """Weights come from a pack, neighbours that are alike are joined, the embedding is the head."""
    checkpoint = KQuants(3, hidden_size=256, intermediate_size=512, head_dim=64, rope=RopeConfig(dim=64))
    cuts = [40, 1, 1, 5, 33]
    expected, got = run(truth(checkpoint), IDS, cuts), run(cuda(checkpoint), IDS, cuts)
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.003 * expected.std()
    np.testing.assert_array_equal(run(cuda(checkpoint), IDS, [80]), got)


def test_an_8_bit_cache_is_the_references():
    checkpoint, cuts = TinyCheckpoint(3), [40, 1, 1, 5, 33]
    expected = run(truth(checkpoint, kv_bits=8), IDS, cuts)
    got, spread = run(cuda(checkpoint, kv_bits=8), IDS, cuts), expected.std()
    # A value at the border of two codes may fall to either side.
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.01 * spread


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_logits_have_the_same_bits_however_the_tokens_are_cut(kv_bits):
    checkpoint, n = TinyCheckpoint(5, context_length=512), 140
    whole = run(cuda(checkpoint, WeightPolicy("rtn"), kv_bits=kv_bits), IDS, [n])
    for cuts in ([70, *[1] * 20, *[10] * 5], [17, 64, 59]):
        b = cuda(checkpoint, WeightPolicy("rtn"), kv_bits=kv_bits)
        np.testing.assert_array_equal(run(b, IDS, cuts), whole)


# One of each family, with its oddities; the rest is slow.
FAMILIES = (
    "qwen2 window",
    "qwen3",
    "phi3 partial",
    "smollm3 window",
    "olmo2 mha",
    "granite tied",
    "gemma2 caps",
    "gemma3",
    "mixtral window",
    "qwen3moe dense layers",
)


@pytest.mark.parametrize(
    "case", [c if c in FAMILIES else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_every_family_is_the_references(case):
    cls, changes = CASES[case]
    checkpoint = FromTransformers(random_model(cls, **changes))
    cuts = (60, 1, 7, 1, 20)
    expected = run(truth(checkpoint), IDS, cuts)
    error = usual_error if checkpoint.config.n_experts else relative_error
    assert error(run(cuda(checkpoint), IDS, cuts), expected) < 5e-3


@pytest.mark.parametrize("case", ["mixtral", "qwen3moe"])
def test_experts_have_the_same_bits_however_the_tokens_are_cut(case):
    cls, changes = CASES[case]
    checkpoint = FromTransformers(random_model(cls, **changes))
    whole = run(cuda(checkpoint, WeightPolicy("rtn")), IDS, [89])
    got = run(cuda(checkpoint, WeightPolicy("rtn")), IDS, [33, 1, 1, 16, 17, 1, 20])
    np.testing.assert_array_equal(got, whole)


def test_too_many_experts_are_refused_by_name():
    checkpoint = TinyCheckpoint(experts=ExpertsConfig(2000, 2, 96))
    with pytest.raises(UnsupportedModelError, match="2000 experts in a layer; 1024 are the most"):
        cuda(checkpoint)


class Reordered(TinyCheckpoint):
    """4-bit weights whose inputs are permuted (GPTQ's desc_act), and some that are not."""

    def linear(self, name):
        w = super().linear(name)
        n, k = w.shape
        if "embed" in name or "q_proj" in name:
            return w
        rng = np.random.default_rng(len(name))
        q = random_linear(rng, "zeros", n, k, 32)
        perm = rng.permutation(k).astype(np.int32)
        return QuantizedLinear(q.codes, q.scales, zeros=q.zeros, perm=perm)


def test_permuted_inputs_are_put_in_order():
    checkpoint, cuts = Reordered(2), [20, 1, 3]
    expected = run(truth(checkpoint), IDS, cuts)
    assert relative_error(run(cuda(checkpoint), IDS, cuts), expected) < 5e-3


def test_biases_are_added_also_where_only_some_have_one():
    class Some(TinyCheckpoint):
        def linear(self, name):
            w = super().linear(name)
            bias = np.random.default_rng(len(name)).normal(size=w.shape[0]).astype(np.float32)
            return w if "k_proj" in name or "embed" in name else type(w)(w.weight, bias)

    checkpoint = Some(2)
    expected = run(truth(checkpoint), IDS, [20, 1])
    assert relative_error(run(cuda(checkpoint), IDS, [20, 1]), expected) < 5e-3


@needs_emulation
def test_a_whole_step_has_the_same_bits_with_warps_in_another_order(monkeypatch):
    checkpoint, cuts = TinyCheckpoint(6), [40, 1, 5]
    expected = run(cuda(checkpoint, kv_bits=8), IDS, cuts)
    monkeypatch.setenv("TINYCHAT_HOST_ORDER", "reverse")
    np.testing.assert_array_equal(run(cuda(checkpoint, kv_bits=8), IDS, cuts), expected)


@pytest.mark.slow
def test_the_demo_model_says_what_the_reference_says(demo_gguf):
    """Teacher-forced on real text, 128 rows at a time: 2,000 positions on a GPU. Under emulation 97 in two
    minutes, unless TINYCHAT_TEST_POSITIONS says more.
    """
    n = int(os.environ.get("TINYCHAT_TEST_POSITIONS", 2000 if ON_GPU else 97))
    checkpoint, root = open_checkpoint(demo_gguf), Path(__file__).parents[3]
    text = "".join((root / name).read_text() for name in ("README.md", "docs/design.md"))
    ids = np.array(checkpoint.tokenizer().encode(text)[:n], np.int32)
    backends = [
        ReferenceBackend(checkpoint),
        CudaBackend(checkpoint, modules=bench().modules),
    ]
    blocks = -(-n // BLOCK)
    table = np.arange(blocks, dtype=np.int32)
    for b in backends:
        b.allocate_kv(blocks)
    differ, squares, spread = [], [], []
    for at in [*range(0, n - 1, 128), n - 1]:  # the last alone: as it is decoded
        step = Step.of(ids[at : min(at + 128, max(n - 1, at + 1))], at, at, table, 0)
        expected, got = (b.step(step) for b in backends)
        rows = got.argmax(axis=1) != expected.argmax(axis=1)
        best = np.sort(expected[rows], axis=1)[:, -2:]
        differ.extend((best[:, 1] - best[:, 0]) / expected.std())
        squares.append(np.mean((got - expected) ** 2))
        spread.append(expected.var())
    print(f"{n - len(differ)} of {n} the same; margins of the others {np.round(differ, 4)}")
    assert len(differ) <= max(2, n // 100)
    assert (np.array(differ) < 0.02).all()  # where they differ, two were nearly alike
    assert np.sqrt(np.mean(squares) / np.mean(spread)) < 5e-3
