"""Layers that attend to keys and values of others: their memory, votes, 4 bits, files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import recurrent
from families import CASES, FromTransformers, logits_of, random_config, random_model, relative_error
from memories import allocate, step_of
from recurrent import RecurrentCheckpoint, shared_model
from safetensors.numpy import load_file, save_file

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.cpu_pack import KERNELS
from tinychat.backends.interface import Slots, Span, Step, memories_of
from tinychat.backends.plan import plan
from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.formats.hf import HFCheckpoint, read_config
from tinychat.network.weight_policy import WeightPolicy
from tinychat.quantize.forward import network

IDS = np.random.default_rng(1).integers(0, 258, 100).astype(np.int32)
TABLE = np.arange(8, dtype=np.int32)
PLAIN = WeightPolicy("none", 16)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))


def checkpoint():
    return RecurrentCheckpoint("gemma4", layer_inputs=32, layer_vocab=258)


def test_layers_without_keys_of_their_own_own_no_memory():
    assert [(spec.kind, spec.layers) for spec in memories_of(checkpoint().config)] == [
        ("paged", (1,)),
        ("window", (0, 2)),
    ]


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend])
def test_every_layer_that_reads_a_slot_votes_for_it(backend):
    b = allocate(backend(checkpoint(), PLAIN), 8)
    scores = np.zeros((10, 1, 2, 64), np.float32)
    slots = Slots(TABLE, 0, scores, 10), Slots(TABLE, 0)
    b.step(Step((Span(IDS[:50], 0, 50, slots),)))
    # two heads of queries for each of keys, in the layer that has these and in the one that reads them
    np.testing.assert_allclose(scores.sum(-1), 4.0, rtol=1e-5)
    assert not scores[..., 50:].any()


def test_votes_are_those_of_the_reference():
    found = []
    for backend in (ReferenceBackend, CpuBackend):
        b = allocate(backend(checkpoint(), PLAIN, kv_bits=16), 8)
        scores = np.zeros((4, 1, 2, 64), np.float32)
        b.step(Step((Span(IDS[:50], 0, 50, (Slots(TABLE, 0, scores, 4), Slots(TABLE, 0))),)))
        found.append(scores)
    assert relative_error(found[1], found[0]) < 1e-3


@pytest.mark.parametrize("kv_bits", [4, 8])
def test_any_cut_of_a_prompt_gives_the_same_answer_in_few_bits(kv_bits, monkeypatch):
    def answer(rows):
        model = shared_model(kv_bits=kv_bits)
        model.engine.backend.max_rows = rows
        (*_, done) = model.generate([int(i) for i in IDS], temperature=0, max_tokens=20)
        model.close()
        return done.completion.token_ids

    assert answer(512) == answer(1) == answer(37)


def test_in_4_bits_every_layer_reads_what_the_reference_reads(monkeypatch):
    def logits():
        model = shared_model(kv_bits=4)
        branch = model.engine.branch()
        rows = [
            model.engine.run(branch, IDS[a : a + n].tolist(), n - 1)[-1]
            for a, n in ((0, 70), (70, 1), (71, 20))
        ]
        model.close()
        return np.array(rows)

    ours = logits()
    monkeypatch.setattr(
        recurrent,
        "CpuBackend",
        lambda checkpoint, policy, threads, kv_bits, **_: ReferenceBackend(
            checkpoint, policy, threads, kv_bits
        ),
    )
    assert relative_error(ours, logits()) < 1e-3


def test_an_answer_goes_on_beyond_a_budget_the_same_with_drafts():
    answers = []
    for draft in ("none", "ngram"):
        model = shared_model(ctx=512)
        session = model.session(kv_policy="h2o", kv_budget=128, temperature=0, max_tokens=120, draft=draft)
        list(session.send("a b c " * 20))
        assert session.nodes[session.leaf].ids
        answers.append(session.nodes[session.leaf].ids)
        model.close()
    assert answers[0] == answers[1]


def folder(tmp_path, case="gemma4"):
    """The model's folder, as published ones are: with linears of keys that nobody uses."""
    hf = random_model(CASES[case][0], **CASES[case][1])
    hf.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    kept = [name for name in weights if name.startswith("model.layers.0.self_attn.")]
    unused = {name.replace(".0.", ".2.", 1): a * 9 for name in kept for a in [weights[name]]}
    save_file({**unused, **weights}, file, metadata={"format": "pt"})
    return hf, tmp_path / "model"


def test_linears_of_keys_that_are_not_used_are_not_read(tmp_path):
    hf, path = folder(tmp_path)
    b = allocate(ReferenceBackend(HFCheckpoint(path), PLAIN), 8)
    assert relative_error(b.step(step_of(b, IDS, 0, 0, TABLE, 0)), logits_of(hf, IDS)) < 1e-4


def test_a_token_reads_a_row_of_the_embedding_for_each_layer(tmp_path):
    _, path = folder(tmp_path)
    found = list(plan(HFCheckpoint(path), WeightPolicy("rtn"), KERNELS))
    tables = [w for w in found if w.kind == "embedding"]
    assert [(w.shape, w.share) for w in tables] == [((258, 64), 1.0), ((258, 4 * 32), 0.0)]
    whole = sum(w.shape[0] * w.shape[1] for w in found)
    counted = sum(p.numel() for p in random_model(*[CASES["gemma4"][0]], **CASES["gemma4"][1]).parameters())
    assert 0 < counted - whole < 5000  # the norms


def test_quantizers_and_strange_settings_are_refused_in_words():
    cls, changes = CASES["gemma4"]
    given = random_config(cls, **changes)
    with pytest.raises(UnsupportedModelError, match="embedding for each layer"):
        network(read_config(given))
    for setting, value, error in (
        ("use_bidirectional_attention", "all", UnsupportedModelError),
        ("per_layer_config", {"1": {"num_attention_heads": 8}}, UnsupportedModelError),
        ("rope_parameters", {"full_attention": {"rope_type": "axial"}, "sliding_attention": {}}, Exception),
        ("num_kv_shared_layers", 4, CheckpointError),
        ("num_kv_shared_layers", 3, CheckpointError),
        ("num_kv_shared_layers", -1, CheckpointError),
        ("hidden_size_per_layer_input", 1 << 30, CheckpointError),
        ("vocab_size_per_layer_input", 0, CheckpointError),
        ("layer_types", ["sliding_attention"], CheckpointError),
    ):
        with pytest.raises(error) as e:
            read_config(json.loads(json.dumps({**given, setting: value})))
        assert len(str(e.value).splitlines()) == 2, setting


def test_another_stream_and_strange_sizes_of_gemma_3n_are_refused_in_words():
    cls, changes = CASES["gemma3n sparse"]
    given = random_config(cls, **changes)
    with pytest.raises(UnsupportedModelError, match="embedding for each layer"):
        network(read_config(given))
    for setting, value, error in (
        ("altup_active_idx", 1, UnsupportedModelError),
        ("altup_correct_scale", False, UnsupportedModelError),
        ("intermediate_size", [128], CheckpointError),
        ("intermediate_size", [], CheckpointError),
        ("activation_sparsity_pattern", [0.5], CheckpointError),
        ("activation_sparsity_pattern", [1.0] * 4, CheckpointError),
        ("activation_sparsity_pattern", "none", CheckpointError),
        ("altup_num_inputs", 99, CheckpointError),
        ("laurel_rank", 0, CheckpointError),
    ):
        with pytest.raises(error) as e:
            read_config(json.loads(json.dumps({**given, setting: value})))
        assert len(str(e.value).splitlines()) == 2, setting


def test_a_folder_of_a_model_without_keys_is_quantized(tmp_path):
    assert (
        len(
            network(
                FromTransformers(random_model(CASES["gemma4 tied"][0], **CASES["gemma4 tied"][1])).config
            ).blocks
        )
        == 3
    )
