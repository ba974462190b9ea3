"""What a Python program may give by mistake: a clear error before anything is changed."""

from __future__ import annotations

import json
from collections import UserDict, deque
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
from tiny import tiny_model

import tinychat
from tinychat.base.errors import ModelNotFoundError, UsageError
from tinychat.engine.sampling import SamplingParams
from tinychat.session import Session

HI = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def model():
    with tiny_model(ctx=256, backend="cpu") as m:
        m.default_sampling = SamplingParams(temperature=0, max_tokens=4)
        yield m


class Evil:
    def __repr__(self):
        raise RuntimeError("no repr")


WRONG = {
    "temperature": [-1, 101, float("nan"), float("inf"), "0.7", None.__class__, True, [], 1j, Evil(), b"1"],
    "top_k": [-1, 1.5, "40", True, 1 << 40, np.float32(3), float("nan")],
    "top_p": [1.1, -0.1, float("nan"), "x", False],
    "min_p": [2, np.nan, []],
    "repeat_penalty": [0, -1, 1e9, "1"],
    "seed": [-1, 1.0, "7", True, np.int64(-3), [1]],
    "max_tokens": [-1, 2.5, "many", True, float("inf")],
    "stop": ["", [""], ["a", ""], 5, False, b"a", [1], {"a": 1}, [None], ("a", b"b")],
    "draft": ["", 5, ["ngram"], b"ngram"],
    "temprature": [0.5],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs], ids=lambda v: "")
def test_wrong_settings_are_refused_and_leave_the_session_as_it_was(model, name, value):
    session = model.session()
    for use in (
        lambda: model.generate("x", **{name: value}),
        lambda: model.chat([HI], **{name: value}),
        lambda: model.session(**{name: value}),
        lambda: session.send("x", **{name: value}),
        lambda: session.edit(0, "x", **{name: value}),
    ):
        with pytest.raises(UsageError):
            use()
    assert session.nodes == []


def test_numbers_of_other_libraries_are_numbers(model, tmp_path):
    given = dict(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        top_p=Fraction(1, 2),
        seed=np.uint8(7),
        max_tokens=np.int32(3),
    )
    plain = dict(temperature=0.5, top_k=3, top_p=0.5, seed=7, max_tokens=3)
    ours, theirs = model.session(**given), model.session(**plain)
    assert list(ours.send("hi"))[-1].completion == list(theirs.send("hi"))[-1].completion or (
        ours.messages == theirs.messages
    )
    ours.switch(np.int64(1))
    ours.save(tmp_path / "chat.json")
    assert json.loads((tmp_path / "chat.json").read_text())["params"]["seed"] == 7
    assert model.chat([HI], max_tokens=10**30, stop=(s for s in ["zz"])).text


def test_any_iterable_of_messages_is_read_once_and_whole(model):
    talk = [HI, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "what?"}]
    expected = model.chat(talk).token_ids
    named = {str(i): m for i, m in enumerate(talk)}
    for form in (
        tuple(talk), iter(talk), (m for m in talk), named.values(), deque(talk), map(dict, talk),
        [MappingProxyType(m) for m in talk], [UserDict(m) for m in talk], np.array(talk, object),
    ):  # fmt: skip
        assert model.chat(form).token_ids == expected
    assert model.chat("hi").token_ids == model.chat([HI]).token_ids


@pytest.mark.parametrize(
    "bad",
    [
        None, 5, b"hi", "", [], HI, {}, ["hi"], [["user", "hi"]], [{"role": "user"}], [{"content": "x"}],
        [HI, None], [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": b"x"}], np.array(5), (HI, 1), iter([]), [Evil()],
    ],
    ids=lambda v: "",
)  # fmt: skip
def test_what_is_no_conversation_is_said(model, bad):
    with pytest.raises(UsageError):
        model.chat(bad)


def test_what_no_template_can_read_is_said(model):
    deep, ring = {}, {**HI}
    for _ in range(5000):
        deep = {"a": deep}
    ring["me"] = ring
    for more in ({"tool_calls": deep}, {"x": object()}, {"x": b"bytes"}):
        with pytest.raises(UsageError):
            model.chat([{**HI, **more}])
    with pytest.raises(UsageError):
        model.chat([ring])
    assert model.chat([{**HI, "name": "x", "more": [1, None, {"a": 0.5}]}]).text


@pytest.mark.parametrize(
    "bad",
    [
        None, 5, [1.5], ["1"], [True], [None], [-1], [258], [10**30], {1, 2}, {1: 2}, b"abc", [[1]],
        np.array([[1]]), np.array([1.0]), [], iter([]),
    ],
    ids=lambda v: "",
)  # fmt: skip
def test_what_are_no_token_ids_is_said(model, bad):
    for use in (model.logits, model.generate):
        with pytest.raises(UsageError):
            use(bad)


def test_any_iterable_of_token_ids_is_read(model):
    expected = model.logits([1, 2, 3])
    for ids in (np.array([1, 2, 3]), (i for i in (1, 2, 3)), range(1, 4), np.array([1, 2, 3], np.uint8)):
        np.testing.assert_array_equal(model.logits(ids), expected)


def test_a_session_refuses_what_makes_no_sense(model, tmp_path):
    session = model.session()
    list(session.send("hi"))
    before = list(session.nodes), session.leaf, session.system
    uses = (
        *(lambda v=v: session.send(v) for v in ("", None, 5, b"hi", ["hi"])),
        *(lambda v=v: session.edit(0, v) for v in ("", None, 5)),
        *(lambda v=v: session.edit(v, "x") for v in (1, 2, -1, True, "0", None, 0.0)),
        *(lambda v=v, f=f: f(v) for v in (-1, 2, True, "0", 0.5) for f in (session.switch, session.siblings)),
        *(lambda v=v: session.path(v) for v in (-1, 2, "0")),
        *(lambda v=v: setattr(session, "params", v) for v in (None, {"seed": 1})),
        *(lambda v=v: setattr(session, "system", v) for v in (5, b"x", ["x"])),
        *(lambda v=v: model.session(v) for v in (5, b"x", ["x"])),
        *(lambda v=v: model.session(kv_budget=v) for v in ("9", 1.5, True, -4, 10**9)),
        *(lambda v=v: model.session(kv_policy=v) for v in ("H2O", 5, ["h2o"], True, np.arange(2))),
        *(
            lambda v=v: session.send("x", attachments=v)
            for v in (None, 5, "a.txt", {"name": "a"}, np.array(3))
        ),
        *(lambda v=v: model.encode_prompt(v) for v in (None, 5, b"x", [1])),
        *(lambda v=v: session.save(v) for v in (None, 5, "", ["x"], "a\0b")),
        *(lambda v=v: Session.load(v, model) for v in (None, 5, "", "a\0b")),
        lambda: Session.load(tmp_path / "x", "smollm2-135m"),
        lambda: Session(None),
        *(lambda v=v: model.think(v) for v in (None, 1, "yes")),
    )
    for use in uses:
        with pytest.raises(UsageError):
            use()
    assert (list(session.nodes), session.leaf, session.system) == before
    with pytest.raises(TypeError):
        session.send()


WRONG_LOADS = {
    "threads": [0, -1, True, 1.0, "2", 10**9],
    "act_bits": [4, 8.0, "8", True],
    "head_bits": [4, 8.0, "8", None],
    "kv_bits": [2, 16.0, "16", True, None],
    "ctx": [0, -5, True, 4096.0, "4096"],
    "quantize": ["q4", None, 5, ["rtn"], np.arange(2)],
    "kv_budget": [-1, 1.5, "1", True],
    "kv_policy": ["none ", 5, ["h2o"], np.arange(2)],
    "kv_disk_budget": [-1, 1.5, "1GB", True],
    "draft": [5, "", ["ngram"]],
    "draft_tokens": [-1, 16, 2.0, "3", True],
    "think": [1, "yes"],
    "offline": [1, "yes", None],
    "device": ["gpu", None, 5, ["cpu"], np.arange(2)],
    "progress": [5, "x"],
    "model": [None, 5, b"smollm2-135m", "", ["smollm2-135m"], "a\0b"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG_LOADS.items() for v in vs], ids=str)
def test_load_refuses_what_no_model_could_run_with_before_it_looks_for_one(name, value):
    settings = {"model": "no-such-model", "offline": True, name: value}
    with pytest.raises(UsageError):
        tinychat.load(settings.pop("model"), **settings)


def test_load_takes_numbers_of_other_libraries():
    with pytest.raises(ModelNotFoundError):
        tinychat.load(
            "no-such-model", offline=True, threads=np.int64(1), ctx=np.int32(512), kv_bits=np.int8(8)
        )
    with pytest.raises(UsageError, match="contxt"):
        tinychat.load("no-such-model", contxt=5)
