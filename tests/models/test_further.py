"""The layer that predicts further against transformers' own modules, put together as llama.cpp has it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from families import logits_of, relative_error
from family_gguf import write
from gguf import GGUFWriter
from memories import allocate, step_of
from mtp import guesses, model_with_mtp, save_with_mtp

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.interface import Step
from tinychat.backends.reference import ReferenceBackend
from tinychat.formats.gguf import GGUFCheckpoint
from tinychat.formats.hf import HFCheckpoint
from tinychat.network import further
from tinychat.network.weight_policy import WeightPolicy

IDS = np.random.default_rng(2).integers(0, 258, 60).astype(np.int32)
TABLE = np.arange(8, dtype=np.int32)
K = 4
CASES = ("qwen3.5", "qwen3.5moe", "qwen3next", "qwen3.5 listed")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))


def run(b, cuts):
    """Logits of all but the last of IDS, then those of K drafted rows."""
    allocate(b, 8)
    out, at = [], 0
    for n in cuts:
        out.append(b.step(step_of(b, IDS[at : at + n], at, at, TABLE, 0)))
        at += n
    further, token = [], IDS[-1]
    for i in range(K):
        (span,) = step_of(b, np.array([token], np.int32), at + i, at + i, TABLE, 0).spans
        further.append(b.step(Step((span,), further=True))[0])
        token = further[-1].argmax()
    return np.concatenate(out), np.stack(further)


@pytest.mark.parametrize("case", CASES)
def test_drafts_are_those_of_transformers_modules(case, tmp_path):
    hf, mtp = model_with_mtp(case)
    save_with_mtp(tmp_path / "m", hf, mtp)
    checkpoint, policy = HFCheckpoint(tmp_path / "m"), WeightPolicy("none", 16)
    assert checkpoint.config.further is not None
    theirs, whole = guesses(hf, mtp, IDS, K), logits_of(hf, IDS[:-1])
    for cuts in ((59,), (20, 1, 1, 37)):
        logits, drafts = run(ReferenceBackend(checkpoint, policy, predicts=True), cuts)
        assert relative_error(logits, whole) < 1e-4
        assert relative_error(drafts, theirs) < 1e-4
    without = ReferenceBackend(checkpoint, policy)
    assert not without.predicts


class WithLayer:
    """A transformers model with the layer as llama.cpp's converter counts it: one more of its own."""

    def __init__(self, hf, mtp):
        self.config, n = copy.copy(hf.config), hf.config.num_hidden_layers
        self.config.num_hidden_layers, self.config.layer_types = (
            n + 1,
            [*hf.config.layer_types, "full_attention"],
        )
        own = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm"}
        own["norm"] = "shared_head_norm"
        self.tensors = dict(hf.state_dict())
        for name, t in mtp.state_dict().items():
            if name.startswith("layers.0."):
                self.tensors[f"model.layers.{n}.{name.removeprefix('layers.0.')}"] = t
            else:
                self.tensors[f"blk.{n}.nextn.{own[name.removesuffix('.weight')]}.weight"] = t

    def state_dict(self):
        return self.tensors


@pytest.mark.parametrize(("case", "arch"), [("qwen3.5", "qwen35"), ("qwen3next", "qwen3next")])
def test_drafts_of_a_gguf_are_those_of_transformers_modules(case, arch, tmp_path, monkeypatch):
    hf, mtp = model_with_mtp(case)
    model = GGUFWriter.add_tokenizer_model

    def and_one_layer(w, name):
        w.add_uint32(f"{arch}.nextn_predict_layers", 1)
        model(w, name)

    monkeypatch.setattr(GGUFWriter, "add_tokenizer_model", and_one_layer)
    write(tmp_path / "m.gguf", WithLayer(hf, mtp), arch)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert checkpoint.config.n_layers == hf.config.num_hidden_layers
    assert checkpoint.config.further is not None
    backend = ReferenceBackend(checkpoint, WeightPolicy("none", 16), predicts=True)
    logits, drafts = run(backend, (59,))
    assert relative_error(logits, logits_of(hf, IDS[:-1])) < 1e-4
    assert relative_error(drafts, guesses(hf, mtp, IDS, K)) < 1e-4


@pytest.mark.parametrize("damage", ["fc", "a second layer", "a head of its own"])
def test_a_layer_that_is_not_all_there_or_of_another_kind_is_read_over(damage, tmp_path):
    hf, mtp = model_with_mtp("qwen3.5")
    save_with_mtp(tmp_path / "m", hf, mtp, damage)
    checkpoint = HFCheckpoint(tmp_path / "m")
    checkpoint.check_complete()
    assert checkpoint.config.further is None


@pytest.mark.parametrize("case", ["qwen3.5", "qwen3next"])
def test_the_cpu_drafts_as_the_reference_and_its_text_has_the_same_bits(case, tmp_path):
    hf, mtp = model_with_mtp(case)
    save_with_mtp(tmp_path / "m", hf, mtp)
    checkpoint, policy = HFCheckpoint(tmp_path / "m"), WeightPolicy("none", 16)
    expected = run(ReferenceBackend(checkpoint, policy, kv_bits=16, predicts=True), (59,))
    cpu = CpuBackend(checkpoint, policy, threads=2, predicts=True)
    logits, drafts = run(cpu, (20, 1, 1, 37))
    assert relative_error(logits, expected[0]) < 3e-3
    assert relative_error(drafts, expected[1]) < 3e-3
    for again in run(cpu, (59,)), run(cpu, (1,) * 59):
        np.testing.assert_array_equal(again[0], logits)
        np.testing.assert_array_equal(again[1], drafts)
    plain = allocate(CpuBackend(checkpoint, policy, threads=2), 8)
    np.testing.assert_array_equal(plain.step(step_of(plain, IDS[:-1], 0, 0, TABLE, 0)), logits)


@pytest.mark.parametrize("backend", [CpuBackend, ReferenceBackend])
def test_few_ids_have_the_same_logits_and_others_none(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(further, "FEW", 64)
    hf, mtp = model_with_mtp("qwen3.5")
    save_with_mtp(tmp_path / "m", hf, mtp)
    b = backend(HFCheckpoint(tmp_path / "m"), WeightPolicy("none", 16), threads=1, predicts=True)
    run(b, (59,))
    (span,) = step_of(b, IDS[-1:], 59, 59, TABLE, 0).spans
    whole, few = (b.step(Step((span,), further=True, few=few)) for few in (False, True))
    np.testing.assert_array_equal(few[:, :64], whole[:, :64])
    assert np.isneginf(few[:, 64:]).all()
    assert b.step_greedy(Step((span,), further=True, few=True)) == whole[:, :64].argmax()
