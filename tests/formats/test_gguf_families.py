"""GGUF of every family against transformers on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
from families import CASES, logits_of, random_model, relative_error, usual_error
from family_gguf import Kind, write
from gguf import ExpertGatingFuncType, GGUFWriter
from memories import allocate, step_of
from raw_gguf import Raw

import tinychat
from tinychat.backends.cpu import CpuBackend
from tinychat.backends.cpu_pack import KERNELS
from tinychat.backends.plan import plan
from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import CheckpointError, TinychatError, UnsupportedModelError, UsageError
from tinychat.formats import gguf_metadata
from tinychat.formats.gguf import GGUFCheckpoint
from tinychat.network.weight_form import Form
from tinychat.network.weight_policy import WeightPolicy

IDS = np.random.default_rng(1).integers(0, 258, 120).astype(np.int32)
TABLE = np.arange(8, dtype=np.int32)
ARCHS = {
    "mistral wide heads": "llama",
    "llama yarn": "llama",
    "qwen2": "qwen2",
    "qwen2 tied": "qwen2",
    "qwen2 yarn": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "phi3 partial": "phi3",
    "phi3 longrope": "phi3",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4",
    "gemma4 wide": "gemma4",
    "gemma4 tied": "gemma4",
    "gemma4moe": "gemma4",
    "mistral window": "llama",
    "phi3 window": "phi3",
    "granite": "granite",
    "granite tied": "granite",
    "mixtral": "llama",
    "mixtral window": "llama",
    "qwen3moe": "qwen3moe",
    "lfm2": "lfm2",
    "lfm2 wide": "lfm2",
    "lfm2moe": "lfm2moe",
    "qwen3.5": "qwen35",
    "qwen3.5moe": "qwen35moe",
    "qwen3next": "qwen3next",
    "qwen3.5 listed": "qwen35",
    "olmo3": "olmo2",
    "olmo3 yarn": "olmo2",
    "exaone4": "exaone4",
    "exaone4 small": "exaone4",
    "ernie4.5": "ernie4_5",
    "seed_oss": "seed_oss",
    "glm4": "glm4",
    "glm4 plain": "glm4",
    "ministral3": "mistral3",
    "ministral3 window": "mistral3",
    "hunyuan": "hunyuan-dense",
    "hunyuan alpha": "hunyuan-dense",
    "granite_swa": "granite_swa",
    "granite-h": "granitehybrid",
    "granite-h groups": "granitehybrid",
    "granite-h moe": "granitehybrid",
    "falcon-h1": "falcon-h1",
    "falcon-h1 gated": "falcon-h1",
    "nemotron-h": "nemotron_h",
    "nemotron-h bias": "nemotron_h",
    "nemotron-h moe": "nemotron_h_moe",
    "qwen2moe": "qwen2moe",
    "deepseek2moe": "deepseek2",
    "deepseek3moe": "deepseek2",
    "glm4moelite": "deepseek2",
    "gpt-oss": "gpt-oss",
    "gpt-oss yarn": "gpt-oss",
}


@pytest.mark.parametrize("case", ARCHS)
def test_logits_equal_transformers(case, tmp_path):
    cls, changes = CASES[case]
    hf = random_model(cls, **changes)
    write(tmp_path / "m.gguf", hf, ARCHS[case])
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert checkpoint.config.context_length >= len(IDS)
    backend = ReferenceBackend(checkpoint, WeightPolicy("none", 16))
    allocate(backend, 8)
    steps = [(0, 70), (70, 71), (71, 120)]
    ours = np.concatenate([backend.step(step_of(backend, IDS[a:b], a, a, TABLE, 0)) for a, b in steps])
    assert relative_error(ours, logits_of(hf, IDS)) < 1e-4
    assert checkpoint.tokenizer().vocab_size == 258


def test_layers_that_predict_further_tokens_are_not_read(tmp_path, monkeypatch):
    cls, changes = CASES["qwen3.5"]
    hf = random_model(cls, **changes)
    given = {name: getattr(GGUFWriter, name) for name in ("add_block_count", "add_tokenizer_model")}

    def further(w, model):
        w.add_uint32("qwen35.nextn_predict_layers", 1)
        w.add_tensor("blk.4.nextn.eh_proj.weight", np.ones((64, 128), np.float32))
        given["add_tokenizer_model"](w, model)

    monkeypatch.setattr(GGUFWriter, "add_block_count", lambda w, n: given["add_block_count"](w, n + 1))
    monkeypatch.setattr(GGUFWriter, "add_tokenizer_model", further)
    write(tmp_path / "m.gguf", hf, "qwen35")
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert checkpoint.config.n_layers == 4
    backend = allocate(ReferenceBackend(checkpoint, WeightPolicy("none", 16)), 8)
    ours = backend.step(step_of(backend, IDS[:30], 0, 0, TABLE, 0))
    assert relative_error(ours, logits_of(hf, IDS[:30])) < 1e-4
    fields = gguf_metadata.carried(tmp_path / "m.gguf")
    assert fields["qwen35.block_count"].value == 4
    assert "qwen35.nextn_predict_layers" not in fields


def mixed(name: str) -> Kind | None:
    """Types as llama.cpp's mixtures have them: others for the table, attn_v and ffn_down, floats to route."""
    if "token_embd" in name or name == "output.weight":
        return Kind.Q6_K
    kinds = {"attn_v": Kind.Q5_K, "ffn_down": Kind.Q6_K, "attn_output": Kind.IQ4_XS, "attn_k.": Kind.Q3_K}
    kinds |= {"ffn_gate_inp": None, "ffn_gate": Kind.Q2_K, "ffn_up": Kind.Q4_K, "attn_q": Kind.Q5_K}
    return next(kind for part, kind in kinds.items() if part in name)


def of_one(kind: Kind):
    return lambda name: None if "ffn_gate_inp" in name else kind


def of_states(name: str) -> Kind | None:
    """Types of a model with state spaces, whose vectors and convolutions stay floats."""
    if "ssm_" in name and not name.endswith(("ssm_in.weight", "ssm_out.weight")):
        return None
    return Kind.Q6_K if "ffn_down" in name or "token_embd" in name else Kind.Q4_K


STORED = {
    "Granite 4, whose gates are a tensor of their own": ("granite-h", of_states, "granitehybrid"),
    "k-quants in a Llama, whose q and k have another order": ("llama yarn", mixed, "llama"),
    "Gemma 3's tied table": ("gemma3", mixed, "gemma3"),
    "Phi-3's fused projections": ("phi3", mixed, "phi3"),
    "experts": ("qwen3moe", mixed, "qwen3moe"),
    "experts of MXFP4": ("mixtral", of_one(Kind.MXFP4), "llama"),
    "experts of Q3_K": ("qwen3moe", of_one(Kind.Q3_K), "qwen3moe"),
    "experts of IQ4_XS": ("mixtral", of_one(Kind.IQ4_XS), "llama"),
    "experts of NVFP4, each with a scale": ("mixtral", of_one(Kind.NVFP4), "llama"),
    "NVFP4": ("qwen3", of_one(Kind.NVFP4), "qwen3"),
    "IQ4_NL": ("qwen2", of_one(Kind.IQ4_NL), "qwen2"),
    "Q5_0": ("llama yarn", of_one(Kind.Q5_0), "llama"),
    "Q5_1": ("phi3", of_one(Kind.Q5_1), "phi3"),
    "TQ1_0": ("qwen3", of_one(Kind.TQ1_0), "qwen3"),
    "TQ2_0": ("llama yarn", of_one(Kind.TQ2_0), "llama"),
}
WIDE = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=16,
)
SIZES = {
    "granite-h": dict(shared_intermediate_size=512, layer_types=["linear_attention", "full_attention"]),
    "qwen3moe": dict(moe_intermediate_size=256),
    "gemma3": dict(query_pre_attn_scalar=16),
}


@pytest.mark.parametrize("stored", STORED)
def test_quantized_types_are_the_weights_that_they_say(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / "home"))
    case, kind, arch = STORED[stored]
    cls, changes = CASES[case]
    hf = random_model(cls, **changes | WIDE | SIZES.get(case, {}))
    write(tmp_path / "m.gguf", hf, arch, kind)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    backend = ReferenceBackend(checkpoint, WeightPolicy())
    allocate(backend, 8)
    ours = backend.step(step_of(backend, IDS[:20], 0, 0, TABLE, 0))
    assert relative_error(ours, logits_of(hf, IDS[:20])) < 1e-4
    cpu = CpuBackend(checkpoint, act_bits=16, kv_bits=16, threads=1)
    allocate(cpu, 8)
    assert usual_error(cpu.step(step_of(cpu, IDS[:20], 0, 0, TABLE, 0)), ours) < 2e-3
    for w in plan(checkpoint, WeightPolicy(), KERNELS):
        assert isinstance(w.form, Form)
        assert w.form.is_float == (w.kind == "router")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.__setitem__(1, [2]), r"blk\.0\.attn_q\.scale' has the shape \[2\]"),
        (lambda t: t.__setitem__(2, 26), r"blk\.0\.attn_q\.scale' has the shape"),  # integers
        (lambda t: t.__setitem__(0, "blk.7.attn_q.scale"), "does not have"),
    ],
)
def test_a_scale_of_nvfp4_that_does_not_fit_is_refused(damage, said, tmp_path):
    hf = random_model("Qwen3ForCausalLM", **CASES["qwen3"][1] | WIDE)
    write(tmp_path / "m.gguf", hf, "qwen3", of_one(Kind.NVFP4))
    raw = Raw(tmp_path / "m.gguf")
    damage(next(t for t in raw.tensors if t[0] == "blk.0.attn_q.scale"))
    with pytest.raises(TinychatError, match=said) as e:
        GGUFCheckpoint(raw.write(tmp_path / "d.gguf"))
    assert len(str(e.value).splitlines()) == 2


def test_a_context_beyond_the_original_is_a_matter_of_asking(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    hf = random_model(
        "Phi3ForCausalLM", **CASES["phi3 longrope"][1] | {"original_max_position_embeddings": 60}
    )
    write(tmp_path / "m.gguf", hf, "phi3")
    options = dict(device="reference", quantize="none", head_bits=16)
    with tinychat.load(tmp_path / "m.gguf", **options) as m:
        assert m.n_ctx == m.config.context_length == 60
        assert relative_error(m.logits(IDS[:60]), logits_of(hf, IDS[:60])) < 1e-4
    with tinychat.load(tmp_path / "m.gguf", ctx=120, **options) as m:
        assert m.n_ctx == 120
        assert relative_error(m.logits(IDS), logits_of(hf, IDS)) < 1e-4
    with pytest.raises(UsageError, match="1601"):
        tinychat.load(tmp_path / "m.gguf", ctx=1601)


@pytest.mark.parametrize(
    ("field", "value", "error", "word"),
    [
        ("add_expert_count", 7, CheckpointError, "ffn_gate_inp"),
        ("add_expert_count", 1 << 31, CheckpointError, "experts"),
        ("add_expert_used_count", 0, CheckpointError, "takes 0"),
        ("add_expert_used_count", 9, CheckpointError, "takes 9"),
        ("add_expert_feed_forward_length", 48, CheckpointError, "expected"),
        ("add_expert_gating_func", ExpertGatingFuncType.SIGMOID, UnsupportedModelError, "expert_gating_func"),
        ("add_expert_weights_scale", 2.5, UnsupportedModelError, "expert_weights_scale"),
        ("add_expert_shared_count", 1, UnsupportedModelError, "expert_shared_count"),
    ],
)
def test_experts_that_do_not_fit_together_are_refused(field, value, error, word, tmp_path, monkeypatch):
    hf = random_model("Qwen3MoeForCausalLM", **CASES["qwen3moe"][1] | dict(num_experts=8))
    given = {name: getattr(GGUFWriter, name) for name in ("add_tokenizer_model", field)}
    if field in ("add_expert_count", "add_expert_used_count", "add_expert_feed_forward_length"):
        monkeypatch.setattr(GGUFWriter, field, lambda w, _: given[field](w, value))
    else:

        def and_this(w, model):
            given[field](w, value)
            given["add_tokenizer_model"](w, model)

        monkeypatch.setattr(GGUFWriter, "add_tokenizer_model", and_this)
    write(tmp_path / "m.gguf", hf, "qwen3moe")
    with pytest.raises(error, match=word) as e:
        GGUFCheckpoint(tmp_path / "m.gguf")
    assert len(str(e.value).splitlines()) == 2


def test_a_missing_bias_and_a_foreign_tensor_are_refused(tmp_path):
    hf = random_model("Qwen2ForCausalLM")
    del hf.model.layers[1].self_attn.k_proj.bias
    hf.model.layers[1].self_attn.k_proj.bias = None
    write(tmp_path / "m.gguf", hf, "qwen2")
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_k\.bias"):
        GGUFCheckpoint(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", random_model("Qwen3ForCausalLM", head_dim=16), "llama")
    with pytest.raises(UnsupportedModelError, match="q_norm"):
        GGUFCheckpoint(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", random_model("GraniteForCausalLM", **CASES["granite"][1]), "granite")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"granite", b"smollm3"))  # of the same length
    with pytest.raises(UnsupportedModelError, match=r"smollm3\.(attention\.scale|embedding_scale)"):
        GGUFCheckpoint(tmp_path / "m.gguf")
