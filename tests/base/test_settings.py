"""One line says what a setting may hold: the command line, `/set`, stored chats and programs agree."""

from __future__ import annotations

import json

import click
import pytest
from click.testing import CliRunner

import tinychat
from tinychat.base.errors import UsageError
from tinychat.base.load_options import ENGINE, LoadOptions
from tinychat.base.sampling_params import SamplingParams
from tinychat.base.settings import Choice, Number, Whole
from tinychat.chats import records
from tinychat.cli.options import options_of, pick

NUMBERS = [(kind, n, s) for kind in (SamplingParams, LoadOptions) for n, s in kind.numbers().items()]
IDS = [name for _, name, _ in NUMBERS]


def typed(kind, name: str, value) -> dict:
    """What the command line gives for a setting. Raises click.UsageError."""
    found = []

    @click.command()
    @options_of(kind, kind.SETTINGS)
    def command(**o):
        found.append(pick(o, kind.SETTINGS))

    flag = kind.SETTINGS[name].flag or f"--{name.replace('_', '-')}"
    result = CliRunner().invoke(command, [flag, f"{value}"], standalone_mode=False)
    if result.exception:
        raise result.exception
    return found[0]


def stored(name: str, value) -> dict:
    """What is believed of a stored chat's parameter."""
    return records.chat_of((1, "", "", None, json.dumps({name: value}), None, 0, 0, None)).params


def bounds(s: Number) -> tuple[list, list]:
    """Values at and beyond the ends of the range."""
    step = 1 if isinstance(s, Whole) else 0.005
    high = 10**12 if s.high is None else s.high
    return [s.low, high], [s.low - step, *([] if s.high is None else [s.high + step])]


@pytest.mark.parametrize(("kind", "name", "s"), NUMBERS, ids=IDS)
def test_the_ends_of_a_range_are_right_everywhere(kind, name, s):
    for value in bounds(s)[0]:
        assert getattr(kind(**{name: value}), name) == value
        assert kind.parse(name, f"{value}") == value
        assert typed(kind, name, value) == {name: value}
        if kind is SamplingParams:
            assert stored(name, value) == {name: value}


@pytest.mark.parametrize(("kind", "name", "s"), NUMBERS, ids=IDS)
def test_what_lies_beyond_a_range_is_refused_everywhere_and_forgotten_when_read(kind, name, s):
    for value in [*bounds(s)[1], "nan", "inf", "x", ""]:
        if value != "":
            with pytest.raises(UsageError):
                kind.parse(name, f"{value}")
        with pytest.raises(click.UsageError):
            typed(kind, name, value)
        with pytest.raises(UsageError, match=name):
            kind(**{name: float(value) if value in ("nan", "inf") else value})
        if kind is SamplingParams:
            assert stored(name, float(value) if value in ("nan", "inf") else value) == {}


def test_nothing_typed_is_the_models_own():
    assert [SamplingParams.parse("top_k", text) for text in ("", "-", "default")] == [None] * 3
    with pytest.raises(UsageError, match="stop is not a sampling parameter"):
        SamplingParams.parse("stop", "x")


def test_options_that_are_not_given_are_left_to_their_defaults():
    given = []

    @click.command()
    @options_of(LoadOptions, LoadOptions.SETTINGS)
    @options_of(SamplingParams, SamplingParams.SETTINGS)
    def command(**o):
        given.extend(pick(o, kind.SETTINGS) for kind in (LoadOptions, SamplingParams))

    CliRunner().invoke(command, [], standalone_mode=False)
    loading, sampling = given
    assert LoadOptions(**loading) == LoadOptions()
    assert sampling == {}
    args = ["--no-think", "--offline", "--kv-bits", "8", "--kv-policy", "window", "--kv-disk-budget", "5MB"]
    args += ["--stop", "a", "--stop", "b"]
    CliRunner().invoke(command, args, standalone_mode=False)
    loading, sampling = given[2:]
    expected = {"think": False, "offline": True, "kv_bits": 8, "kv_policy": "window"}
    assert loading == {**expected, "kv_disk_budget": 5_000_000}
    assert SamplingParams(**sampling).stop == ("a", "b")


def test_a_choice_is_one_of_those_and_says_which():
    for name, s in LoadOptions.SETTINGS.items():
        if not isinstance(s, Choice):
            continue
        for value in (*s.choices, *s.unlisted):
            assert getattr(LoadOptions(**{name: value}), name) == value
        for wrong in ("xyz", 5, True, ["auto"], b"8", 8.0):
            with pytest.raises(UsageError, match=name) as e:
                LoadOptions(**{name: wrong})
            assert all(str(c) in e.value.todo for c in s.choices) or "whole number" in e.value.todo
        assert not set(s.unlisted) & set(typed_choices(name))


def typed_choices(name: str) -> list[str]:
    """What the command line offers."""
    (option,) = (p for p in tinychat_run().params if p.name == name)
    return list(option.type.choices)


def tinychat_run() -> click.Command:
    from tinychat.cli.chat import run

    return run


def test_those_who_use_a_choice_know_the_same_ones():
    from tinychat.engine.eviction import POLICIES
    from tinychat.network.weight_policy import WeightPolicy

    policy = LoadOptions.SETTINGS["kv_policy"]
    assert {*policy.choices, *policy.unlisted} == {"none", *POLICIES}
    for quantize in LoadOptions.SETTINGS["quantize"].choices:
        for bits in LoadOptions.SETTINGS["head_bits"].choices:
            WeightPolicy(quantize, bits)


def test_a_budget_that_no_policy_keeps_is_refused():
    with pytest.raises(UsageError, match="policy that keeps it"):
        LoadOptions(kv_budget=512, kv_policy="none")


def test_the_docstrings_have_every_setting():
    for text, kind in (
        (tinychat.load.__doc__, LoadOptions),
        (tinychat.LoadOptions.__doc__, LoadOptions),
        (tinychat.SamplingParams.__doc__, SamplingParams),
    ):
        lines = [line.split()[0] for line in text.splitlines() if line[:1].isalpha()]
        assert [w for w in lines if w in kind.SETTINGS] == list(kind.SETTINGS)
        assert all(len(line) <= 110 for line in text.splitlines())


def test_a_draft_inherits_how_the_engine_runs_and_nothing_of_the_conversation():
    values = {
        "device": "cpu", "threads": 2, "act_bits": 8, "head_bits": 16, "kv_bits": 8, "quantize": "rtn",
        "offline": True, "gpu_memory": 7.5,
    }  # fmt: skip
    assert set(values) == set(LoadOptions.group(ENGINE))
    asked = LoadOptions(**values, ctx=99, kv_budget=50, draft="x", draft_tokens=3, think=True)
    assert asked.inherited() == LoadOptions(**values, draft="none")


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("8", 8), ("7.5", 7.5), ("500MB", 0.5), ("2 GB", 2), ("1e-3", 1e-3)]
)
def test_memory_of_a_gpu_is_typed_in_gigabytes(text, value):
    assert typed(LoadOptions, "gpu_memory", text) == {"gpu_memory": value}
    assert LoadOptions(gpu_memory=value).gpu_memory == value


@pytest.mark.parametrize("text", ["", "-8", "0", "nan", "inf", "1e9", "all", "8 apples"])
def test_what_is_no_memory_of_a_gpu_is_a_usage_error(text):
    with pytest.raises(click.UsageError, match=r"memory|size"):
        typed(LoadOptions, "gpu_memory", text)


@pytest.mark.parametrize("stop", [["x"] * 257, ["x" * 70_000], ["x" * 1000] * 100])
def test_texts_that_are_looked_for_in_every_piece_are_bounded(stop):
    with pytest.raises(UsageError, match="at most"):
        SamplingParams(stop=stop)
    assert len(SamplingParams(stop=[f"x{i}" for i in range(256)]).stop) == 256
