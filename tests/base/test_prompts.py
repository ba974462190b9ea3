"""Prompts that the user keeps: what their files say, and what is wrong with some."""

from __future__ import annotations

import pytest

from tinychat.base import prompts
from tinychat.base.errors import UsageError


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    (tmp_path / "prompts").mkdir()

    def write(name, text):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "prompts" / f"{name}.md").write_bytes(data)

    return write


def test_settings_and_text(write):
    write(
        "review", '+++\nsystem = "Careful."\nmodel = "m"\nsampling.top_k = 3\n+++\n\nReview:\n\n{{ input }}\n'
    )
    write("plain", "Say something.\r\n")
    assert prompts.names() == ["plain", "review"]
    p = prompts.find("review")
    assert (p.system, p.model, dict(p.sampling)) == ("Careful.", "m", {"top_k": 3})
    assert p.filled("a \\1 {{input}}\n") == "Review:\n\na \\1 {{input}}"
    with pytest.raises(UsageError, match="wants words"):
        p.filled("\n")
    plain = prompts.find("plain")
    assert (plain.filled(None), plain.filled("x")) == ("Say something.", "Say something.\n\nx")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("+++\nsystem = 5\n+++\nx", "review.md, line 2: "),
        ("+++\n\nload.ctx = 5\n+++\nx", "line 3: load"),
        ("+++\nsystem = \n+++\nx", "line 2: "),
        ("+++\nsystem = 5\n", "line 1: its settings have no end"),
        ("+++\n+++\n \n", "says nothing"),
        (b"\xff", "UTF-8"),
    ],
)
def test_a_damaged_one_is_said_with_its_line(write, text, said):
    write("review", text)
    with pytest.raises(UsageError) as e:
        prompts.find("review")
    assert said in e.value.what


@pytest.mark.parametrize("name", ["none", "../config", "a/b", "..", "", "\0"])
def test_other_names_and_places_are_refused(write, name):
    write("plain", "Say something.")
    with pytest.raises(UsageError):
        prompts.find(name)


def test_without_a_folder_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "none"))
    assert prompts.names() == []
    with pytest.raises(UsageError, match="There is no prompt x"):
        prompts.find("x")
