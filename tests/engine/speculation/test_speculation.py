"""Speculation never changes the answer: against plain decoding, and against the target's own distribution."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_tokenizer, tiny_folder, tiny_model

import tinychat
from tinychat.base.errors import UsageError
from tinychat.base.events import Done, Notice, TextDelta
from tinychat.engine.sampling import SamplingParams, candidates
from tinychat.engine.speculation import Draft
from tinychat.engine.speculation.acceptance import rejection
from tinychat.engine.speculation.control import Controller
from tinychat.engine.speculation.draft_model import DraftModel, check_vocabulary
from tinychat.engine.speculation.lookup import PromptLookup
from tinychat.engine.speculation.speculator import Speculator


class Scripted:
    """Guesses the true continuation, wrong at random."""

    name, slow = "scripted", False

    def __init__(self, truth: list[int], n_prompt: int, right: float, seed: int = 0):
        self.truth, self.n_prompt, self.right = truth, n_prompt, right
        self.rng = np.random.default_rng(seed)

    def begin(self, context, branch):
        pass

    def propose(self, context, k, params, seed, guide=None):
        at = len(context) - self.n_prompt
        guess = self.truth[at : at + k]
        return Draft([t if self.rng.random() < self.right else (t + 1) % 256 for t in guess])


@pytest.fixture(scope="module")
def model():
    with tiny_model(backend="cpu") as m:
        yield m


PROMPTS = ["a b a b a b a b a b", "наука 科学 🙂"]


def run(model, prompt, speculator, params):
    """(ids, Done, ids in the cache) of one generation on a branch of its own."""
    branch = model.engine.branch()
    ids = model.tokenizer.encode(prompt)
    events = list(model.engine.generate(branch, ids, params, speculator=speculator))
    tokens = [e.token_id for e in events if isinstance(e, TextDelta) and e.token_id is not None]
    assert isinstance(events[-1], Done)
    return tokens, events[-1], list(branch.ids)


SETTINGS = [
    SamplingParams(temperature=0, max_tokens=40),
    SamplingParams(temperature=0.9, top_k=0, top_p=1, min_p=0, seed=3, max_tokens=40),
    SamplingParams(
        temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repeat_penalty=1.2, seed=4, max_tokens=40
    ),
    SamplingParams(temperature=0, repeat_penalty=1.3, max_tokens=40),
    SamplingParams(temperature=0, presence_penalty=0.3, frequency_penalty=0.4, max_tokens=40),
    SamplingParams(
        presence_penalty=-0.5, frequency_penalty=1, logit_bias={70: 3, 71: -9}, seed=5, max_tokens=40
    ),
]


@pytest.mark.parametrize("params", SETTINGS)
@pytest.mark.parametrize("right", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_answer_is_the_same_with_any_draft(model, params, right, k):
    for prompt in PROMPTS:
        plain, done, _ = run(model, prompt, None, params)
        n = len(model.tokenizer.encode(prompt))
        speculator = Speculator(Scripted(plain, n, right), Controller(fixed=k))
        drafted, done2, cached = run(model, prompt, speculator, params)
        assert drafted == plain
        assert done2.finish_reason == done.finish_reason
        sequence = model.tokenizer.encode(prompt) + plain
        assert cached == sequence[: len(cached)], "a rejected draft stayed in the cache"
        if right == 1.0 and len(plain) > k + 1:
            assert done2.stats.accepted_tokens >= done2.stats.drafted_tokens - k
        if right == 0.0:
            assert done2.stats.accepted_tokens == 0
            assert done2.stats.drafted_tokens > 0


@pytest.mark.parametrize("params", SETTINGS)
def test_the_answer_is_the_same_with_prompt_lookup_and_a_draft_model(model, params):
    with tiny_model(seed=1, backend="cpu") as other, tiny_model(backend="cpu") as twin:
        drafters = [PromptLookup(), DraftModel(other.engine), DraftModel(twin.engine)]
        for prompt in PROMPTS:
            plain, _, _ = run(model, prompt, None, params)
            for drafter in drafters:
                drafted, done, _ = run(model, prompt, Speculator(drafter, Controller(fixed=4)), params)
                assert drafted == plain, drafter.name
            # The last drafter is the target itself: whatever it guesses is right, by any setting.
            assert done.stats.accepted_tokens >= done.stats.drafted_tokens - 4


def test_stop_strings_and_limits_end_the_answer_at_the_same_place(model):
    base = SamplingParams(temperature=0, max_tokens=40)
    plain, done, _ = run(model, PROMPTS[0], None, base)
    n = len(PROMPTS[0])
    text = done.completion.text
    for cut in (3, 7, 11):
        params = base.but(stop=(text[cut : cut + 2],))
        expected = run(model, PROMPTS[0], None, params)[1]
        got = run(model, PROMPTS[0], Speculator(Scripted(plain, n, 0.8), Controller(fixed=6)), params)[1]
        assert (got.completion.text, got.finish_reason) == (expected.completion.text, expected.finish_reason)
        assert got.completion.token_ids == expected.completion.token_ids
    for limit in (0, 1, 2, 5, 13):
        params = base.but(max_tokens=limit)
        got = run(model, PROMPTS[0], Speculator(Scripted(plain, n, 1.0), Controller(fixed=8)), params)
        assert got[0] == plain[:limit]
        assert got[1].finish_reason == "length"


def test_a_window_never_passes_the_end_of_the_context():
    with tiny_model(ctx=48, backend="cpu") as model:
        params = SamplingParams(temperature=0)
        plain, done, _ = run(model, "abcdefghij", None, params)
        drafted = run(model, "abcdefghij", Speculator(Scripted(plain, 10, 1.0), Controller(fixed=7)), params)
        assert drafted[0] == plain
        assert drafted[1].finish_reason == done.finish_reason == "context_full"
        assert len(plain) == 48 - 10 + 1


def test_rejection_sampling_has_the_targets_distribution():
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, 12).astype(np.float32)
    params = SamplingParams(temperature=0.8, top_k=8, top_p=0.95, min_p=0)
    ids, p = candidates(logits, params)
    q_ids, q_p = candidates(rng.normal(0, 2, 12).astype(np.float32), params)
    n = 10_000
    for q in ((q_ids, q_p), None):
        counts = np.zeros(12)
        for position in range(n):
            drafted = int(rng.choice(q_ids, p=q_p)) if q is not None else int(q_ids[0])
            counts[rejection(logits, drafted, q, params, 11, position, None)] += 1
        expected = np.zeros(12)
        expected[ids] = p * n
        assert counts[expected == 0].sum() == 0
        chi2 = ((counts - expected)[ids] ** 2 / expected[ids]).sum()
        assert chi2 < 30, (chi2, len(ids) - 1)  # p < 0.0002 for 7 degrees of freedom


def test_rejection_accepts_everything_when_the_draft_is_the_target():
    logits = np.random.default_rng(0).normal(0, 1, 30).astype(np.float32)
    params = SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0)
    ids, p = candidates(logits, params)
    for position in range(500):
        drafted = int(ids[position % len(ids)])
        assert rejection(logits, drafted, (ids, p), params, 1, position, None) == drafted


def test_lookup_continues_the_latest_longest_match():
    drafter = PromptLookup()
    params = SamplingParams()
    context = [1, 2, 3, 9, 9, 1, 2, 3, 7, 7, 5, 1, 2, 3]
    drafter.begin(context, None)
    assert drafter.propose(context, 3, params, 0).tokens == [7, 7, 5]
    assert drafter.propose([*context, 9], 2, params, 0).tokens == [9, 1]  # now 2 3 9 matches best
    drafter.begin([5, 6, 5, 6], None)
    assert drafter.propose([5, 6, 5, 6], 5, params, 0).tokens == [5, 6, 5, 6, 5]  # a loop goes on
    assert drafter.propose([5, 6, 5, 6, 8], 5, params, 0).tokens == []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 12))
def test_lookup_guesses_what_its_definition_says(context, k):
    expected = []
    for n in range(min(PromptLookup.MAX, len(context)), PromptLookup.MIN - 1, -1):
        earlier = [i for i in range(n, len(context)) if context[i - n : i] == context[-n:]]
        if earlier:
            followed = context[earlier[-1] :]
            expected = [followed[i % len(followed)] for i in range(k)]
            break
    assert PromptLookup().propose(array("i", context), k, SamplingParams(), 0).tokens == expected


def test_lookup_forgets_what_is_far_behind():
    drafter, far = PromptLookup(), [1, 2, 3]
    assert drafter.propose([*far, *[0] * 100, 1, 2], 1, SamplingParams(), 0).tokens == [3]
    assert drafter.propose([*far, *[0] * drafter.WITHIN, 1, 2], 1, SamplingParams(), 0).tokens == []


def test_the_controller_drafts_when_it_pays_and_stops_when_it_does_not():
    good = Controller()
    good.note(0, 0, 0, 1.0)
    for _ in range(50):
        k = good.choose(8)
        good.note(k, k, 0.01 * k, 1.0 + 0.02 * k)
    assert good.choose(8) == 8
    assert good.choose(3) == 3
    bad = Controller()
    spent = plain = 0.0
    for _ in range(2000):
        k = bad.choose(8)
        cost = 1.0 + 0.5 * k
        bad.note(k, 0, 0.3 * k, cost)
        spent += cost + 0.3 * k
        plain += 1.0
    assert spent / plain < 1.03
    assert Controller(fixed=4).choose(8) == 4


def test_a_draft_with_other_tokens_is_refused_by_name():
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from tinychat.text.tokenizer import Tokenizer

    check_vocabulary(byte_tokenizer(), byte_tokenizer())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    other = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    other.decoder = decoders.ByteLevel()
    with pytest.raises(UsageError, match="differs from the model's in"):
        check_vocabulary(byte_tokenizer(), Tokenizer(other))


class Failing:
    """Works for a while, then does not."""

    name, slow = "fragile", False

    def begin(self, context, branch):
        pass

    def propose(self, context, k, params, seed, guide=None):
        if len(context) > 12:
            raise RuntimeError("out of memory")
        return Draft([1] * k)


@pytest.mark.parametrize("sizes", [(258, 300), (300, 258)])
def test_tokens_that_only_one_of_the_two_models_has_are_not_drafted(sizes):
    """Vocabularies may differ at their ends, by padding or a marker."""
    target, other = (tiny_model(seed=i, vocab_size=n) for i, n in enumerate(sizes))
    vocab = min(sizes)
    for params in (dict(temperature=0), dict(temperature=2.0, top_k=0, seed=3)):
        prompt = [5, 6, max(sizes) - 1 if sizes[0] > vocab else 7, 8]
        plain = list(target.generate(prompt, max_tokens=40, draft="none", **params))
        drafts = Speculator(DraftModel(other.engine, vocab=vocab), Controller(3))
        events = target.engine.generate(
            target.engine.branch(),
            prompt,
            target.default_sampling.but(max_tokens=40, **params),
            speculator=drafts,
        )
        got = [e.token_id for e in events if isinstance(e, TextDelta)]
        assert got == [e.token_id for e in plain if isinstance(e, TextDelta)]


def test_a_draft_that_fails_in_mid_answer_is_dropped_with_a_notice(model):
    params = SamplingParams(temperature=0, max_tokens=30)
    plain, _, _ = run(model, "abcdefgh", None, params)
    speculator = Speculator(Failing(), Controller(fixed=3))
    ids = model.tokenizer.encode("abcdefgh")
    events = list(model.engine.generate(model.engine.branch(), ids, params, speculator=speculator))
    assert [e.token_id for e in events if isinstance(e, TextDelta) and e.token_id is not None] == plain
    notices = [e.message for e in events if isinstance(e, Notice)]
    assert notices == ["The draft fragile is dropped: RuntimeError: out of memory"]


def test_a_missing_draft_is_a_notice_and_the_chat_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    session = model.session(draft="no-such-model", temperature=0, max_tokens=5)
    events = list(session.send("hello"))
    assert any(isinstance(e, Notice) and "no-such-model" in e.message for e in events)
    assert events[-1].stats.generated_tokens == 5


def test_layers_of_the_model_itself_can_draft(model):
    for layers, right in (("layers:0-1", True), ("layers:0", False)):
        session = model.session(draft=layers, temperature=0, max_tokens=30)
        session.speculator.controller.fixed = 4
        stats = list(session.send("hello"))[-1].stats
        assert stats.drafted_tokens > 0
        if right:  # all the layers are the model
            assert stats.accepted_tokens >= stats.drafted_tokens - 4
        plain = model.session(draft="none", temperature=0, max_tokens=30)
        list(plain.send("hello"))
        assert plain.messages == session.messages
    for bad in ("layers:7", "layers:", "layers:1-0", "layers:x"):
        events = list(model.session(draft=bad, temperature=0, max_tokens=3).send("hello"))
        assert isinstance(events[0], Notice)
        assert events[-1].stats.generated_tokens == 3


def test_a_draft_runs_as_its_model_was_told_to(tmp_path, monkeypatch):
    """Above all: offline means offline, for the draft too."""
    from tinychat.hub import store

    pulled = []
    monkeypatch.setattr(
        store, "install", lambda name: pulled.append(name) or tiny_folder(tmp_path / "pulled")
    )
    monkeypatch.setattr(store, "offline_by_environment", lambda: False)
    folder, small = tiny_folder(tmp_path / "model"), tiny_folder(tmp_path / "small", seed=1, n_layers=1)
    how = dict(device="cpu", kv_bits=8, act_bits=16, quantize="rtn", head_bits=16, threads=1)
    with tinychat.load(folder, offline=True, draft="hf:some/draft", **how) as m:
        notice = m.session().speculator.take_notice()
        assert "No draft: hf:some/draft is not on this machine, and tinychat is offline" in notice
        assert not pulled
        for draft in (str(small), "layers:0"):
            assert m.speculator(draft).take_notice() == ""
            loaded = m.drafts.get(m, draft)
            assert {k: v for k, v in loaded.describe().items() if k not in ("model", "ctx")} == {
                k: v for k, v in m.describe().items() if k not in ("model", "ctx")
            }
            assert loaded.policy == m.policy
    with tinychat.load(folder, draft="hf:some/draft", **how) as m:
        m.session()
        assert pulled == ["hf:some/draft"]


def test_a_draft_of_other_words_is_refused_every_time_and_loaded_once(model, monkeypatch):
    other = tiny_model(seed=1)
    monkeypatch.setattr(other.tokenizer, "token_bytes", lambda i: b"?")
    loaded = []
    monkeypatch.setattr(model.drafts, "_load", lambda _, name: loaded.append(name) or other)
    for _ in range(3):
        speculator = model.speculator("stranger")
        assert speculator.drafter is None
        assert "differs from the model's" in speculator.take_notice()
    assert loaded == ["stranger"]
