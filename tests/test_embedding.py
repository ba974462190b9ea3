"""Embeddings of folders that sentence-transformers wrote, against transformers' own hidden states."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from families import SHAPE
from tiny import byte_tokenizer, tiny_folder

import tinychat
from tinychat.base.errors import CheckpointError, UnsupportedModelError, UsageError
from tinychat.formats.embedder import Pooling
from tinychat.hub.huggingface import choose_files

TEXTS = [
    "A short text.",
    "A longer Text: und noch ein Stück davon, damit er länger ist. " * 2,
    "<|im_start|>",
]
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def say(folder, modules=(TRANSFORMER, POOLING, NORMALIZE), pooling=None, **files):
    """Write what sentence-transformers says in a folder."""
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(list(modules)))
    pooling = {"pooling_mode_lasttoken": True} if pooling is None else pooling
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)
    ).eval()


@pytest.fixture
def folder(network, tmp_path):
    """Its folder, with a tokenizer that ends each text with a token."""
    network.save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 257)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def states(network, folder, prompt: str) -> np.ndarray:
    """Its last hidden states. Markers that a text spells are plain text, as everywhere."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    ids = backend.encode(prompt).ids
    assert ids[-1] == 257
    assert len(ids) == len(prompt.encode()) + 1
    with torch.inference_mode():
        return network.model(torch.tensor([ids])).last_hidden_state[0].numpy()


@pytest.mark.parametrize("mode", ["mean_tokens", "lasttoken"])
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_vectors_are_those_of_transformers(network, folder, mode, device):
    say(
        folder,
        pooling={
            "pooling_mode_mean_tokens": mode == "mean_tokens",
            "pooling_mode_lasttoken": mode == "lasttoken",
        },
    )
    exact = device == "reference"
    options = {"quantize": "none", "act_bits": None if exact else 16}
    with tinychat.load(folder, device=device, ctx=200, **options) as model:
        found = model.embed(TEXTS)
        cut = model.embed(TEXTS[:1], dimensions=8)
    for text, vector in zip(TEXTS, found, strict=True):
        rows = states(network, folder, text)
        expected = rows[-1] if mode == "lasttoken" else rows.mean(0)
        expected /= np.linalg.norm(expected)
        assert np.abs(vector - expected).max() < (1e-5 if exact else 3e-3)
        assert np.dot(vector, expected) > (1 - 1e-6 if exact else 1 - 1e-4)
    assert cut.shape == (1, 8)
    assert np.allclose(cut[0], found[0][:8] / np.linalg.norm(found[0][:8]), atol=1e-6)


def test_what_the_folder_says_of_texts_holds(network, folder):
    """A prompt before each, lower case, no length of one, and how long they may be."""
    say(
        folder,
        modules=[TRANSFORMER, POOLING],
        config_sentence_transformers={"prompts": {"query": "Ask: "}, "default_prompt_name": "query"},
        sentence_bert_config={"do_lower_case": True, "max_seq_length": 50},
    )
    with tinychat.load(folder, device="reference", quantize="none", ctx=200) as model:
        (vector,) = model.embed(["LOUD"])
        assert np.abs(vector - states(network, folder, "Ask: loud")[-1]).max() < 1e-4
        with pytest.raises(UsageError, match="50"):
            model.embed(["x" * 60])
        for wrong in ([], [""], [3]):
            with pytest.raises(UsageError):
                model.embed(wrong)
        for refused in (lambda: model.chat("hi"), lambda: model.session(), lambda: list(model.generate("x"))):
            with pytest.raises(UsageError, match="does not chat"):
                refused()


def test_a_chat_model_makes_none(tmp_path):
    model = tinychat.load(tiny_folder(tmp_path / "tiny"), device="reference", quantize="none")
    with model, pytest.raises(UsageError, match="chat model"):
        model.embed(["text"])


@pytest.mark.parametrize(
    ("modules", "pooling"),
    [
        ([TRANSFORMER, POOLING, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], None),
        ([TRANSFORMER], None),
        ([POOLING, TRANSFORMER], None),
        ([TRANSFORMER, POOLING], {"pooling_mode_cls_token": True}),
        ([TRANSFORMER, POOLING], {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}),
        ([TRANSFORMER, POOLING], {}),
        ([{**TRANSFORMER, "path": "0_Transformer"}, POOLING], None),
    ],
)
def test_other_ways_to_a_vector_are_refused_by_name(tmp_path, modules, pooling):
    say(tmp_path, modules, pooling)
    with pytest.raises(UnsupportedModelError):
        Pooling.of(tmp_path)


@pytest.mark.parametrize("path", ["../1_Pooling", "/etc", "", "a/b"])
def test_a_folder_reads_its_own_files(tmp_path, path):
    say(tmp_path, [TRANSFORMER, {**POOLING, "path": path}])
    with pytest.raises(CheckpointError):
        Pooling.of(tmp_path)


@pytest.mark.parametrize("content", ["{", "3", "[3]", "[" * 100_000, '["x"]'])
def test_damaged_settings_are_an_error(tmp_path, content):
    say(tmp_path)
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError):
        Pooling.of(tmp_path)


def test_the_pooling_is_pulled_with_a_model_and_missed_without(tmp_path):
    names = ["config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "onnx/config.json"]
    assert choose_files("owner/repo", names, None) == sorted(names[:4])
    say(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="lacks 1_Pooling"):
        Pooling.of(tmp_path)
