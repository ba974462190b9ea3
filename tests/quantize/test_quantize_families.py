"""The quantizer on every family: its forward pass is transformers', its folder loads and is close."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import CASES, logits_of, random_model, relative_error
from family_gguf import write as write_gguf
from memories import allocate, step_of
from tiny import TinyCheckpoint, byte_tokenizer

from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import UnsupportedModelError
from tinychat.formats.gguf import GGUFCheckpoint
from tinychat.formats.hf import HFCheckpoint, read_config
from tinychat.models import llama
from tinychat.network.config import AttentionConfig, ModelConfig, RopeConfig
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import QuantizedLinear
from tinychat.quantize import block, quantize, settings, smooth
from tinychat.quantize.forward import Forward, read_block
from tinychat.quantize.grids import Grid, Symmetric
from tinychat.quantize.linears import quantized

FAMILIES = (
    "mistral window",
    "qwen2",
    "qwen3 bias",
    "phi3 partial",
    "phi3 window",
    "smollm3 listed",
    "olmo2",
    "granite tied",
    "gemma2",
    "gemma2 caps",
    "gemma3",
    "gemma3 scaled",
    "gemma4 tied",
    "llama yarn magnitude",
    "lfm2",
    "qwen3.5",
    "olmo3 yarn",
    "exaone4",
    "ernie4.5 bias",
    "seed_oss",
    "glm4",
    "ministral3",
    "hunyuan alpha",
    "granite_swa thetas",
    "granite-h",
    "granite-h groups",
    "nemotron-h bias",
    "falcon-h1 factors",
)
MIXTURES = (
    "mixtral window",
    "qwen3moe dense layers",
    "qwen2moe dense layers",
    "qwen3.5moe",
    "lfm2moe",
    "gemma4moe",
    "granite-h moe",
    "nemotron-h moe",
    "deepseek2moe",
    "deepseek3moe",
    "glm4moelite",
)
ONE_EACH = tuple(name for name in FAMILIES if name not in ("phi3 partial", "gemma2 caps", "gemma3"))
GGUF_CASES = {
    "mistral window": "llama",
    "llama yarn": "llama",
    "qwen2 yarn": "qwen2",
    "qwen3": "qwen3",
    "phi3 window": "phi3",
    "phi3 partial": "phi3",
    "phi3 longrope": "phi3",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma4 tied": "gemma4",
    "granite": "granite",
    "mixtral": "llama",
    "qwen3moe": "qwen3moe",
    "lfm2": "lfm2",
    "qwen3.5 listed": "qwen35",
    "qwen3next": "qwen3next",
    "olmo3": "olmo2",
    "exaone4": "exaone4",
    "exaone4 small": "exaone4",
    "ernie4.5": "ernie4_5",
    "seed_oss": "seed_oss",
    "glm4": "glm4",
    "ministral3": "mistral3",
    "hunyuan": "hunyuan-dense",
    "granite_swa": "granite_swa",
    "gpt-oss yarn": "gpt-oss",
    "qwen2moe": "qwen2moe",
    "granite-h": "granitehybrid",
    "granite-h moe": "granitehybrid",
    "falcon-h1": "falcon-h1",
    "nemotron-h": "nemotron_h",
    "nemotron-h moe": "nemotron_h_moe",
}
IDS = np.random.default_rng(1).integers(32, 127, 128).astype(np.int32)


@pytest.fixture
def source(request, tmp_path):
    """The case's model in a folder, and transformers' own."""
    cls, changes = CASES[request.param]
    hf = random_model(cls, **changes)
    hf.save_pretrained(tmp_path / "source")
    byte_tokenizer().save(tmp_path / "source")
    return HFCheckpoint(tmp_path / "source"), hf


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, np.random.default_rng(0).integers(32, 127, 2600))))
    return path


def forward(checkpoint, ids, weights=read_block) -> np.ndarray:
    """Logits [T, vocab] by the quantizer's forward pass."""
    f = Forward(checkpoint.config)
    embedding = torch.from_numpy(checkpoint.linear("model.embed_tokens").dequantize())
    tied = checkpoint.config.tie_embeddings
    head = embedding if tied else torch.from_numpy(checkpoint.linear("lm_head").dequantize())
    with torch.inference_mode():
        x = f.embed(embedding, torch.from_numpy(ids.astype(np.int64))[None])
        for layer in range(checkpoint.config.n_layers):
            x = f.block(x, weights(checkpoint, layer))
        return f.logits(x, torch.from_numpy(checkpoint.vector("model.norm")), head)[0].numpy()


def logits(folder: Path) -> np.ndarray:
    backend = ReferenceBackend(HFCheckpoint(folder), WeightPolicy("none", 16))
    allocate(backend, 8)
    return backend.step(step_of(backend, IDS, 0, 0, np.arange(8, dtype=np.int32), 0))


@pytest.mark.parametrize("source", FAMILIES + MIXTURES, indirect=True)
def test_the_forward_pass_is_that_of_transformers(source):
    checkpoint, hf = source
    assert relative_error(forward(checkpoint, IDS), logits_of(hf, IDS)) < 1e-4


@pytest.mark.parametrize(
    "source", [*FAMILIES, "qwen3moe dense layers", "qwen2moe", "deepseek3moe"], indirect=True
)
def test_folding_leaves_the_function_as_it_is(source, monkeypatch):
    """With rounding switched off, what is left of AWQ must be the same network, its scales far from one."""
    checkpoint, hf = source

    class Unrounded:
        def __init__(self, w):
            self.w = w

        def dequantize(self):
            return self.w

        def divide_rows(self, s):
            self.w = self.w / s[:, None]

    scales = {}
    quantize_group = block.BlockQuantizer._quantize

    def watched(self, group, *args):
        scales[group.names] = quantize_group(self, group, *args)
        return scales[group.names]

    monkeypatch.setattr(block, "compensated", lambda w, metric, grid, search=True: Unrounded(w))
    monkeypatch.setattr(block, "refine", lambda w, metric, r, rounds: r)
    monkeypatch.setattr(block.Metric, "loss", lambda self, w, r: 0.0)
    monkeypatch.setattr(block, "_better", lambda error, best: True)
    monkeypatch.setattr(block.BlockQuantizer, "_quantize", watched)
    cfg = checkpoint.config
    quantizer = block.BlockQuantizer(
        Forward(cfg), block.Options(lambda k: Grid(group=32), target="local", alphas=(0.0, 0.7))
    )
    x = torch.randn(4, 128, cfg.hidden_size)
    folded = []
    for layer in range(cfg.n_layers):
        result, _, x = quantizer(read_block(checkpoint, layer), x.clone(), x.clone())
        folded.append(result.weights())
        unscaled = [names for names, s in scales.items() if bool((s == 1).all())]
        unscaled = [names for names in unscaled if "linear_attn" not in names[0]]  # gates read that norm too
        unscaled = [names for names in unscaled if names != ("mixer.down_proj",)]  # behind a square
        unscaled = [names for names in unscaled if "expert" not in names[0] or "down_proj" in names[0]]
        if cfg.family in ("gemma4", "deepseek_v3"):  # values are normed, or made of a row by what stays
            unscaled = [names for names in unscaled if names != ("self_attn.o_proj",)]
        normed = any(
            hasattr(hf.model.layers[0], name) for name in ("input_layernorm", "operator_norm", "norm")
        )
        assert len(unscaled) == (0 if normed else 2)
    got = forward(checkpoint, IDS, lambda _, layer: folded[layer])
    assert relative_error(got, logits_of(hf, IDS)) < 2e-3  # folded norms and biases are in fp16


@pytest.mark.parametrize("source", ONE_EACH, indirect=True)
def test_smoothquants_folding_leaves_the_function_as_it_is(source, monkeypatch):
    checkpoint, hf = source
    cfg, x, folded = checkpoint.config, torch.randn(2, 64, checkpoint.config.hidden_size), []
    monkeypatch.setattr(smooth, "round_to_nearest", lambda w, grid, cfg: w)
    quantizer = smooth.SmoothQuantizer(Forward(cfg), lambda k: Symmetric(8, k), alphas=(0.7,))
    for layer in range(cfg.n_layers):
        folded.append(quantizer(read_block(checkpoint, layer), x)[0])
    assert relative_error(forward(checkpoint, IDS, lambda c, i: folded[i]), logits_of(hf, IDS)) < 2e-3


SLOW_MIXTURES = ("qwen2moe dense layers", "gemma4moe", "nemotron-h moe")
METHODS_FOR = ("qwen2", "gemma2", "gemma4 tied", "granite_swa thetas", "qwen3.5", "lfm2", "granite-h")


@pytest.mark.parametrize(
    "source",
    [n if n in METHODS_FOR else pytest.param(n, marks=pytest.mark.slow) for n in ONE_EACH + SLOW_MIXTURES],
    indirect=True,
)
def test_each_method_writes_a_folder_that_runs_and_is_close(source, text, tmp_path):
    checkpoint, hf = source
    want, error = logits_of(hf, IDS), {}
    for method in ("awq", "gptq", "rtn"):
        facts = quantize(checkpoint, tmp_path / method, method=method, group_size=32, calib_file=text)
        assert facts["group_size"] == 32
        written = HFCheckpoint(tmp_path / method)
        assert written.config == checkpoint.config
        for name in quantized(checkpoint.config, 1):
            assert isinstance(written.linear(name), QuantizedLinear)
        error[method] = relative_error(logits(tmp_path / method), want)
    # random weights and bytes have little to fit to: what calibration may not do is lose anything
    # (a router that takes another expert outweighs it)
    assert error["rtn"] < (0.7 if checkpoint.config.n_experts else 0.6)
    assert error["awq"] < (1.1 if checkpoint.config.n_experts else 1.0) * error["rtn"]
    assert error["gptq"] < (1.1 if checkpoint.config.n_experts else 1.05) * error["rtn"]


def facts(c: ModelConfig) -> dict:
    """What the config says, ropes by what they do."""
    out = {k: v for k, v in vars(c).items() if k not in ("layers", "long_rope")}
    for i, layer in enumerate(c.layers):
        mixer = vars(layer.mixer) if layer.mixer else {}
        out |= {f"{i}.{k}": v for k, v in mixer.items()} | {
            f"{i}.mlp": layer.mlp,
            f"{i}.beside": layer.beside,
        }
        if not isinstance(layer.mixer, AttentionConfig):
            continue
        out[f"{i}.scale"] = layer.mixer.scale or layer.mixer.head_dim**-0.5
        out[f"{i}.rope"] = turns(layer.mixer.rope)
    out["long_rope"] = turns(c.long_rope)
    return out


def turns(rope: RopeConfig | None) -> list[float] | None:
    """What a rope multiplies by, and what it turns by."""
    return rope and [rope.magnitude, *rope.frequencies().tolist()]


def test_a_block_that_passes_on_more_than_its_sum_is_refused_before_anything_is_read(monkeypatch, tmp_path):
    """Attention and MLP beside each other: what the MLP reads is not the sum behind attention."""

    def parallel(ops, cfg, w, x, layer):
        a, x_in = cfg.layers[layer].mixer, x
        n = ops.rms_norm(x, w.attn_norm, cfg.norm_eps)
        x = ops.linear(llama.attend(ops, a, *ops.split_heads(ops.linear(n, w.qkv), a), layer), w.o, add_to=x)
        m = ops.rms_norm(x_in, w.mlp_norm, cfg.norm_eps)
        return ops.linear(ops.silu_mul(ops.linear(m, w.gate_up)), w.down, add_to=x)

    monkeypatch.setattr(llama, "forward", partial(llama.forward, block=parallel))
    with pytest.raises(UnsupportedModelError, match="more than their sum"):
        quantize(TinyCheckpoint(hidden_size=96), tmp_path / "out", method="rtn")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", GGUF_CASES)
def test_settings_of_a_gguf_are_read_back_as_they_were(case, tmp_path):
    cls, changes = CASES[case]
    write_gguf(tmp_path / "m.gguf", random_model(cls, **changes), GGUF_CASES[case])
    given = GGUFCheckpoint(tmp_path / "m.gguf").config
    written = json.loads(json.dumps(settings.hf_config(given)))
    found = read_config(written)
    theirs = transformers.AutoConfig.for_model(written.pop("model_type"), **written)
    assert type(theirs).__name__ == f"{cls.removesuffix('ForCausalLM')}Config".replace(
        "Gemma3Config", "Gemma3TextConfig"
    ).replace("Qwen3_5Config", "Qwen3_5TextConfig").replace("Gemma4Config", "Gemma4TextConfig")
    again = read_config(theirs.to_dict() | {"architectures": [cls]})
    assert [a.window for a in again.attentions] == [a.window for a in given.attentions]
    assert (again.rope is None) == (given.rope is None)
    np.testing.assert_allclose(turns(again.rope) or 0, turns(given.rope) or 0, rtol=1e-6)
    read = facts(found)
    for name, value in facts(given).items():
        assert read[name] == (pytest.approx(value) if isinstance(value, float | list) else value), name


def test_a_gguf_of_another_family_is_quantized_too(tmp_path, text):
    cls, changes = CASES["gemma3"]
    hf = random_model(cls, **changes)
    write_gguf(tmp_path / "m.gguf", hf, "gemma3")
    quantize(
        GGUFCheckpoint(tmp_path / "m.gguf"), tmp_path / "out", method="rtn", ranges="whole", group_size=32
    )
    assert relative_error(logits(tmp_path / "out"), logits_of(hf, IDS)) < 0.5


def test_an_order_of_heads_that_config_json_cannot_say_is_refused_before_anything_is_written(tmp_path):
    cls, changes = CASES["qwen3.5"]
    write_gguf(tmp_path / "m.gguf", random_model(cls, **changes), "qwen35")
    with pytest.raises(UnsupportedModelError, match="value heads"):
        quantize(GGUFCheckpoint(tmp_path / "m.gguf"), tmp_path / "out", method="rtn")
    assert not (tmp_path / "out").exists()


def test_a_qwen3_next_without_experts_is_refused_before_anything_is_written(tmp_path):
    cls, changes = CASES["qwen3next listed"]
    random_model(cls, **changes | dict(mlp_only_layers=[0, 1, 2])).save_pretrained(tmp_path / "source")
    byte_tokenizer().save(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="projections") as e:
        quantize(HFCheckpoint(tmp_path / "source"), tmp_path / "out", method="rtn")
    assert len(str(e.value).splitlines()) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "word"),
    [
        ("granite-h", "other shapes"),
        ("nemotron-h", "other shapes"),
        ("glm4moelite", "latent"),
    ],
)
def test_shapes_that_gguf_holds_otherwise_are_refused_before_anything_is_written(case, word, tmp_path):
    cls, changes = CASES[case]
    random_model(cls, **changes).save_pretrained(tmp_path / "source")
    byte_tokenizer().save(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=word) as e:
        quantize(HFCheckpoint(tmp_path / "source"), tmp_path / "out.gguf", method="rtn")
    assert len(str(e.value).splitlines()) == 2
    assert not (tmp_path / "out.gguf").exists()
