"""The CPU backend against the torch reference; its packs; and that torch is never imported."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from backend_steps import BLOCKS, IDS, TABLE, cpu, run
from tiny import TinyCheckpoint

from tinychat.backends import pack_check
from tinychat.backends import pack_file as packs
from tinychat.backends.cpu import CpuBackend
from tinychat.backends.cpu_pack import CpuLayout
from tinychat.backends.interface import Step
from tinychat.backends.pack_store import Packer
from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import TinychatError, UsageError
from tinychat.kernels_cpu import _native
from tinychat.models import FAMILIES
from tinychat.network.config import RopeConfig
from tinychat.network.weight_policy import WeightPolicy

ISAS = _native.isas()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    monkeypatch.delenv("TINYCHAT_ISA", raising=False)
    return tmp_path


SHAPES = {
    "tied": {},
    "untied": dict(tie_embeddings=False),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "odd": dict(
        hidden_size=96, n_heads=6, n_kv_heads=3, head_dim=24, rope=RopeConfig(dim=24), intermediate_size=160
    ),
    "dense widths": dict(hidden_size=40, n_heads=2, n_kv_heads=1, head_dim=20, rope=RopeConfig(dim=20)),
    "scaled rope": dict(
        rope=RopeConfig(dim=16, kind="llama3", factor=8.0, original_context=64, low_freq_factor=1.0)
    ),
}


@pytest.mark.parametrize("quantize", ["auto", "rtn", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_references(shape, quantize):
    checkpoint, policy = TinyCheckpoint(3, **SHAPES[shape]), WeightPolicy(quantize)
    reference = ReferenceBackend(checkpoint, policy)
    reference.allocate_kv(BLOCKS)
    cuts = [40, 1, 1, 5, 33]
    expected = run(reference, IDS, cuts)
    got = run(cpu(checkpoint, policy, act_bits=16), IDS, cuts)
    spread = expected.std()
    # fp16 keys and values and 16-bit activations against fp32 everywhere
    assert np.abs(got - expected).max() < 0.03 * spread
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.002 * spread
    coarse = run(cpu(checkpoint, policy, act_bits=8), IDS, cuts)
    assert np.abs(coarse - expected).max() < 0.5 * spread
    assert np.sqrt(np.mean((coarse - expected) ** 2)) < 0.05 * spread


@pytest.mark.parametrize("act_bits", [8, 16])
def test_every_isa_gives_the_same_bits(act_bits, monkeypatch):
    results = []
    for isa in ISAS:
        monkeypatch.setenv("TINYCHAT_ISA", isa)
        b = cpu(TinyCheckpoint(4), WeightPolicy("rtn"), act_bits=act_bits)
        assert b.describe()["isa"] == isa
        results.append(run(b, IDS, [50, 1, 3]))
    for r in results[1:]:
        np.testing.assert_array_equal(r, results[0])


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("quantize", ["auto", "rtn", "none"])
def test_logits_have_the_same_bits_however_the_tokens_are_cut(quantize, act_bits):
    checkpoint, n = TinyCheckpoint(5, context_length=512), 280
    whole = run(cpu(checkpoint, WeightPolicy(quantize), act_bits=act_bits), IDS, [n])
    for cuts in ([1] * n, [7] * 40, [64, 64, 64, 88], [16] * 17 + [8], [279, 1]):
        b = cpu(checkpoint, WeightPolicy(quantize), act_bits=act_bits, threads=3)
        np.testing.assert_array_equal(run(b, IDS, cuts), whole)


def test_unknown_settings_and_wrong_steps_are_errors(monkeypatch):
    with pytest.raises(UsageError):
        CpuBackend(TinyCheckpoint(0), act_bits=4)
    with pytest.raises(UsageError):
        CpuBackend(TinyCheckpoint(0), kv_bits=2)
    monkeypatch.setenv("TINYCHAT_ISA", "altivec")
    with pytest.raises(UsageError, match="altivec") as e:
        CpuBackend(TinyCheckpoint(0))
    assert "scalar" in e.value.todo
    monkeypatch.delenv("TINYCHAT_ISA")
    b = cpu(TinyCheckpoint(0))
    with pytest.raises(ValueError, match="vocabulary"):
        b.step(Step.of(np.array([258], np.int32), 0, 0, TABLE, 0))
    with pytest.raises(ValueError, match="cover"):
        b.step(Step.of(IDS[:20], 0, 0, TABLE[:1], 0))
    b.close()
    b.close()
    with pytest.raises(TinychatError):
        b.step(Step.of(IDS[:1], 0, 0, TABLE, 0))


def pack_file(home):
    (file,) = (home / "packs").glob("*")
    return file


def test_verify_names_the_module_with_a_flipped_bit(home):
    cpu(TinyCheckpoint(1))
    file = pack_file(home)
    assert pack_check.verify(file) == []
    bytes_ = bytearray(file.read_bytes())
    bytes_[packs.PAGE + 10] ^= 4  # the first module behind the header
    file.write_bytes(bytes_)
    assert pack_check.verify(file) == ["model.embed_tokens"]


def test_a_home_that_cannot_be_made_is_a_warning_and_the_model_answers(home, monkeypatch):
    expected = run(cpu(TinyCheckpoint(1)), IDS, [9])
    blocker = home / "file"
    blocker.write_text("")
    monkeypatch.setenv("TINYCHAT_HOME", str(blocker))
    with pytest.warns(RuntimeWarning, match="could not be kept"):
        got = run(cpu(TinyCheckpoint(1)), IDS, [9])
    np.testing.assert_array_equal(got, expected)


def test_what_a_killed_process_left_is_removed(home):
    (home / "packs").mkdir()
    left = home / "packs" / "abc.999999999.partial"
    left.write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu(TinyCheckpoint(1))
    assert not left.exists()


def test_packs_are_streamed_not_collected():
    checkpoint, alive, most = TinyCheckpoint(1), [0], [0]

    class Counting(packs.FileSink):
        def put(self, a):
            alive[0] = a.nbytes
            most[0] = max(most[0], alive[0])
            return super().put(a)

    total = 0
    with open(os.devnull, "wb") as sink:
        packer = Packer(checkpoint, WeightPolicy(), CpuLayout(), Counting(sink, "a.pack"))
        FAMILIES["llama"].load(packer, checkpoint.config)
        total = packer.sink.at
    assert most[0] < total / 2


def test_torch_is_never_imported(home):
    code = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1])\n"
        "from tiny import TinyCheckpoint\n"
        "from tinychat.backends.interface import Step\n"
        "from tinychat.backends.cpu import CpuBackend\n"
        "b = CpuBackend(TinyCheckpoint(0)); b.allocate_kv(4)\n"
        "b.step(Step.of(np.arange(9, dtype=np.int32), 0, 0, np.arange(4, dtype=np.int32), 0))\n"
        "heavy = {'torch', 'transformers', 'textual', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    tests = os.path.join(os.path.dirname(__file__), "..", "support")
    subprocess.run([sys.executable, "-c", code, tests], check=True, env=os.environ)
