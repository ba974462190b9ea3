"""The Llama family on the reference backend against transformers' own forward pass on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from families import FromTransformers, random_model, relative_error

from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import CheckpointError, TinychatError, UnsupportedModelError
from tinychat.formats.hf import read_config
from tinychat.model import Model
from tinychat.network.config import AttentionConfig, DenseConfig, RopeConfig
from tinychat.network.weight_policy import WeightPolicy

SHAPE = dict(
    vocab_size=258,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def random_llama(cls, **changes):
    return random_model(cls.__name__, **{**SHAPE, **changes})


CASES = {
    "gqa": (transformers.LlamaForCausalLM, {}),
    "mha": (transformers.LlamaForCausalLM, dict(num_key_value_heads=4)),
    "one kv head": (transformers.LlamaForCausalLM, dict(num_key_value_heads=1)),
    "wide heads": (transformers.LlamaForCausalLM, dict(head_dim=32)),
    "narrow heads": (transformers.LlamaForCausalLM, dict(head_dim=8)),
    "attention bias": (transformers.LlamaForCausalLM, dict(attention_bias=True)),
    "mlp bias": (transformers.LlamaForCausalLM, dict(mlp_bias=True)),
    "tied head": (transformers.LlamaForCausalLM, dict(tie_word_embeddings=True)),
    "epsilon": (transformers.LlamaForCausalLM, dict(rms_norm_eps=0.1)),
    "theta": (transformers.LlamaForCausalLM, dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "linear rope": (
        transformers.LlamaForCausalLM,
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)),
    ),
    "llama3 rope": (transformers.LlamaForCausalLM, dict(rope_parameters=dict(rope_theta=500.0, **LLAMA3))),
    "mistral": (transformers.MistralForCausalLM, dict(sliding_window=None)),
    "mistral window": (transformers.MistralForCausalLM, dict(sliding_window=201)),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    cls, changes = CASES[case]
    hf = random_llama(cls, **changes)
    checkpoint = FromTransformers(hf)
    ids = np.random.default_rng(1).integers(0, 258, 200).tolist()
    with torch.inference_mode():
        theirs = hf(torch.tensor([ids])).logits[0].numpy()
    with Model(checkpoint, ReferenceBackend(checkpoint, WeightPolicy("none", 16)), case) as model:
        assert model.n_ctx >= 200
        ours = model.logits(ids)
        assert ours.dtype == np.float32
        assert ours.shape == (200, 258)
        assert relative_error(ours, theirs) <= 1e-5
        # The same through the cache in two steps: the second sees the first only as stored keys and values.
        branch = model.engine.branch()
        model.engine.run(branch, ids[:83], 83)
        assert relative_error(model.engine.run(branch, ids[83:], 0), theirs[83:]) <= 1e-5


def test_rope_change_would_be_noticed():
    # The comparison above is worth something only if a wrong rope moves the logits far past its bound.
    plain, scaled = (
        random_llama(transformers.LlamaForCausalLM, **c) for c in (CASES["gqa"][1], CASES["llama3 rope"][1])
    )
    ids = torch.arange(200)[None]
    with torch.inference_mode():
        assert relative_error(plain(ids).logits.numpy(), scaled(ids).logits.numpy()) > 1e-2


def test_stored_factors_are_llama3_written_out():
    llama3 = RopeConfig(theta=5e5, dim=64, kind="llama3", factor=8.0, original_context=8192)
    plain = RopeConfig(theta=5e5, dim=64).frequencies()
    factors = RopeConfig(theta=5e5, dim=64, kind="factors", factors=tuple(plain / llama3.frequencies()))
    np.testing.assert_allclose(factors.frequencies(), llama3.frequencies(), rtol=1e-12)


LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
MISTRAL_01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def test_llama_2_config():
    c = read_config(LLAMA_2)
    assert (
        c.family,
        c.n_layers,
        c.attentions[0].n_heads,
        c.attentions[0].n_kv_heads,
        c.attentions[0].head_dim,
    ) == ("llama", 32, 32, 32, 128)
    assert (c.hidden_size, c.layers[0].mlp, c.vocab_size, c.context_length) == (
        4096,
        DenseConfig(11008),
        32000,
        4096,
    )
    assert (c.norm_eps, c.bos_id, c.eos_ids, c.tie_embeddings) == (1e-5, 1, (2,), False)
    assert c.rope == RopeConfig(theta=10000.0, dim=128)


def test_llama_3_1_config():
    c = read_config(LLAMA_3_1)
    assert (c.attentions[0].n_kv_heads, c.attentions[0].head_dim, c.context_length) == (8, 128, 131072)
    assert c.eos_ids == (128001, 128008, 128009)
    assert c.rope == RopeConfig(5e5, 128, "llama3", 8.0, 1.0, 4.0, 8192)


def test_mistral_slides_its_window():
    c = read_config(MISTRAL_01)
    assert (c.context_length, [layer.mixer.window for layer in c.layers]) == (32768, [4096] * 32)
    c = read_config({**MISTRAL_01, "sliding_window": None})
    assert (c.context_length, c.windowed) == (32768, False)
    # a window that holds the whole context is none
    assert not read_config({**MISTRAL_01, "max_position_embeddings": 4096}).windowed


def test_smollm2_config():
    c = read_config(SMOLLM2)
    assert (
        c.attentions[0].n_heads,
        c.attentions[0].n_kv_heads,
        c.attentions[0].head_dim,
        c.tie_embeddings,
    ) == (9, 3, 64, True)
    assert c.rope == RopeConfig(theta=1e5, dim=64)


def test_transformers_5_writes_the_same_config_in_rope_parameters():
    old = {k: v for k, v in LLAMA_3_1.items() if k not in ("rope_scaling", "rope_theta")}
    new = {**old, "rope_parameters": {**LLAMA_3_1["rope_scaling"], "rope_theta": 500000.0}}
    assert read_config(new) == read_config(LLAMA_3_1)
    # And what the installed transformers makes of the old file reads the same.
    rewritten = transformers.LlamaConfig.from_dict(dict(LLAMA_3_1)).to_dict()
    assert read_config({**rewritten, "architectures": ["LlamaForCausalLM"]}) == read_config(LLAMA_3_1)


def test_old_spelling_of_the_rope_type():
    c = read_config({**LLAMA_2, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (c.rope.kind, c.rope.factor) == ("linear", 2.0)


def test_generation_config_names_the_stop_tokens():
    assert read_config(LLAMA_2, {"eos_token_id": [2, 7]}).eos_ids == (2, 7)
    assert read_config(LLAMA_2, {"temperature": 0.6}).eos_ids == (2,)
    assert read_config(LLAMA_2, {"eos_token_id": None}).eos_ids == (2,)


@pytest.mark.parametrize(
    "arch", ["BloomForCausalLM", "GPT2LMHeadModel", "MambaForCausalLM", "LlamaForSequenceClassification"]
)
def test_unsupported_architecture_is_refused_by_name(arch):
    with pytest.raises(UnsupportedModelError, match=arch):
        read_config({**LLAMA_2, "architectures": [arch]})


@pytest.mark.parametrize("kind", ["ntk", "longrope", "su", "mrope"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_unsupported_rope_scaling_is_refused_by_name(kind, key):
    with pytest.raises(UnsupportedModelError, match="longrope" if kind == "su" else kind):
        read_config({**LLAMA_2, "rope_scaling": {key: kind, "factor": 4.0}})


def test_half_understood_rope_scaling_is_refused():
    for scaling in ({"type": "linear"}, {**LLAMA_3_1["rope_scaling"], "attention_factor": 1.2}):
        with pytest.raises(UnsupportedModelError, match="rope scaling"):
            read_config({**LLAMA_2, "rope_scaling": scaling})


@pytest.mark.parametrize("act", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_another_activation_is_refused_by_name(act):
    with pytest.raises(UnsupportedModelError, match=act):
        read_config({**LLAMA_2, "hidden_act": act})


def test_stored_factors_of_the_wrong_number_are_refused():
    with pytest.raises(CheckpointError, match="rope"):
        AttentionConfig(32, 32, 128, RopeConfig(dim=128, kind="factors", factors=(1.0,) * 63))


DAMAGE = [
    {"hidden_size": None},
    {"hidden_size": -4096},
    {"hidden_size": 1 << 60},
    {"hidden_size": 4096.5},
    {"hidden_size": "4096"},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 5},
    {"num_hidden_layers": True},
    {"num_hidden_layers": 10**9},
    {"vocab_size": 10**12},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": 0},
    {"rms_norm_eps": "tiny"},
    {"rope_theta": float("inf")},
    {"rope_theta": -1.0},
    {"rope_scaling": {"type": "linear", "factor": 0.0}},
    {"rope_scaling": {"type": "linear", "factor": float("nan")}},
    {"rope_scaling": {"type": "linear", "factor": -2.0}},
    {"rope_scaling": {**LLAMA_3_1["rope_scaling"], "original_max_position_embeddings": "long"}},
    {"rope_scaling": "linear"},
    {"rope_scaling": [1, 2]},
    {"rope_scaling": {"type": ["linear"], "factor": 2.0}},
    {"architectures": {"a": 1}},
    {"architectures": [["LlamaForCausalLM"]]},
    {"architectures": None},
    {"partial_rotary_factor": 0.0001},
    {"partial_rotary_factor": "half"},
    {"head_dim": 127},
    {"eos_token_id": "</s>"},
    {"eos_token_id": [[2]]},
    {"bos_token_id": "<s>"},
    {"max_position_embeddings": 0},
]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_damaged_config_is_a_clear_error(damage):
    with pytest.raises(CheckpointError) as e:
        read_config({**LLAMA_2, **damage})
    assert "\n" not in e.value.what
    assert "\n" not in e.value.todo


@pytest.mark.parametrize("missing", ["hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"])
def test_missing_field_is_named(missing):
    with pytest.raises(TinychatError, match=missing):
        read_config({k: v for k, v in LLAMA_2.items() if k != missing})
