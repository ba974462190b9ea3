"""Tokenizers of strangers: each is read, or refused in two lines, before it takes memory or time."""

from __future__ import annotations

import copy
import json
import re
import time
from pathlib import Path

import pytest
import tokenizers
from tiny import TEMPLATE, byte_tokenizer, tiny_folder

import tinychat
from tinychat.base.errors import CheckpointError, TinychatError
from tinychat.formats.gguf_tokenizer import from_gguf
from tinychat.text.template import ChatTemplate
from tinychat.text.tokenizer import Tokenizer

PLAIN = json.loads(byte_tokenizer().to_json())
BYTES = PLAIN["pre_tokenizer"]


def added(i: int, content: str, **flags) -> dict:
    flags = {f: False for f in ("single_word", "lstrip", "rstrip", "normalized", "special")} | flags
    return {"id": i, "content": content, **flags}


def with_added(*tokens: dict) -> dict:
    return {"added_tokens": [*PLAIN["added_tokens"], *tokens]}


def splits(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTES]}}


def replaces(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def normalizes(*steps: dict) -> dict:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def folder(path: Path, changes: dict, config: dict | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps({**PLAIN, **changes}), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, **(config or {})}))
    return path


def ids_of(tokenizer: Tokenizer, said: str) -> list[int]:
    t = ChatTemplate(TEMPLATE, tokenizer)
    return t.encode(t.render([{"role": "user", "content": said}]))


FIXED = {"direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}


@pytest.mark.parametrize(
    "stored",
    [
        {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}},
        {"truncation": {"direction": "Left", "max_length": 0, "strategy": "OnlyFirst", "stride": 0}},
        {"padding": {**FIXED, "strategy": {"Fixed": 10**8}}},
        {"padding": {**FIXED, "strategy": "BatchLongest", "pad_to_multiple_of": 64}},
    ],
)
def test_stored_truncation_and_padding_are_left_out(tmp_path, stored):
    ours = Tokenizer.from_hf(folder(tmp_path, stored))
    said = "a question of more than sixty-four characters, which is easily cut or padded"
    assert ids_of(ours, said) == ids_of(byte_tokenizer(), said)
    assert json.loads(ours.to_json())["padding"] is None


STRANGE = {
    "a pattern that backtracks": splits(r"(a+)+$"),
    "words that backtrack": splits(r"(?:\w+\s?)*(?=!!)"),
    "blanks that backtrack": splits(r"(\s|\s\s)+\d"),
    "blanks that backtrack to a letter": splits(r"(\s|\s\s)+x"),
    "a letter that backtracks": splits(r"(q+q+)+Z"),
    "a normalizer that backtracks": {"normalizer": replaces({"Regex": "(a|aa)+$"}, "b")},
    "a long replacement": {"normalizer": replaces({"String": "e"}, "x" * 100_000)},
    "replacements of replacements": normalizes(*[replaces({"String": "a"}, "a" * 10)] * 9),
    "replacements between letters": {"normalizer": replaces({"Regex": "b*"}, "x" * 600)},
    "a long beginning": {"normalizer": {"type": "Prepend", "prepend": "x" * 3_000_000}},
    "many beginnings": normalizes(*[{"type": "Prepend", "prepend": "x" * 900}] * 50),
    "a cut table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////////w=="}},
    "no table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}},
    "a long token": with_added(added(258, "x" * 3_000_000, special=True)),
    "a rather long token": with_added(added(258, "y" * 2000)),
    "long tokens": with_added(*[added(258 + i, f"{i}" * 100_000) for i in range(12)]),
    "too many tokens": with_added(*[added(258 + i, f"<{i}>") for i in range(1001)]),
    "tokens around every text": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}] * 2000,
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
            },
        }
    },
    "an unknown token that is missing": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "z"}},
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_takes_memory_or_time_is_refused_at_once(tmp_path, name, capfd, monkeypatch):
    monkeypatch.setattr("tinychat.text.tokenizer_file.MAX_ADDED", 1000)
    began = time.process_time()
    with pytest.raises(CheckpointError) as e:
        Tokenizer.from_hf(folder(tmp_path, STRANGE[name]))
    assert str(e.value).count("\n") == 1
    assert len(str(e.value)) < 1000
    assert time.process_time() - began < 10
    assert capfd.readouterr().err == ""  # nor does a panic write its page


def test_letters_that_hide_behind_numbers_do_not_hide_a_table(tmp_path):
    content = json.dumps({**PLAIN, **STRANGE["a cut table"]})
    hidden = content.replace("Precompiled", "\\u0050recompiled")
    (tmp_path / "tokenizer.json").write_text(hidden)
    with pytest.raises(CheckpointError, match="cut off"):
        Tokenizer.from_hf(tmp_path)


def test_a_text_that_the_tokenizer_fails_on_is_said_in_two_lines(tmp_path):
    """A pattern that only one letter sends backtracking, and that does not name it."""
    ours = Tokenizer.from_hf(folder(tmp_path, splits(r"(\x71+)+$")))
    assert ours.decode(ours.encode("an honest text")) == "an honest text"
    with pytest.raises(CheckpointError) as e:
        ours.encode("q" * 40 + "!")
    assert str(e.value).count("\n") == 1
    assert ours.decode(ours.encode("and another")) == "and another"


def test_honest_normalizers_are_read(tmp_path):
    for i, steps in enumerate(
        (
            [{"type": "NFC"}],
            [{"type": "NFKC"}, {"type": "Lowercase"}],
            [{"type": "Prepend", "prepend": "▁"}, replaces({"String": " "}, "▁")],
            [replaces({"Regex": " {2,}"}, " "), {"type": "Strip", "strip_left": True, "strip_right": True}],
        )
    ):
        assert Tokenizer.from_hf(folder(tmp_path / str(i), normalizes(*steps))).encode("a b")


def test_added_tokens_without_an_embedding_are_plain_text(tmp_path):
    """As many fine-tunes have them: padding that nobody made room for."""
    path = tiny_folder(tmp_path / "model")
    folder(path, with_added(added(258, "<pad>", special=True), added(259, "<extra>")), {"pad_token": "<pad>"})
    with tinychat.load(path, device="cpu") as model:
        done = model.chat([{"role": "user", "content": "a<pad>b<extra>"}], max_tokens=2, temperature=0)
        assert done.finish_reason in ("length", "stop")
        ids = model.encode_prompt("a<extra><pad>")
        assert max(ids) < 258
        assert model.tokenizer.decode(ids) == "a<extra><pad>"


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        (with_added(added(258, "<tool>")), {"chat_template": TEMPLATE + "<tool>"}),
        (with_added(added(300, "<s>", special=True)), {"bos_token": "<s>", "add_bos_token": True}),
        ({"model": {**PLAIN["model"], "vocab": {**PLAIN["model"]["vocab"], "ab": 258}}}, {}),
        ({"model": {**PLAIN["model"], "vocab": {**PLAIN["model"]["vocab"], "ab": 4_000_000_000}}}, {}),
    ],
)
def test_a_model_that_needs_tokens_without_an_embedding_is_refused_at_load(tmp_path, changes, config):
    path = folder(tiny_folder(tmp_path / "model"), changes, config)
    with pytest.raises(CheckpointError, match=r"embedding|the id 4000000000"):
        tinychat.load(path, device="cpu")


SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], "▁", "a", "▁a"],
    "tokenizer.ggml.scores": [0.0] * 262,
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
}
BPE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*PLAIN["model"]["vocab"], "<|im_end|>"],
    "tokenizer.ggml.token_type": [*[1] * 256, 3],
    "tokenizer.ggml.merges": [],
}
JUNK = [
    None,
    "x",
    b"x",
    1.5,
    -1,
    1 << 70,
    True,
    [],
    [None],
    ["x"],
    [1.5] * 262,
    [float("nan")] * 262,
    ["1"] * 262,
]
JUNK += [[[1]] * 262, [1 << 70] * 262, {"a": 1}]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gguf_fields_of_other_types_are_refused_in_two_lines(kind):
    import numpy as np

    sound = SPM if kind == "llama" else BPE
    names = {*sound, "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_bos_token", "general.name"}
    names |= {f"tokenizer.ggml.{name}_token_id" for name in ("eos", "unknown", "padding", "eot")}
    names |= {"tokenizer.chat_template", "general.architecture", "tokenizer.ggml.pre"}
    read, said = 0, "\n"
    for name in sorted(names):
        for junk in [*JUNK, np.ones(262, "f4"), np.ones(262, "i4"), np.ones(3, "b"), np.zeros(0)]:
            fields = {**copy.copy(sound), name: junk}
            try:
                from_gguf(fields).encode("a")
                read += 1
            except TinychatError as e:
                said = str(e)
            assert said.count("\n") == 1, (name, junk)
            assert len(said) < 600
    assert read > 20


def test_a_gguf_with_one_long_token_is_refused_without_copying_it():
    for length in (150_000, 5_000_000):
        fields = {**SPM, "tokenizer.ggml.tokens": [*SPM["tokenizer.ggml.tokens"][:-1], "a" * length]}
        began = time.process_time()
        with pytest.raises(CheckpointError, match=f"{length} characters"):
            from_gguf(fields)
        assert time.process_time() - began < 2


def test_a_gguf_with_many_long_tokens_is_refused():
    more = [f"{i:04}" * 250 for i in range(400)]
    tokens = [*SPM["tokenizer.ggml.tokens"], *more]
    fields = {**SPM, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [0.0] * len(tokens)}
    fields["tokenizer.ggml.token_type"] = [*SPM["tokenizer.ggml.token_type"], *[1] * len(more)]
    with pytest.raises(CheckpointError, match="long tokens"):
        from_gguf(fields)


def test_no_panic_of_the_library_escapes():
    """What the library does with these shows that `guarded` is needed."""
    broken = tokenizers.Tokenizer.from_str(json.dumps({**PLAIN, **splits(r"(q+)+$")}))
    with pytest.raises(BaseException, match="retry-limit") as e:
        broken.encode("q" * 40 + "!")
    assert not isinstance(e.value, Exception) or re.search("Onig", str(e.value))


def test_a_tokenizer_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    path = folder(tiny_folder(tmp_path / "model"), STRANGE["a long token"])
    monkeypatch.setattr("tinychat.loading.make_backend", None)
    with pytest.raises(CheckpointError, match="added token"):
        tinychat.load(path, device="cpu")


@pytest.mark.parametrize("spelled", ['"vocab"', '"voc\\u0061b"'])
@pytest.mark.parametrize("far", [(1 << 32) - 1, 1 << 31])
def test_an_id_that_no_vocabulary_reaches_is_refused(tmp_path, far, spelled):
    """In the place of another token's: the library would make a list of all ids up to it."""
    model = copy.deepcopy(PLAIN["model"])
    model["vocab"]["a"] = far
    file = folder(tmp_path, {"model": model}) / "tokenizer.json"
    file.write_text(file.read_text().replace('"vocab"', spelled))
    with pytest.raises(CheckpointError, match=str(far)):
        Tokenizer.from_hf(tmp_path)


@pytest.mark.parametrize("depth", [2, 3, 40])
def test_sequences_within_sequences_are_read(tmp_path, depth):
    inner = [{"type": "Nmt"}, {"type": "Prepend", "prepend": "x"}]
    for _ in range(depth):
        inner = [{"type": "Sequence", "normalizers": inner}, {"type": "Nmt"}]
    content = {"normalizer": {"type": "Sequence", "normalizers": inner}}
    ours = Tokenizer.from_hf(folder(tmp_path, content))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.encode("hello") == theirs.encode("hello", add_special_tokens=False).ids
