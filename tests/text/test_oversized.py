"""A text that no context holds is refused before all of it is tokenized; one that fits passes."""

from __future__ import annotations

import os

import pytest
from cli_helpers import tinychat as run_tinychat
from tiny import byte_tokenizer, tiny_folder, tiny_model

from tinychat.base.errors import UsageError
from tinychat.text import oversized
from tinychat.text.oversized import refuse_oversized


class Counting:
    """A tokenizer that knows how much it was given."""

    def __init__(self):
        self.inner, self.seen = byte_tokenizer(), 0

    def encode(self, text):
        self.seen += len(text)
        return self.inner.encode(text)


def test_a_hundred_megabytes_are_refused_after_a_little_more_than_the_context():
    tokenizer = Counting()
    with pytest.raises(UsageError, match=r"100,000,000 characters"):
        refuse_oversized(tokenizer, ["x" * 100_000_000], 200_000)
    assert tokenizer.seen < 400_000


@pytest.mark.parametrize("texts", [["x" * 3_000_000], ["x" * 1_000_000] * 3, ["x", "é" * 1_500_000]])
def test_what_fits_passes_and_one_token_more_in_all_does_not(texts, monkeypatch):
    monkeypatch.setattr(oversized, "SLACK", 0)
    tokenizer = Counting()
    n = sum(len(t.encode()) for t in texts)
    refuse_oversized(tokenizer, texts, n)
    with pytest.raises(UsageError):
        refuse_oversized(tokenizer, texts, sum(map(len, texts)) // 2)


def test_cuts_between_pieces_refuse_nothing_that_fits():
    class Spaces:
        """A run of up to 128 spaces is a token, and every beginning costs one more."""

        def encode(self, text):
            return [0] * (1 + -(-len(text) // 128))

    refuse_oversized(Spaces(), [" " * 12_800_000], 100_002)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(oversized, "SMALL", 1000)
    monkeypatch.setattr(oversized, "SLACK", 0)
    monkeypatch.setattr(oversized, "PIECE", 1000)
    with tiny_model(ctx=256) as m:
        yield m


def test_every_way_into_a_model_refuses_it(small):
    long = "x" * 50_000
    seen, encode = [], small.tokenizer.encode
    small.tokenizer.encode = lambda text, *a, **k: seen.append(len(text)) or encode(text, *a, **k)
    with pytest.raises(UsageError, match="context holds 256"):
        list(small.generate(long))
    with pytest.raises(UsageError, match="context holds 256"):
        small.chat([{"role": "user", "content": long}])
    session = small.session(kv_policy="none")
    with pytest.raises(UsageError, match="context holds 256"):
        list(session.send(long))
    assert session.nodes == []
    with pytest.raises(UsageError, match="context holds 256"):
        list(small.session(long, kv_policy="none").send("x"))
    assert max(seen) <= 1000


def test_files_that_are_none_and_texts_that_are_too_long_are_usage_errors_at_once(tmp_path):
    folder, env = tmp_path / "m", os.environ | {"TINYCHAT_HOME": str(tmp_path / "home")}
    tiny_folder(folder)
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as f:
        f.truncate(1 << 36)
    for args in (
        ["run", folder, "-f", tmp_path / "pipe", "hi"],
        ["run", folder, "-f", "/dev/null", "hi"],
        ["run", folder, "-f", tmp_path / "large", "hi"],
        ["ppl", folder, tmp_path / "pipe"],
        ["ppl", folder, tmp_path / "large"],
    ):
        out = run_tinychat(*args, env=env)
        assert out.returncode == 2, (args, out.stderr)
        assert len(out.stderr.splitlines()) == 2


def test_what_a_template_makes_of_very_many_messages_is_refused_before_it_is_tokenized(small, monkeypatch):
    many = [{"role": "user", "content": ""}] * 500
    seen = []
    encode = small.template.encode
    monkeypatch.setattr(
        type(small.template), "encode", lambda self, *a, **k: seen.append(1) or encode(*a, **k)
    )
    with pytest.raises(UsageError, match="the context holds"):
        small.chat(many)
    long = small.request([{"role": "user", "content": "x" * 100_000}])
    with pytest.raises(UsageError, match="the context holds"):
        long.prompt(small)  # to be counted, it may be longer, but not without end
    assert not seen
