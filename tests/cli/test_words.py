"""Which argument of `run` is the model and which is said; what comes in on stdin."""

from __future__ import annotations

import io
import os
import shlex
import threading

import pytest
from cli_helpers import GREEDY, assert_two_lines, tinychat
from tiny import tiny_folder

from tinychat.base import locations
from tinychat.base.errors import ModelNotFoundError, UsageError
from tinychat.chats.chat_store import ChatStore
from tinychat.cli import words
from tinychat.cli.words import gather, model_and_prompt, model_or_prompt


@pytest.fixture
def place(here):
    """Models by every kind of name."""
    tiny_folder(here / "some model")
    tiny_folder(here / "model")
    (here / "src").mkdir()
    (here / "Continue").write_text("a note")
    (locations.models_dir() / "mine").mkdir(parents=True)
    (locations.models_dir() / "mine" / "manifest.json").write_text('{"name": "mine"}')
    (locations.home() / "aliases.json").write_text('{"my own": "hf:a/b", "tiny": "hf:a/b"}')
    return here


MODELS = ["smollm2-135m", "mine", "tiny", "my own", "model", "./model", "some model", "src"]
MODELS += ["Qwen/Qwen2.5-7B-Instruct", "hf:a/b", "a/b@main", "a/b/c-q4.gguf", "file:/x.gguf"]


@pytest.mark.parametrize("word", MODELS)
def test_what_can_be_a_model_is_one(place, word):
    assert model_or_prompt(word, resumed=False) == (word, None)


@pytest.mark.parametrize(
    "text",
    ["What is a glacier?", "two\nlines", "a\tb", "not/a path", "什么是冰川？", "¿", "x " * 5000, "no\0 way"],
)
def test_what_has_a_space_or_cannot_be_a_name_is_said(place, text):
    assert model_or_prompt(text, resumed=False) == (None, text)
    assert model_or_prompt(text, resumed=True) == (None, text)


@pytest.mark.parametrize(
    "word", ["Continue", "src", "Yes", "and/or", "-", "~no-such-user", "x" * 5000, "a\0b", "\udcff"]
)
def test_a_chat_that_goes_on_hears_one_word(place, word):
    assert model_or_prompt(word, resumed=True) == (None, word)


@pytest.mark.parametrize("word", ["smollm2-135m", "mine", "tiny", "model", "./model"])
def test_a_chat_can_go_on_with_another_model(place, word):
    assert model_or_prompt(word, resumed=True) == (word, None)


def test_nothing_is_neither(place):
    assert model_or_prompt("", resumed=False) == model_or_prompt(" \n", resumed=True) == (None, None)


@pytest.mark.parametrize(
    "word", ["Hello", "smolm2-135m", "hello?", "~no-such-user", "x" * 5000, "a\0b", "it's", "--x"]
)
def test_any_other_word_is_no_model_and_it_is_said_what_was_tried(place, word):
    with pytest.raises(ModelNotFoundError) as e:
        model_or_prompt(word, resumed=False)
    assert "no alias, installed model, file or folder" in e.value.what
    assert "OWNER/NAME" in e.value.what
    assert ("smollm2-135m or" in e.value.todo) == (word == "smolm2-135m")
    if len(word) < 100:  # the advice says it
        command = e.value.todo.partition("To say it: ")[2]
        assert shlex.split(command) == ["tinychat", "run", "smollm2-135m", word]


def test_one_word_with_a_file_or_a_pipe_is_no_less_a_model(place):
    (place / "notes.txt").write_text("hello")
    assert_two_lines(tinychat("run", "Summarize", "-f", "notes.txt"), 3)
    assert_two_lines(tinychat("run", "Summarize", stdin="hello"), 3)
    out = tinychat("run", "model", "-f", "notes.txt", *GREEDY)
    assert (out.returncode, out.stderr) == (0, "")


def test_one_word_goes_on_with_the_chat_and_its_model(place):
    short = ["--temp", "0", "--max-tokens", "3"]
    first = tinychat("run", "./model", "-c", "hello there", *short)
    assert first.returncode == 0
    for flags in (["-c"], ["--resume", "1"]):
        out = tinychat("run", *flags, "Continue", *short)
        assert (out.returncode, out.stderr) == (0, "")
    store = ChatStore()
    said = [m.content for m in store.messages(1) if m.role == "user"]
    assert said == ["hello there", "Continue", "Continue"]


# Stdin


@pytest.fixture
def pipe(monkeypatch):
    """Stdin is a pipe; its other end."""
    read, write = os.pipe()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(os.fdopen(read, "rb")))
    with os.fdopen(write, "wb", buffering=0) as other:
        yield other


def test_a_pipe_that_somebody_holds_open_is_said_to_be_waited_for(pipe, monkeypatch):
    monkeypatch.setattr(words, "PATIENCE", 0.02)
    said = []

    def echo(message, err):
        said.append((message, err))
        pipe.write(b"late")
        pipe.close()

    monkeypatch.setattr(words.click, "echo", echo)
    assert gather("prompt") == "late\n\nprompt"
    ((message, err),) = said
    assert "Waiting" in message
    assert "stdin" in message
    assert err


def test_a_pipe_that_ends_is_read_without_a_word(pipe, capsys):
    writer = threading.Thread(target=lambda: (pipe.write(b"x" * 300_000), pipe.close()))
    writer.start()
    assert gather(None) == "x" * 300_000
    writer.join()
    assert capsys.readouterr() == ("", "")


def test_a_pipe_without_an_end_is_left(pipe, monkeypatch):
    monkeypatch.setattr(words, "MAX_TEXT", 100_000)

    def write():
        try:
            while True:
                pipe.write(b"y\n" * 10_000)
        except OSError:
            pass

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(UsageError, match="piped in"):
        gather(None)
    import sys

    sys.stdin.close()
    writer.join()


def test_what_cannot_be_read_is_a_usage_error(monkeypatch, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(
        "sys.stdin", type("Stdin", (), {"isatty": lambda s: False, "fileno": lambda s: folder})()
    )
    with pytest.raises(UsageError, match="directory"):
        gather("x")
    os.close(folder)


def test_a_pipe_that_does_not_block_is_waited_for(pipe, monkeypatch):
    import sys

    os.set_blocking(sys.stdin.fileno(), False)
    monkeypatch.setattr(words, "PATIENCE", 0.02)
    monkeypatch.setattr(words.click, "echo", lambda *_, **__: (pipe.write(b"now"), pipe.close()))
    assert gather(None) == "now"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (None, None)),
        (("Say", "hi"), (None, "Say hi")),
        (("What", "is", "2", "+", "2?"), (None, "What is 2 + 2?")),
        (("smollm2-135m", "Say", "hi"), ("smollm2-135m", "Say hi")),
        (("smollm2-135m", "Say hi"), ("smollm2-135m", "Say hi")),
        (("owner/repo", "hi"), ("owner/repo", "hi")),
        (("Two words", "and", "more"), (None, "Two words and more")),
        (("", "hi"), (None, "hi")),
    ],
)
def test_several_words_are_the_prompt_where_the_first_is_no_model(words, expected):
    assert model_and_prompt(words, False) == expected


@pytest.mark.parametrize("first", ["smolm2", "smollm", "qwen", "no-such-model", "Qwen3", "x.gguf"])
def test_a_first_word_that_may_be_a_mistyped_model_is_asked_about(first):
    for rest in (("hi",), ("say", "hi"), ("Say hi",)):
        with pytest.raises(ModelNotFoundError, match="There is no model") as e:
            model_and_prompt((first, *rest), False)
        assert "To say it: tinychat run" in e.value.todo


def test_what_follows_in_quotes_makes_the_first_word_a_model():
    with pytest.raises(ModelNotFoundError):
        model_and_prompt(("Say", "hi there"), False)


def test_a_chat_that_goes_on_takes_all_words():
    assert model_and_prompt(("And", "then?"), True) == (None, "And then?")
    assert model_and_prompt(("some-model", "hi"), False, True) == ("some-model", "hi")  # a server's
