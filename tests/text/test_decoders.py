"""Ids to text, against the `tokenizers` library's own decoders: at once, in a stream, cut by stop strings."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from tinychat.base.errors import UnsupportedModelError
from tinychat.text.stopping import StopMatcher, cut_ids
from tinychat.text.tokenizer import StreamDecoder, Tokenizer

BYTES = [f"<0x{b:02X}>" for b in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<|end|>"]
PIECES = [*"abcdeé中🙂:\n()", "▁", "▁a", "▁b", "▁▁a", "a▁b", "ab", "▁ab▁", "<0x+1>", "Ġ", "Ġa", "ĠĠ"]
# Added tokens: spaces, blank lines, markers that nobody calls special, letters that byte-level tables know.
ADDED = ["▁▁", "▁▁▁▁", "  ", "\n\n", "<think>", "<｜User｜>", "▁<x>", "é", "Ã", "a b", "Ġword", "日本"]
REPLACE, FALLBACK, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
SHAPES = {
    "llama": [REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 0)],
    "gemma": [REPLACE, FALLBACK, FUSE],
    "without fuse": [REPLACE, FALLBACK],
    "replaced at the end": [FALLBACK, FUSE, REPLACE],
    "strips two": [REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 2, 0)],
    "strips each": [decoders.Strip("▁", 1, 0), REPLACE, FALLBACK, FUSE],
    "metaspace": decoders.Metaspace(),
    "metaspace first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "metaspace, fused": [decoders.Metaspace(), FUSE],
    "nested": [decoders.Sequence([REPLACE, FALLBACK]), decoders.Sequence([FUSE])],
    "byte-level": decoders.ByteLevel(),
    "byte-level, stripped": [decoders.ByteLevel(), decoders.Strip(" ", 1, 0)],
    "other replacements": [decoders.Replace("▁", "  "), decoders.Replace("ab", "_"), FALLBACK, FUSE],
}


def library(decoder) -> tokenizers.Tokenizer:
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*SPECIAL, *BYTES, *PIECES]))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(decoder) if isinstance(decoder, list) else decoder
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED])
    return backend


@pytest.fixture(scope="module", params=SHAPES)
def pair(request):
    """The library's tokenizer, and ours read from its file."""
    theirs = library(SHAPES[request.param])
    return theirs, Tokenizer(tokenizers.Tokenizer.from_str(theirs.to_str()))


IDS = st.lists(
    st.one_of(
        st.integers(0, 310), st.integers(5, 260), st.sampled_from([0xE2 + 5, 0x82 + 5, 0xAC + 5, 10**6])
    ),
    max_size=30,
)


@given(ids=IDS, skip=st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_shape_decodes_as_the_library_does(pair, ids, skip):
    theirs, ours = pair
    expected = theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids, skip_special=skip) == expected
    stream = StreamDecoder(ours, skip_special=skip)
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == expected


@given(ids=IDS)
@settings(max_examples=40, deadline=None)
def test_what_goes_on_is_what_the_library_adds(pair, ids):
    """Text that goes on keeps its first space: decoded behind a letter it is the same."""
    theirs, ours = pair
    letter = theirs.token_to_id("c")
    assert "c" + ours.decode(ids, continued=True) == theirs.decode([letter, *ids])


def test_stop_strings_with_spaces_match_added_tokens_of_spaces():
    ours = Tokenizer(library(SHAPES["gemma"]))
    ids = [ours.backend.token_to_id(t) for t in ("a", ":", "\n", "▁▁▁▁", "b", "c")]
    stream, matcher = StreamDecoder(ours, continued=True), StopMatcher(("\n    b",))
    said = "".join(matcher.push(stream.push(i)) for i in ids)
    assert (said, matcher.matched) == ("a:", "\n    b")
    assert ours.decode(cut_ids(ours, ids, said), continued=True) == "a:"


def test_token_bytes_are_what_a_token_says_within_a_text():
    ours = Tokenizer(library(SHAPES["llama"]))
    said = {t: ours.token_bytes(ours.backend.token_to_id(t)) for t in ("▁▁▁▁", "<0xE2>", "▁a", "<think>")}
    assert said == {"▁▁▁▁": b"    ", "<0xE2>": b"\xe2", "▁a": b" a", "<think>": b"<think>"}


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.BPEDecoder(),
        [FALLBACK, decoders.WordPiece()],
        [FALLBACK, FUSE, decoders.Replace("ab", "c")],
        [decoders.Replace(tokenizers.Regex("a+"), "b"), FALLBACK],
        [decoders.Replace("▁", "x" * 100_000), FALLBACK],
        [FUSE, FALLBACK],
        FUSE,
        None,
    ],
    ids=str,
)
def test_other_decoders_are_refused_by_name(decoder):
    backend = library(decoder) if decoder is not None else library(decoders.Fuse())
    if decoder is None:
        content = json.loads(backend.to_str()) | {"decoder": None}
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match="decoder") as e:
        Tokenizer(backend)
    assert str(e.value).count("\n") == 1


def test_a_gemma_folder_keeps_its_indentation(tmp_path):
    backend = library(SHAPES["gemma"])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_hf(tmp_path)
    text = "a:\n    b\n        c"
    assert ours.encode(text) == backend.encode(text).ids
    assert ours.decode(ours.encode(text)) == text
