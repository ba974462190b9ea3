"""Answers of the demo model that are held to a form: valid, whatever drafts and whoever is beside them."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import schemas
from tiny import tiny_model

import tinychat
from tinychat.base.errors import UsageError
from tinychat.engine.guide import guide_for
from tinychat.engine.speculation.control import Controller
from tinychat.engine.speculation.draft_model import DraftModel
from tinychat.engine.speculation.speculator import Speculator
from tinychat.text.response_format import of_schema

ASK = "Write an example as JSON."


@pytest.fixture(scope="module")
def model(demo_gguf):
    with tinychat.load(demo_gguf, ctx=1024) as m:
        yield m


def answers(model, chosen, **settings):
    """The answers for some schemas, at temperature 1, each checked."""
    out = []
    for k, schema in enumerate(chosen):
        done = model.chat(ASK, response_format=of_schema(schema), temperature=1, seed=k, **settings)
        out.append(done)
        if done.finish_reason == "stop":
            jsonschema.validate(json.loads(done.text), schema, cls=jsonschema.Draft202012Validator)
        else:
            assert done.finish_reason == "length"
            assert done.stats.generated_tokens == settings["max_tokens"]
    return out


def test_answers_are_valid_and_the_same_with_drafts_and_without(model):
    chosen = [schemas.WRITTEN[i] for i in (0, 14, 30, 33)]
    plain = answers(model, chosen, draft="none", max_tokens=60)
    drafted = answers(model, chosen, draft="ngram", max_tokens=60)
    assert [a.token_ids for a in plain] == [a.token_ids for a in drafted]
    assert sum(a.finish_reason == "stop" for a in plain) >= 3
    assert sum(a.stats.accepted_tokens for a in drafted) > 0


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_draft_model_keeps_to_the_form_too(temperature):
    with tiny_model(ctx=256, backend="cpu") as tiny:
        drafter, accepted = DraftModel(tiny.engine, "itself"), 0
        for k, schema in enumerate(schemas.corpus(60, 4)[::4]):
            request = tiny.request(
                ASK, response_format=of_schema(schema), temperature=temperature, seed=k, max_tokens=40
            )
            plain = list(replace(request, draft="none").events(tiny))[-1].completion
            ids = tiny.template.encode(tiny.template.render(request.messages))
            guide = guide_for(tiny.tokenizer, tiny.template, tiny.template.splitter(""), request.form)
            speculator = Speculator(drafter, Controller(5))
            branch = tiny.engine.branch()
            *_, done = tiny.engine.generate(branch, ids, request.params, speculator=speculator, guide=guide)
            assert done.completion.token_ids == plain.token_ids
            # It is the same model, held to the same form: whatever it drafts is right.
            assert done.stats.accepted_tokens == done.stats.drafted_tokens or done.finish_reason == "stop"
            accepted += done.stats.accepted_tokens
        assert accepted > 20


@pytest.mark.slow
def test_three_hundred_schemas(model, capsys):
    chosen = schemas.corpus(300, 0)
    done = answers(model, chosen, draft="ngram", max_tokens=300)
    ended = sum(a.finish_reason == "stop" for a in done)
    steps = sum(a.stats.generated_tokens for a in done)
    with capsys.disabled():
        print(f"\n{ended} of {len(done)} answers ended and were valid, {steps} tokens")
    assert ended >= 240  # at this temperature the model likes numbers without an end
    again = answers(model, chosen[:40], draft="none", max_tokens=300)
    assert [a.token_ids for a in again] == [a.token_ids for a in done[:40]]


def test_answers_side_by_side_are_those_of_one_alone(model):
    chosen = [schemas.WRITTEN[i] for i in (0, 1, 14)]

    def ask(k):
        form = of_schema(chosen[k]) if k < len(chosen) else None  # and one that is free
        settings = dict(temperature=k % 2, seed=k, max_tokens=30)
        return model.chat(ASK, response_format=form, **settings).token_ids

    alone = [ask(k) for k in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == alone


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"type": "regex", "pattern": "[A-Z][a-z]{2,9}, [0-9]{2}"}, "[A-Z][a-z]{2,9}, [0-9]{2}"),
        ({"type": "choice", "choices": ["yes", "no", 'I "can\'t" say']}, 'yes|no|I "can\'t" say'),
        ({"type": "grammar", "grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{1,8}/'}, "<[a-z]{1,8}>"),
        ({"type": "json_object"}, r"(?s)\{.*\}"),
    ],
)
def test_other_forms_are_held_to(model, form, pattern):
    done = model.chat("Say something.", response_format=form, temperature=1, seed=4, max_tokens=80)
    assert done.finish_reason == "stop"
    assert re.fullmatch(pattern, done.text)


def test_a_conversation_holds_its_answers_to_its_form(model):
    session = model.session(response_format={"type": "choice", "choices": ["yes", "no"]}, temperature=0)
    *_, first = session.send("Is water wet?")
    *_, second = session.send("Is fire cold?")
    assert {first.completion.text, second.completion.text} <= {"yes", "no"}
    assert second.stats.cached_tokens > first.stats.prompt_tokens // 16 * 16 - 16
    session.response_format = None
    *_, free = session.send("Tell me about water.", max_tokens=20)
    assert free.completion.text not in ("yes", "no")


def test_an_answer_that_was_cut_goes_on_in_its_form():
    with tiny_model(ctx=256, backend="cpu") as tiny:
        for k in (0, 1, 4, 14, 33):
            form = of_schema(schemas.WRITTEN[k])
            whole, cut = (tiny.session(response_format=form, temperature=1, seed=k) for _ in range(2))
            list(whole.send("Well?", max_tokens=80))
            *_, done = cut.send("Well?", max_tokens=3)
            assert done.finish_reason == "length"
            list(cut.go_on(max_tokens=77))
            assert cut.messages[-1] == whole.messages[-1]


def test_what_cannot_be_held_to_is_refused_before_anything_is_computed(model):
    bad = {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"type": "foo"}}}}}
    for ask in (
        lambda: model.request("Hi", response_format=bad),
        lambda: model.chat("Hi", response_format=bad, stream=True),
        lambda: model.session(response_format=bad),
        lambda: setattr(model.session(), "response_format", bad),
    ):
        with pytest.raises(UsageError, match="#/properties/a: Invalid type: foo"):
            ask()


def test_a_row_of_which_some_tokens_are_ruled_out_is_chosen_from_alike_whole_or_by_its_largest():
    from tinychat.backends.interface import LargestLogits
    from tinychat.engine.sampling import SamplingParams, masked, sample

    rng = np.random.default_rng(0)
    for k in range(200):
        row = rng.normal(0, 3, 2000).astype(np.float32)
        allowed = rng.random(1990) < rng.choice([0.001, 0.01, 0.5, 1.0])
        allowed[rng.integers(1990)] = True
        ids = np.lexsort((np.arange(2000), -row))[: rng.choice([5, 64, 2000])]
        largest = LargestLogits(ids, row[ids], 2000, 0.0, lambda row=row: row)
        params = SamplingParams(
            temperature=rng.choice([0, 0.7, 1.5]).item(),
            top_k=rng.choice([0, 3, 40]).item(),
            top_p=rng.choice([0.5, 0.95, 1.0]).item(),
            min_p=rng.choice([0, 0.05]).item(),
        )
        token = sample(masked(row, allowed), params, 7, k)
        assert allowed[token]
        assert token == sample(masked(largest, allowed), params, 7, k)
        # By hand: the same choice from the allowed tokens alone.
        left = np.flatnonzero(allowed)
        if params.temperature == 0:
            assert token == left[np.argmax(row[left])]
