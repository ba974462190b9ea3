"""Logits that are NaN or infinite are an error, in every backend and every way of choosing a token."""

from __future__ import annotations

import numpy as np
import pytest
from backend_steps import IDS, TABLE, cpu, cuda, truth
from emulation import needs_device
from tiny import TinyCheckpoint

from tinychat.backends.interface import Step
from tinychat.base.errors import CheckpointError
from tinychat.model import Model
from tinychat.network.weight_policy import WeightPolicy
from tinychat.perplexity import perplexity


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))


def damaged(value, rows=slice(None)) -> TinyCheckpoint:
    """A model whose head has a bad number in some of its rows."""
    checkpoint = TinyCheckpoint(5, tie_embeddings=False)
    checkpoint.weights["lm_head"][rows, 3] = value
    checkpoint._fingerprint += f"{value}{rows}"
    return checkpoint


class Unchecked(WeightPolicy):
    """Lets pass what a pack may hold that rotted."""

    def embedding(self, checkpoint, name):
        return checkpoint.linear(name)


@pytest.fixture(params=[cpu, truth, pytest.param(cuda, marks=needs_device)], ids=["cpu", "reference", "cuda"])
def backend(request):
    return request.param


@pytest.mark.parametrize("rows", [slice(None), slice(7, 8), slice(257, 258)], ids=["all", "one", "last"])
def test_greedy_says_that_there_is_nothing_to_choose(backend, rows):
    ids, policy = np.ascontiguousarray(IDS[:5]), Unchecked("none", 16)
    assert (backend(damaged(0.0, rows), policy).step_greedy(Step.of(ids, 0, 0, TABLE, 0)) >= 0).all()
    assert (backend(damaged(np.nan, rows), policy).step_greedy(Step.of(ids, 0, 0, TABLE, 0)) == -1).all()


def nan_model(backend) -> Model:
    checkpoint = TinyCheckpoint(6)
    checkpoint.vectors["model.norm"][0] = np.nan
    checkpoint._fingerprint += "nan"
    return Model(checkpoint, backend(checkpoint), "tiny")


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 0.7}, {"temperature": 0, "repeat_penalty": 1.1}]
)
@pytest.mark.parametrize("kind", [cpu, truth])
def test_an_answer_of_nan_is_an_error_and_no_empty_text(kind, sampling):
    with nan_model(kind) as m:
        for draft in ("none", "ngram"):
            with pytest.raises(CheckpointError, match=r"no finite logits"):
                list(m.generate([1, 2, 3], draft=draft, **sampling))
        with pytest.raises(CheckpointError, match="--verify"):
            list(m.session().send("x", **sampling))
        with pytest.raises(CheckpointError):
            m.chat([{"role": "user", "content": "x"}], **sampling)
        with pytest.raises(CheckpointError):
            perplexity(m.logits, list(range(200)), 64)
