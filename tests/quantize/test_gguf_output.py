"""GGUF files that the quantizer writes: read by the gguf package and by ours, from GGUF and from folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from families import CASES, random_model, relative_error
from family_gguf import write as write_gguf
from gguf import GGUFReader
from gguf.quants import dequantize
from memories import allocate, step_of
from tiny import TEMPLATE, TinyCheckpoint
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import TinychatError, UnsupportedModelError, UsageError
from tinychat.formats.gguf import GGUFCheckpoint
from tinychat.formats.gguf_tokenizer import from_gguf
from tinychat.formats.gguf_vocabulary import fields_of
from tinychat.formats.hf import HFCheckpoint
from tinychat.network.weight_policy import WeightPolicy
from tinychat.quantize import gguf_output, quantize, tune
from tinychat.quantize.target import GGUF_TYPES
from tinychat.text.tokenizer import Tokenizer

IDS = np.random.default_rng(3).integers(1, 256, 24).astype(np.int32)


def logits(checkpoint) -> np.ndarray:
    """Logits [T, vocab] of the dequantized weights, by the reference backend."""
    backend = ReferenceBackend(checkpoint, WeightPolicy("none", 16))
    allocate(backend, 4)
    return backend.step(step_of(backend, IDS, 0, 0, np.arange(4, dtype=np.int32), 0))


def word_tokenizer() -> Tokenizer:
    """GPT-2's way with two merges: bytes 0…255, "th" 256, "the" 257, then <|im_start|> and <|im_end|>."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    t = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(tokens)}, [("t", "h"), ("th", "e")]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(t, eos_ids={259}, chat_template=TEMPLATE)


def folder_of(case: str, folder: Path) -> HFCheckpoint:
    """A tiny model of a family as a folder, with more embeddings than tokens."""
    cls, changes = CASES[case]
    random_model(cls, **changes | {"vocab_size": 264, "eos_token_id": 259}).save_pretrained(folder)
    word_tokenizer().save(folder)
    return HFCheckpoint(folder)


@pytest.fixture
def source(tmp_path) -> GGUFCheckpoint:
    """A tiny Llama with 256 inputs to `down`, and 64 to all else."""
    cls, changes = CASES["mistral window"]
    hf = random_model(cls, **changes | {"intermediate_size": 256, "hidden_size": 64})
    write_gguf(tmp_path / "source.gguf", hf, "llama")
    return GGUFCheckpoint(tmp_path / "source.gguf")


@pytest.mark.parametrize("kind", [t for types in GGUF_TYPES.values() for t in types])
def test_every_type_is_read_by_the_gguf_package_as_it_was_meant(tmp_path, source, text, kind):
    bits = 8 if kind == "Q8_0" else 4
    out = tmp_path / "out.gguf"
    facts = quantize(source, out, bits=bits, gguf_type=kind, method="rtn", calib_file=text)
    layers = source.config.n_layers
    assert facts["substitutes"] == ({"Q5_0": 6 * layers} if kind == "Q4_K" else {})
    ours, theirs = GGUFCheckpoint(out), GGUFReader(out)
    types = {t.name: t.tensor_type.name for t in theirs.tensors}
    assert types["blk.0.ffn_down.weight"] == kind
    assert types["blk.0.attn_q.weight"] == ("Q5_0" if kind == "Q4_K" else kind)
    names = {"blk.1.ffn_up.weight": "up_proj", "blk.1.ffn_down.weight": "down_proj"}
    for t in theirs.tensors:
        if name := names.get(t.name):
            got = ours.linear(f"model.layers.1.mlp.{name}").dequantize()
            np.testing.assert_array_equal(got, dequantize(t.data, t.tensor_type))
    assert relative_error(logits(ours), logits(source)) < (0.06 if bits == 8 else 0.35)


def test_tuning_moves_super_scales_and_norms(tmp_path, source, text, monkeypatch):
    monkeypatch.setattr(tune, "PLAN", tune.Schedule(steps=8, warmup=2, held_out=2, every=4))
    wishes = {"method": "rtn", "ranges": "whole", "calib_file": text, "gguf_type": "Q4_K"}
    quantize(source, tmp_path / "plain.gguf", **wishes)
    facts = quantize(source, tmp_path / "tuned.gguf", tune=True, **wishes)
    assert facts["tuned"]["divergence_after"] < facts["tuned"]["divergence_before"]
    plain, tuned = (GGUFCheckpoint(tmp_path / name) for name in ("plain.gguf", "tuned.gguf"))
    a, b = (c.linear("model.layers.1.mlp.down_proj") for c in (plain, tuned))
    assert a.form == b.form
    for x, y in ((a, b), (a.scales, b.scales), (a.offsets, b.offsets)):
        assert np.array_equal(x.codes, y.codes)
    assert not np.array_equal(a.scales.times, b.scales.times)
    norm = "model.layers.1.input_layernorm"
    assert not np.array_equal(plain.vector(norm), tuned.vector(norm))


def test_metadata_and_tokenizer_are_carried_over(tmp_path, source):
    out = tmp_path / "out.gguf"
    quantize(source, out, method="rtn", ranges="whole", gguf_type="Q4_0")
    before, after = GGUFReader(source.path).fields, GGUFReader(out).fields
    for key, field in before.items():
        if not key.startswith(("GGUF.", "general.file_type", "general.quantization_version")):
            assert after[key].contents() == field.contents(), key
            assert after[key].types == field.types, key
    assert after["general.file_type"].contents() == 2
    assert json.loads(after[gguf_output.MADE].contents())["method"] == "rtn"
    assert GGUFCheckpoint(out).config == source.config


@pytest.mark.parametrize(
    "case",
    [
        "mistral window",
        "qwen2",
        "qwen3 bias",
        "phi3 longrope",
        "smollm3",
        "olmo2",
        "granite",
        "gemma3",
        "mixtral",
        "qwen3moe",
        "qwen2moe",
    ],
)
def test_a_folder_becomes_a_gguf_that_computes_the_same(tmp_path, case):
    source = folder_of(case, tmp_path / "folder")
    quantize(source, tmp_path / "out.gguf", bits=8, method="rtn", ranges="whole")
    written = GGUFCheckpoint(tmp_path / "out.gguf")
    assert relative_error(logits(written), logits(source)) < 0.06
    text = "the other They'll say 1,234 naïve things.\n\n  你好"
    assert written.tokenizer().encode(text) == source.tokenizer().encode(text)
    assert written.tokenizer().eos_ids == source.tokenizer().eos_ids
    assert written.tokenizer().chat_template == source.tokenizer().chat_template


@pytest.mark.parametrize(
    "case", ["llama dynamic rope", "smollm3 window", "qwen3moe unnormalized", "qwen3moe dense layers"]
)
def test_a_network_that_gguf_has_no_words_for_is_refused_before_work(tmp_path, monkeypatch, case):
    source = folder_of(case, tmp_path / "folder")
    monkeypatch.setattr("tinychat.quantize._blocks", lambda *a: pytest.fail("work began"))
    with pytest.raises(UnsupportedModelError) as e:
        quantize(source, tmp_path / "out.gguf", method="rtn", ranges="whole")
    assert "--format" in e.value.todo


def test_a_gguf_with_experts_becomes_another_one(tmp_path):
    cls, changes = CASES["qwen2moe"]
    write_gguf(tmp_path / "m.gguf", random_model(cls, **changes, num_hidden_layers=2), "qwen2moe")
    source = GGUFCheckpoint(tmp_path / "m.gguf")
    quantize(source, tmp_path / "out.gguf", bits=8, method="rtn", ranges="whole")
    assert GGUFCheckpoint(tmp_path / "out.gguf").config == source.config
    shapes = {t.name: list(t.shape) for t in GGUFReader(tmp_path / "out.gguf").tensors}
    before = {t.name: list(t.shape) for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert shapes == before
    assert relative_error(logits(GGUFCheckpoint(tmp_path / "out.gguf")), logits(source)) < 0.06


def test_a_run_that_was_stopped_goes_on_and_gives_the_same_file(tmp_path, source, text, monkeypatch):
    options = dict(method="gptq", calib_file=text, gguf_type="Q4_K")
    write = gguf_output.OutputFile.write_block

    def write_one(self, layer, tensors):
        if layer == 1:
            raise TinychatError("Stopped.", "Go on.")
        write(self, layer, tensors)

    with monkeypatch.context() as m:
        m.setattr(gguf_output.OutputFile, "write_block", write_one)
        with pytest.raises(TinychatError):
            quantize(source, tmp_path / "out.gguf", **options)
    assert not (tmp_path / "out.gguf").exists()
    quantize(source, tmp_path / "out.gguf", **options)
    quantize(source, tmp_path / "whole.gguf", **options)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not list(tmp_path.glob(".*.partial"))


def test_only_our_own_files_are_replaced(tmp_path, source):
    with pytest.raises(UsageError, match="exists"):
        quantize(source, source.path, method="rtn", ranges="whole")
    quantize(source, tmp_path / "out.gguf", method="rtn", ranges="whole")
    first = (tmp_path / "out.gguf").read_bytes()
    quantize(source, tmp_path / "out.gguf", method="rtn", ranges="whole", bits=8)
    assert (tmp_path / "out.gguf").read_bytes() != first


@pytest.mark.parametrize(("out", "format"), [("out", "gguf"), ("out.gguf", "awq")])
def test_the_name_says_whether_it_is_a_file_or_a_folder(tmp_path, out, format):
    with pytest.raises(UsageError, match=r"\.gguf|a folder"):
        quantize(TinyCheckpoint(), tmp_path / out, format=format)


@torch.inference_mode()
def test_fitting_beats_rounding_in_q4_k(tmp_path, source, text):
    want, errors = logits(source), {}
    for method in ("awq", "rtn"):
        out = tmp_path / f"{method}.gguf"
        quantize(
            source, out, method=method, ranges="searched" if method == "awq" else "whole", calib_file=text
        )
        errors[method] = relative_error(logits(GGUFCheckpoint(out)), want)
    assert errors["awq"] < errors["rtn"]


def test_a_sentencepiece_vocabulary_is_said_by_scores():
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdehlorwt"]
    merges = [("l", "o"), ("h", "e"), ("he", "l"), ("hel", "lo"), ("▁", "hello"), ("o", "r"), ("▁", "w")]
    vocab = {t: i for i, t in enumerate([*alphabet, *(a + b for a, b in merges)])}
    t = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    t.add_special_tokens(["<s>", "</s>"])
    written = Tokenizer(t, bos_id=1, eos_ids={2}, add_bos=True, special_tokens={"bos_token": "<s>"})
    fields = {key: f.value for key, f in fields_of(written, len(vocab) + 5).items()}
    read = from_gguf(fields)
    for text in ("hello world", "hello  wor ld é", "low", ""):
        assert read.encode(text) == t.encode(text, add_special_tokens=False).ids
    assert (read.bos_id, set(read.eos_ids), read.add_bos) == (1, {2}, True)
    assert fields["tokenizer.ggml.token_type"][3] == 6


def test_a_tokenizer_that_splits_in_a_way_of_its_own_is_refused():
    t = word_tokenizer().backend
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("e", "isolated"), t.pre_tokenizer])
    with pytest.raises(UnsupportedModelError, match="way of its own"):
        fields_of(Tokenizer(t, eos_ids={259}), 264)
