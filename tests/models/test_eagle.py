"""EAGLE-3 heads against their formula, written down in torch; what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import CASES, FromTransformers, logits_of, random_model, relative_error
from heads import Truth, as_speculators_have_it, head_settings, head_tensors, save_head
from memories import allocate, step_of

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.interface import Step
from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import CheckpointError, TinychatError, UnsupportedModelError
from tinychat.formats import open_checkpoint
from tinychat.formats.eagle import EagleHead, head_in
from tinychat.network.weight_policy import WeightPolicy

IDS = np.random.default_rng(2).integers(0, 258, 60).astype(np.int32)
TABLE = np.arange(8, dtype=np.int32)
K = 4
EXACT = WeightPolicy("none", 16)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))


def run(b, cuts):
    """Logits of all but the last of IDS, then those of K guessed rows."""
    allocate(b, 8)
    out, at = [], 0
    for n in cuts:
        out.append(b.step(step_of(b, IDS[at : at + n], at, at, TABLE, 0)))
        at += n
    guessed, token = [], IDS[-1]
    for i in range(K):
        (span,) = step_of(b, np.array([token], np.int32), at + i, at + i, TABLE, 0).spans
        guessed.append(b.step(Step((span,), further=True))[0])
        token = guessed[-1].argmax()
    return np.concatenate(out), np.stack(guessed)


def close(ours, theirs, tolerance):
    """Whether logits agree, and the same ids have none."""
    some = np.isfinite(theirs)
    np.testing.assert_array_equal(np.isfinite(ours), some)
    return relative_error(ours[some], theirs[some]) < tolerance


def target(case: str, **changes):
    """A transformers model, and the settings that its head must share with it."""
    cls, own = CASES[case]
    hf = random_model(cls, **(own | dict(num_hidden_layers=6) | changes))
    c = hf.config
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    shape = dict(heads=c.num_attention_heads, kv=c.num_key_value_heads, dim=dim, vocab=c.vocab_size)
    return hf, shape | dict(hidden=c.hidden_size)


@pytest.mark.parametrize(
    ("case", "changes", "taps"),
    [
        ("qwen2", {}, (2, 3, 3)),
        ("qwen2", dict(hidden_size=32, target_hidden_size=64), (2, 3, 3)),
        ("qwen3", dict(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 5]}), (1, 3, 6)),
        ("gpt-oss", dict(eagle_aux_hidden_state_layer_ids=[2, 3, 5]), (2, 3, 5)),
        ("mixtral", dict(eagle_aux_hidden_state_layer_ids=[0, 2, 4], norm_before_residual=True), (0, 2, 4)),
    ],
)
def test_guesses_are_those_of_the_formula(case, changes, taps, tmp_path):
    hf, shape = target(case)
    s = head_settings(**shape) | changes
    own = case == "qwen3" or s["hidden_size"] != hf.config.hidden_size
    tensors = head_tensors(s, hf.config.hidden_size, embedding=own)
    head = EagleHead(save_head(tmp_path / "head", s, tensors), s)
    checkpoint, theirs = FromTransformers(hf), Truth(hf, s, tensors).guesses(IDS, taps, K)
    whole = logits_of(hf, IDS[:-1])
    for cuts in ((59,), (20, 1, 1, 37)):
        logits, guesses = run(ReferenceBackend(checkpoint, EXACT, head=head), cuts)
        assert relative_error(logits, whole) < 1e-4
        assert close(guesses, theirs, 1e-4)
    cpu = CpuBackend(checkpoint, EXACT, threads=2, head=head)
    logits, guesses = run(cpu, (20, 1, 1, 37))
    if case not in ("mixtral", "gpt-oss"):  # fp16 keys may lead to other experts
        assert close(guesses, theirs, 3e-3)
    for again in run(cpu, (59,)), run(cpu, (1,) * 59):
        np.testing.assert_array_equal(again[0], logits)
        np.testing.assert_array_equal(again[1], guesses)
    plain = allocate(CpuBackend(checkpoint, EXACT, threads=2), 8)
    np.testing.assert_array_equal(plain.step(step_of(plain, IDS[:-1], 0, 0, TABLE, 0)), logits)
    (span,) = step_of(cpu, IDS[-1:], 59, 59, TABLE, 0).spans
    assert cpu.step_greedy(Step((span,), further=True)) == [guesses[0].argmax()]


def test_a_head_of_vllms_layout_is_the_same_head(tmp_path):
    hf, shape = target("qwen2")
    s = head_settings(**shape, norm_before_residual=True)
    tensors = head_tensors(s, hf.config.hidden_size)
    theirs, named = as_speculators_have_it(s, tensors, [1, 3, 6])
    save_head(tmp_path / "head", theirs, named)
    logits = run(ReferenceBackend(FromTransformers(hf), EXACT, head=head_in(tmp_path / "head")), (59,))[1]
    assert close(logits, Truth(hf, s, tensors).guesses(IDS, (1, 3, 6), K), 1e-4)


DAMAGES = {
    "a hidden size": (dict(target_hidden_size=128), None, "hidden size"),
    "a vocabulary": (dict(vocab_size=300), None, "vocabulary"),
    "layers out of range": (dict(eagle_aux_hidden_state_layer_ids=[1, 2, 7]), None, "layers"),
    "two layers": (dict(eagle_aux_hidden_state_layer_ids=[1, 2]), None, "layers"),
    "KV heads": (dict(num_key_value_heads=1), None, "KV heads"),
    "blocks": (dict(num_hidden_layers=2), None, "num_hidden_layers"),
    "biases": (dict(attention_bias=True), None, "attention_bias"),
    "a window": (dict(sliding_window=32), None, "window"),
    "no fused states": (dict(eagle_config={"use_aux_hidden_state": False}), None, "use_aux_hidden_state"),
    "EAGLE-1": (dict(architectures=["LlamaForCausalLMEagle"]), None, "EAGLE-1"),
    "another speculator": (dict(speculators_model_type="mlp"), None, "mlp"),
    "codes": (dict(quantization_config={"quant_method": "fp8"}), None, "quantized"),
    "no fc": ({}, lambda t: t.pop("fc.weight"), "fc.weight"),
    "no d2t": ({}, lambda t: t.pop("d2t"), "d2t"),
    "a d2t beyond": ({}, lambda t: t["d2t"].add_(258), "d2t"),
    "a d2t below": ({}, lambda t: t["d2t"].sub_(200), "d2t"),
    "a token twice": ({}, lambda t: t.update(d2t=-torch.arange(120)), "d2t"),
    "a short d2t": ({}, lambda t: t.update(d2t=t["d2t"][:100]), "d2t"),
    "a d2t of halves": ({}, lambda t: t.update(d2t=t["d2t"].half()), "d2t"),
    "a norm before fc": ({}, lambda t: t.update({"fc_norm.weight": torch.ones(192)}), "fc_norm"),
    "a wide fc": ({}, lambda t: t.update({"fc.weight": torch.ones(64, 256)}), "shape"),
    "settings of another kind": (dict(intermediate_size="large"), None, "large"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_for_this_model_or_not_whole_is_refused_in_words(damage, tmp_path):
    changes, harm, word = DAMAGES[damage]
    s = head_settings(**changes)
    tensors = head_tensors(head_settings())
    if harm is not None:
        harm(tensors)
    save_head(tmp_path / "head", s, tensors)
    model = FromTransformers(target("qwen2")[0]).config
    with pytest.raises((CheckpointError, UnsupportedModelError)) as e:
        head_in(tmp_path / "head").onto(model)
    assert word in e.value.what


def test_a_family_whose_residual_is_in_other_units_is_refused(tmp_path):
    s = head_settings()
    head = EagleHead(save_head(tmp_path / "head", s, head_tensors(s)), s)
    with pytest.raises(UnsupportedModelError, match="granite"):
        head.onto(FromTransformers(random_model(*CASES["granite"][:1], **CASES["granite"][1])).config)


def test_a_head_is_no_model_and_a_model_is_no_head(tmp_path):
    s = head_settings()
    save_head(tmp_path / "head", s, head_tensors(s))
    with pytest.raises(TinychatError, match="--draft"):
        open_checkpoint(tmp_path / "head")
    (tmp_path / "head" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert head_in(tmp_path / "head") is None
    assert head_in(tmp_path / "nowhere") is None
