"""Encoding, decoding and streaming, with the demo model's vocabulary and a small SentencePiece one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from golden import GOLDEN, sentencepiece_fields
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.errors import CheckpointError, UnsupportedModelError
from tinychat.formats.gguf import GGUFFile
from tinychat.formats.gguf_tokenizer import from_gguf
from tinychat.tokenizer import StreamDecoder, Tokenizer

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
    assert spm.decode(spm.encode(text)) == text
    if all(b in known or b >= 0x80 for b in text.encode()) and max(map(ord, text), default=0) < 0x40000:
        assert demo.decode(demo.encode(text)) == text


def spm_bytes(i: int) -> bytes:
    """By hand: <0x0A> is a byte, control tokens say nothing, ▁ is a space."""
    token, kind = GOLDEN["sentencepiece"]["tokens"][i], GOLDEN["sentencepiece"]["types"][i]
    if kind in (2, 3):
        return b""
    return bytes.fromhex(token[3:5]) if kind == 6 else token.replace("▁", " ").encode()


@given(ids=SPM_IDS, continued=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_sentencepiece_stream_is_its_bytes_read_as_utf8(spm, ids, continued):
    expected = b"".join(map(spm_bytes, ids)).decode("utf-8", "replace")
    if not continued:
        expected = expected.removeprefix(" ")
    assert "".join(streamed(spm, ids, continued=continued)) == expected
    assert spm.decode(ids, continued=continued) == expected


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_a_sentencepiece_stream_of_real_text_is_what_the_library_decodes(spm, text):
    ids = spm.encode(text)
    assert "".join(streamed(spm, ids)) == spm.backend.decode(ids, skip_special_tokens=True)


@given(text=st.text(st.sampled_from("aé中🙂👩\u200d 🇩🇪"), max_size=20), data=st.data())
@settings(max_examples=200, deadline=None)
def test_what_a_stream_has_said_stands_and_no_character_breaks(spm, text, data):
    ids = spm.encode(text)
    pieces = streamed(spm, ids, continued=True)
    assert "\ufffd" not in "".join(pieces)
    said = ""
    for i, piece in enumerate(pieces[:-1]):
        said += piece
        whole = b"".join(map(spm_bytes, ids[: i + 1]))
        # everything that is certain was said: at most an unfinished character is held back
        assert whole.startswith(said.encode())
        assert len(whole) - len(said.encode()) <= 3


def test_an_unfinished_character_comes_out_as_replacement_at_the_end(spm):
    euro = [3 + b for b in "€".encode()]
    assert streamed(spm, euro) == ["", "", "€", ""]
    assert streamed(spm, euro[:2]) == ["", "", "\ufffd"]
    assert streamed(spm, [euro[0], 3 + ord("a")]) == ["", "\ufffda", ""]


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
        "import sys, tinychat.tokenizer; "
        "print([m for m in ('tokenizers', 'torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
