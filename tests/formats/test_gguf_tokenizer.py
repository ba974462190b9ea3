"""The rebuilt tokenizer against ids recorded from llama.cpp (tests/data/make_llama_cpp_tokens.py)."""

from __future__ import annotations

import unicodedata

import pytest
from golden import GOLDEN, sentencepiece_fields

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.formats.gguf_file import GGUFFile
from tinychat.formats.gguf_splits import ALIASES, SPLITS
from tinychat.formats.gguf_tokenizer import from_gguf


@pytest.fixture(scope="module")
def fields(demo_gguf):
    return GGUFFile(demo_gguf).fields


def differences(tokenizer, expected, special, composed=False, without=""):
    pairs = list(zip(GOLDEN["texts"][: len(expected)], expected, strict=True))
    if composed:
        pairs = [(t, ids) for t, ids in pairs if unicodedata.is_normalized("NFC", t)]
    pairs = [(t, ids) for t, ids in pairs if not set(t) & set(without)]
    assert len(pairs) > 80
    return [t for t, ids in pairs if tokenizer.encode(t, special=special) != ids]


@pytest.mark.parametrize("special", [False, True])
def test_demo_model_gives_the_ids_of_llama_cpp(fields, special):
    expected = GOLDEN["byte_level"]["smollm"][special]
    assert differences(from_gguf(fields), expected, special) == []


# White space and digits of the models' own tokenizers, whose patterns these are, that are none for llama.cpp
APART = {"deepseek-llm": "\u2028", "deepseek-coder": "\u2028", "tiny_aya": "५६٣٤"}


@pytest.mark.parametrize("pre", GOLDEN["byte_level"])
def test_other_pre_tokenizers_give_the_ids_of_llama_cpp(fields, pre):
    tokenizer = from_gguf({**fields, "tokenizer.ggml.pre": pre})
    # Qwen's own tokenizer composes letters and accents first, llama.cpp does not.
    expected, without = GOLDEN["byte_level"][pre][0], APART.get(pre, "")
    assert differences(tokenizer, expected, False, composed=pre == "qwen2", without=without) == []


def test_no_pattern_is_untried():
    assert {ALIASES.get(name, name) for name in GOLDEN["byte_level"]} == set(SPLITS)
    assert not set(ALIASES) & set(SPLITS)


@pytest.mark.parametrize("special", [False, True])
def test_sentencepiece_gives_the_ids_of_llama_cpp(special):
    expected = GOLDEN["sentencepiece"]["ids"][special]
    assert differences(from_gguf(sentencepiece_fields()), expected, special) == []


def test_a_digit_after_blank_lines_is_split_off_as_the_model_was_trained(fields):
    # transformers' own GGUF import joins the newlines otherwise
    assert GOLDEN["texts"][1] == "\n\n1"
    assert from_gguf(fields).encode("\n\n1") == GOLDEN["byte_level"]["smollm"][0][1]


def test_typed_control_tokens_stay_text(fields):
    tokenizer = from_gguf(fields)
    typed = tokenizer.encode("<|im_end|>\n<|im_start|>system")
    assert not tokenizer.special_ids & set(typed)
    assert tokenizer.decode(typed) == "<|im_end|>\n<|im_start|>system"


def test_special_tokens_and_settings_of_the_demo_model(fields):
    tokenizer = from_gguf(fields)
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, False)
    assert tokenizer.eos_ids == {0, 2}
    assert tokenizer.special_ids == set(range(17))
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in tokenizer.chat_template


def test_bos_is_added_where_llama_cpp_adds_it(fields):
    assert from_gguf(sentencepiece_fields()).add_bos
    without = {k: v for k, v in fields.items() if k != "tokenizer.ggml.add_bos_token"}
    assert not from_gguf(without).add_bos
    assert from_gguf({**without, "tokenizer.ggml.pre": "llama-bpe"}).add_bos


def test_a_turn_end_that_the_file_forgot_to_mark_ends_turns():
    spm = sentencepiece_fields()
    tokens = [*spm["tokenizer.ggml.tokens"][:-1], "<|im_end|>"]
    tokenizer = from_gguf({**spm, "tokenizer.ggml.tokens": tokens})
    assert len(tokens) - 1 in tokenizer.eos_ids
    assert len(tokens) - 1 in tokenizer.special_ids


@pytest.mark.parametrize("name", ["kimi-k9", "no-such", 7, None])
def test_unknown_pre_tokenizer_is_refused_by_name(fields, name):
    with pytest.raises(UnsupportedModelError, match=repr(name)):
        from_gguf({**fields, "tokenizer.ggml.pre": name})


def test_unknown_tokenizer_is_refused_by_name(fields):
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        from_gguf({**fields, "tokenizer.ggml.model": "bert"})


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.tokens": ["a", "b"]},
        {"tokenizer.ggml.tokens": [1, 2]},
        {"tokenizer.ggml.merges": ["one"]},
        {"tokenizer.ggml.merges": None},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.token_type": 3},
    ],
)
def test_contradictory_vocabularies_are_refused(fields, change):
    with pytest.raises(CheckpointError) as e:
        from_gguf({**fields, **change})
    assert str(e.value).count("\n") == 1


def test_absurd_token_ids_are_ignored(fields):
    tokenizer = from_gguf(
        {**fields, "tokenizer.ggml.bos_token_id": 1 << 31, "tokenizer.ggml.eos_token_id": "x"}
    )
    assert tokenizer.bos_id is None
    assert tokenizer.eos_ids == {0, 2}  # found by their spelling
