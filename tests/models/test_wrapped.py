"""Folders of models that see as well: the text model in them, under every name that it has had."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import transformers
from families import CASES as FAMILIES
from families import DELTA, DELTA_MOE, SHAPE, logits_of, random_model, relative_error
from memories import allocate, step_of
from safetensors.numpy import load_file, save_file
from tiny import byte_tokenizer

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import UnsupportedModelError
from tinychat.formats.hf import HFCheckpoint, read_config
from tinychat.network.weight_policy import WeightPolicy
from tinychat.quantize import quantize

IDS = np.random.default_rng(1).integers(0, 258, 60).astype(np.int32)
VISION = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=16,
    image_size=28,
    patch_size=14,
)
GEMMA = dict(head_dim=16, sliding_window=24, query_pre_attn_scalar=16)
# wrapper → its text model's type and settings, and the type of what sees
CASES = {
    "Gemma3ForConditionalGeneration": ("gemma3_text", GEMMA, "siglip_vision_model"),
    "Mistral3ForConditionalGeneration": (
        "mistral",
        dict(sliding_window=None, head_dim=32),
        "pixtral",
    ),
    "Gemma4ForConditionalGeneration": (
        "gemma4_text",
        dict(FAMILIES["gemma4 tied"][1], pad_token_id=0),
        "gemma4_vision",
    ),
    "MuseGlimmerForConditionalGeneration": (
        "muse_glimmer_text",
        dict(head_dim=16, sliding_window=20, num_hidden_layers=5, qk_scale_factor=2.5, pad_token_id=0),
        "muse_glimmer_vision",
    ),
}


def wrapper(name: str):
    kind, text, vision = CASES[name]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    given = dict(
        text_config=dict(SHAPE, **text, model_type=kind), vision_config=dict(VISION, model_type=vision)
    )
    hf = cls(cls.config_class(**given, tie_word_embeddings=name.startswith("Gemma"))).float().eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return hf


def ours(folder, backend=ReferenceBackend, **options) -> np.ndarray:
    backend = backend(HFCheckpoint(folder), WeightPolicy("none", 16), **options)
    allocate(backend, 8)
    table = np.arange(8, dtype=np.int32)
    steps = [(0, 40), (40, 41), (41, 60)]
    return np.concatenate([backend.step(step_of(backend, IDS[a:b], a, a, table, 0)) for a, b in steps])


@pytest.mark.parametrize("experts", [{}, DELTA_MOE], ids=["dense", "experts"])
def test_the_text_model_of_a_qwen35_gives_the_logits_of_transformers(experts, tmp_path):
    moe = "Moe" if experts else ""
    cls = getattr(transformers, f"Qwen3_5{moe}ForConditionalGeneration")
    text = dict(SHAPE, **DELTA, **experts, head_dim=32, model_type=f"qwen3_5{moe and '_moe'}_text")
    sizes = dict(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, patch_size=14
    )
    torch.manual_seed(0)
    config = cls.config_class(text_config=text, vision_config=sizes, tie_word_embeddings=False)
    hf = cls(config).float().eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    hf.save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path)
    assert any(name.startswith("model.visual.") for name in load_file(tmp_path / "model.safetensors"))
    assert relative_error(ours(tmp_path), logits_of(hf, IDS)) < 1e-4


@pytest.fixture(params=CASES)
def saved(request, tmp_path):
    """The wrapper, and its folder."""
    hf = wrapper(request.param)
    hf.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save(tmp_path / "whole")
    return hf, tmp_path / "whole"


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_wrapper_gives_the_logits_of_transformers(saved, prefix):
    hf, folder = saved
    file = folder / "model.safetensors"
    head = "lm_head." if prefix == "model.language_model." else "language_model.lm_head."

    def renamed(name: str) -> str:
        for old in ("language_model.model.", "model.language_model."):
            if name.startswith(old):
                return prefix + name.removeprefix(old)
        return (
            head + name.removeprefix("language_model.").removeprefix("lm_head.")
            if "lm_head." in name
            else name
        )

    tensors = {renamed(name): t for name, t in load_file(file).items()}
    assert any(name.startswith(prefix) for name in tensors)
    assert any("vision" in name for name in tensors)
    save_file(tensors, file)
    assert relative_error(ours(folder), logits_of(hf, IDS)) < 1e-4


def test_the_cpu_runs_it_too(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    hf, folder = saved
    assert relative_error(ours(folder, CpuBackend, threads=2), logits_of(hf, IDS)) < 3e-3


def test_a_quantized_wrapper_is_written_as_its_text_model(saved, tmp_path):
    hf, folder = saved
    quantize(HFCheckpoint(folder), tmp_path / "out", method="rtn", bits=8, ranges="whole", group_size=32)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "text_config" not in written
    assert "vision_config" not in written
    assert type(transformers.AutoConfig.for_model(**written)) is type(hf.config.text_config)
    assert relative_error(ours(tmp_path / "out"), logits_of(hf, IDS)) < 0.1


@pytest.mark.parametrize("case", ["gemma3n", "gemma4 unified"])
def test_a_text_model_under_the_names_of_a_wrapper_gives_the_same_logits(case, tmp_path):
    # what sees and hears in these takes libraries of its own to be made
    cls, changes = FAMILIES[case]
    hf, folder = random_model(cls, **changes), tmp_path / "model"
    hf.save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text())
    given = {"architectures": [cls.replace("ForCausalLM", "ForConditionalGeneration")], "text_config": text}
    (folder / "config.json").write_text(json.dumps(given))
    tensors = load_file(folder / "model.safetensors").items()
    renamed = {re.sub(r"^model\.", "model.language_model.", name): t for name, t in tensors}
    seen = {"model.vision_tower.conv_stem.weight": np.zeros((2, 2), np.float32)}
    save_file(renamed | seen, folder / "model.safetensors")
    assert relative_error(ours(folder), logits_of(hf, IDS)) < 1e-4


def test_what_the_folder_says_itself_ends_an_answer():
    text = dict(SHAPE, model_type="gemma3_text", head_dim=16, eos_token_id=1)
    given = dict(architectures=["Gemma3ForConditionalGeneration"], text_config=text, eos_token_id=[1, 106])
    assert read_config(given).eos_ids == (1, 106)


def test_a_wrapper_of_an_unknown_text_model_is_refused_by_name():
    given = dict(architectures=["Mistral3ForConditionalGeneration"], text_config=dict(model_type="mamba"))
    with pytest.raises(UnsupportedModelError, match="mamba") as e:
        read_config(given)
    assert len(str(e.value).splitlines()) == 2
    for strange in (["mistral"], {}, 5):
        given["text_config"] = dict(model_type=strange)
        with pytest.raises(UnsupportedModelError):
            read_config(given)
    for nothing in (None, [], "text"):
        with pytest.raises(UnsupportedModelError):
            read_config(dict(architectures=["Gemma3ForConditionalGeneration"], text_config=nothing))
