"""Encoding, decoding and streaming, with the demo model's vocabulary and a small SentencePiece one."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest
import tokenizers
from golden import GOLDEN, sentencepiece_fields
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.formats.gguf_file import GGUFFile
from tinychat.formats.gguf_tokenizer import from_gguf
from tinychat.text.tokenizer import SOME_TEXT, StreamDecoder, Tokenizer
from tinychat.text.tokenizer_file import cuts_words

IDS = st.lists(st.integers(0, 49151), max_size=40)
N_SPM = len(GOLDEN["sentencepiece"]["tokens"])
SPM_IDS = st.lists(st.one_of(st.integers(0, N_SPM - 1), st.integers(3, 258)), max_size=40)


@pytest.fixture(scope="module")
def demo(demo_gguf):
    return from_gguf(GGUFFile(demo_gguf).fields)


@pytest.fixture(scope="module")
def spm():
    return from_gguf(sentencepiece_fields())


def streamed(tokenizer, ids, **options):
    stream = StreamDecoder(tokenizer, **options)
    return [*(stream.push(i) for i in ids), stream.flush()]


@given(ids=IDS, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_stream_says_what_the_library_decodes_at_once(demo, ids, skip):
    assert "".join(streamed(demo, ids, skip_special=skip)) == demo.backend.decode(
        ids, skip_special_tokens=skip
    )


@given(text=st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_every_text_survives_the_round_trip(demo, spm, text):
    known = {i for i in range(256) if demo.encode(bytes([i]).decode("latin-1"))}
    assert spm.decode(spm.encode(text)) == text.replace("▁", " ")  # SentencePiece cannot tell them apart
    if all(b in known or b >= 0x80 for b in text.encode()) and max(map(ord, text), default=0) < 0x40000:
        assert demo.decode(demo.encode(text)) == text


@given(ids=SPM_IDS, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_sentencepiece_stream_says_what_the_library_decodes_at_once(spm, ids, skip):
    library = tokenizers.Tokenizer.from_str(spm.to_json())
    expected = library.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(spm, ids, skip_special=skip)) == expected
    assert spm.decode(ids, skip_special=skip) == expected


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_a_sentencepiece_stream_of_real_text_is_what_the_library_decodes(spm, text):
    ids = spm.encode(text)
    assert "".join(streamed(spm, ids)) == spm.backend.decode(ids, skip_special_tokens=True)


@given(text=st.text(st.sampled_from("aé中🙂👩\u200d 🇩🇪"), max_size=20))
@settings(max_examples=200, deadline=None)
def test_what_a_stream_has_said_stands_and_no_character_breaks(demo, spm, text):
    for tokenizer in (demo, spm):
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids, continued=True)
        assert "\ufffd" not in "".join(pieces)
        said = b""
        for i, piece in enumerate(pieces[:-1]):
            said += piece.encode()
            whole = b"".join(map(tokenizer.token_bytes, ids[: i + 1]))
            # everything that is certain was said: an unfinished character is held back, and a run of bytes
            assert whole.startswith(said)
            run = i + 1
            while tokenizer is spm and run and 3 <= ids[run - 1] < 259:
                run -= 1
            assert len(whole) - len(said) <= max(3, i + 1 - run)


def test_a_run_of_bytes_that_is_no_text_comes_out_as_replacements(spm):
    euro = [3 + b for b in "€".encode()]
    (a,) = spm.encode("a", after=SOME_TEXT)
    assert streamed(spm, [*euro, a]) == ["", "", "", "€a", ""]
    assert streamed(spm, euro[:2]) == ["", "", "\ufffd\ufffd"]
    assert streamed(spm, [*euro, euro[0], a]) == ["", "", "", "", "\ufffd" * 4 + "a", ""]


def test_ids_outside_the_vocabulary_say_nothing(demo):
    assert demo.decode([10**9, -1, 49152, 1 << 40]) == ""
    assert demo.token_bytes(-5) == b""


def test_token_bytes_of_a_text_join_up_to_it(demo, spm):
    text = "naïve 🙂 12\n\tend"
    assert b"".join(map(demo.token_bytes, demo.encode(text))) == text.encode()
    assert b"".join(map(spm.token_bytes, spm.encode(text))) == b" " + text.encode()


def test_lone_surrogates_are_replaced_and_pairs_joined(demo):
    assert demo.decode(demo.encode("a\udcffb")) == "a\ufffdb"
    assert demo.decode(demo.encode("\ud83d\ude42")) == "🙂"


def test_special_tokens_show_only_when_asked_for(demo):
    ids = demo.encode("<|im_start|>user\nhi<|im_end|>", special=True)
    assert ids[0] == 1
    assert ids[-1] == 2
    assert demo.decode(ids) == "user\nhi"
    assert demo.decode(ids, skip_special=False) == "<|im_start|>user\nhi<|im_end|>"


def test_a_saved_tokenizer_is_read_back_the_same(demo, spm, tmp_path):
    for name, tokenizer in (("demo", demo), ("spm", spm)):
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.save(folder)
        again = Tokenizer.from_hf(folder)
        for text in GOLDEN["texts"][:150]:
            for special in (False, True):
                assert again.encode(text, special=special) == tokenizer.encode(text, special=special)
        for field in (
            "bos_id",
            "eos_ids",
            "special_ids",
            "add_bos",
            "chat_template",
            "special_tokens",
            "vocab_size",
        ):
            assert getattr(again, field) == getattr(tokenizer, field), field
        assert again.decode(again.encode("Hello you")) == "Hello you"


def test_transformers_reads_a_saved_tokenizer_to_the_same_ids(demo, spm, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is a test dependency")
    for name, tokenizer in (("demo", demo), ("spm", spm)):
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.save(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in GOLDEN["texts"][:150]:
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ids == tokenizer.encode(text, special=True), text
        starts = [tokenizer.bos_id] if tokenizer.add_bos else []
        assert theirs("Hi")["input_ids"] == starts + tokenizer.encode("Hi")
        assert theirs.chat_template == tokenizer.chat_template
        assert theirs.eos_token_id == tokenizer.backend.token_to_id(tokenizer.special_tokens["eos_token"])


def write_folder(folder, demo, config=None, **files):
    (folder / "tokenizer.json").write_text(demo.to_json(), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(
            content if isinstance(content, str) else json.dumps(content)
        )


def test_stop_tokens_come_from_every_file_that_names_some(demo, tmp_path):
    write_folder(
        tmp_path,
        demo,
        {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"},
        generation_config__json={"eos_token_id": [3, 4]},
        config__json={"eos_token_id": 5},
    )
    assert Tokenizer.from_hf(tmp_path).eos_ids == {0, 2, 3, 4, 5}


def test_the_template_file_wins_over_the_setting(demo, tmp_path):
    write_folder(tmp_path, demo, {"chat_template": "old"}, chat_template__jinja="new")
    assert Tokenizer.from_hf(tmp_path).chat_template == "new"


def test_the_default_of_several_templates_is_taken(demo, tmp_path):
    templates = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    write_folder(tmp_path, demo, {"chat_template": templates})
    assert Tokenizer.from_hf(tmp_path).chat_template == "D"


def test_a_folder_without_settings_is_enough(demo, tmp_path):
    write_folder(tmp_path, demo)
    tokenizer = Tokenizer.from_hf(tmp_path)
    assert tokenizer.chat_template is None
    assert not tokenizer.add_bos
    assert tokenizer.encode("Hi you") == demo.encode("Hi you")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0", "model": {"type": "No"}}', "\0\0"])
def test_a_damaged_tokenizer_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError) as e:
        Tokenizer.from_hf(tmp_path)
    assert str(e.value).count("\n") == 1


def test_damaged_settings_are_refused(demo, tmp_path):
    write_folder(tmp_path, demo, tokenizer_config__json="[1, 2")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.from_hf(tmp_path)


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
        Tokenizer.from_hf(tmp_path)


def test_importing_the_tokenizer_is_light():
    code = (
        "import sys, tinychat.text.tokenizer; "
        "print([m for m in ('tokenizers', 'torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_texts_are_not_remembered_by_the_thousands(demo, spm):
    """Words are, for each thread, and where nothing cuts a text into words it is one: 80 MB at the end."""
    tokenizer = byte_tokenizer()
    texts = [f"{i:x>250}" for i in range(2000)]
    before = 0
    for i, text in enumerate(texts):
        if i == 500:
            before = psutil.Process().memory_info().rss
        tokenizer.encode(text)
    assert psutil.Process().memory_info().rss - before < 3_000_000
    assert [cuts_words(t.backend) for t in (demo, spm, tokenizer)] == [True, False, False]
