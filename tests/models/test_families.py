"""Every family against transformers' own forward pass on the same weights: reference and CPU engine."""

from __future__ import annotations

import numpy as np
import pytest
from families import (
    CASES,
    FromTransformers,
    logits_of,
    random_config,
    random_model,
    relative_error,
    usual_error,
)
from memories import allocate, step_of

from tinychat.backends.cpu import CpuBackend
from tinychat.backends.cuda_recorder import check
from tinychat.backends.interface import memories_of
from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.formats.hf import read_config
from tinychat.formats.subset import LayerSubset
from tinychat.models import FAMILIES as MODELS
from tinychat.network.config import DenseConfig, ExpertsConfig
from tinychat.network.weight_policy import WeightPolicy

N, BLOCKS = 200, 16
IDS = np.random.default_rng(1).integers(0, 258, N).astype(np.int32)
TABLE = np.random.default_rng(0).permutation(BLOCKS).astype(np.int32)
CUTS = (90, 1, 1, 7, 101)  # prefill, decode, verification, and a prompt that goes on


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))


def run(backend, cuts=CUTS):
    """Logits of IDS, fed in pieces of these sizes: later ones see earlier ones only through the cache."""
    allocate(backend, BLOCKS)
    at, out = 0, []
    for n in cuts:
        out.append(backend.step(step_of(backend, IDS[at : at + n], at, at, TABLE, 0)))
        at += n
    return np.concatenate(out)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    cls, changes = CASES[case]
    hf = random_model(cls, **changes)
    checkpoint, theirs = FromTransformers(hf), logits_of(hf, IDS)
    assert checkpoint.config.context_length >= N
    reference = run(ReferenceBackend(checkpoint, WeightPolicy("none", 16)))
    assert relative_error(reference, theirs) < 1e-4
    assert np.abs(reference - theirs).max() < 1e-4 * np.abs(theirs).max()
    # fp16 keys and values against fp32 everywhere; then 8-bit and 16-bit activations on int8 weights
    error = usual_error if checkpoint.config.n_experts else relative_error
    cpu = run(CpuBackend(checkpoint, WeightPolicy("none", 16), threads=2))
    assert error(cpu, theirs) < 3e-3
    policy = WeightPolicy("auto")
    expected = run(ReferenceBackend(checkpoint, policy))
    fine = CpuBackend(checkpoint, policy, threads=2, act_bits=16)
    whole = run(fine)
    assert error(whole, expected) < (3e-3 if error is relative_error else 3e-2)
    np.testing.assert_array_equal(run(fine, (N,)), whole)  # row independence
    coarse = run(CpuBackend(checkpoint, policy, threads=2, act_bits=8))
    assert error(coarse, expected) < (0.06 if error is relative_error else 0.2)


@pytest.mark.parametrize(
    "case", [name for name in CASES if "moe" in name or "mixtral" in name or "gpt" in name]
)
def test_experts_on_the_same_keys_and_values(case):
    # with the reference's cache in fp16 too, routers see the same and take the same experts
    cls, changes = CASES[case]
    checkpoint, policy = FromTransformers(random_model(cls, **changes)), WeightPolicy("none", 16)
    expected = run(ReferenceBackend(checkpoint, policy, kv_bits=16))
    assert relative_error(run(CpuBackend(checkpoint, policy, threads=2)), expected) < 5e-4


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend])
@pytest.mark.parametrize("case", ["smollm3", "gemma3", "phi3 partial", "llama yarn magnitude"])
def test_turned_keys_are_those_of_later_positions_in_every_layer(case, backend):
    # layers without rope stay, windowed layers turn by their own rope, magnitudes are not applied twice
    cls, changes = CASES[case]
    checkpoint = FromTransformers(random_model(cls, **changes))
    outs = []
    for turned in (True, False):
        b = backend(checkpoint, WeightPolicy("none", 16))
        allocate(b, BLOCKS)
        b.step(step_of(b, IDS[:50], 0 if turned else 9, 0, TABLE, 50))
        if turned:
            for memory, spec in enumerate(b.memories):
                by = np.full((len(spec.layers), spec.kv_heads, 50), 9, np.int32)
                b.turn_keys(TABLE, by, memory)
        outs.append(b.step(step_of(b, IDS[50:60], 59, 50, TABLE, 0)))
    assert relative_error(*outs) < (1e-5 if backend is ReferenceBackend else 3e-3)


def test_a_subset_of_layers_keeps_what_each_of_them_is():
    checkpoint = FromTransformers(random_model(CASES["smollm3"][0], **CASES["smollm3"][1]))
    assert [layer.mixer.rope is None for layer in checkpoint.config.layers] == [False] * 3 + [True, False]
    assert [c.mixer.rope is None for c in LayerSubset(checkpoint, [0, 3, 4]).config.layers] == [
        False,
        True,
        False,
    ]
    checkpoint = FromTransformers(random_model(CASES["gemma3"][0], **CASES["gemma3"][1]))
    assert [layer.mixer.window for layer in checkpoint.config.layers] == [64] * 5 + [0, 64]
    assert [c.mixer.window for c in LayerSubset(checkpoint, [4, 5, 6]).config.layers] == [64, 0, 64]
    name = "qwen3moe dense layers"
    checkpoint = FromTransformers(random_model(CASES[name][0], **CASES[name][1]))
    assert [type(layer.mlp) for layer in checkpoint.config.layers] == [
        DenseConfig,
        ExpertsConfig,
        DenseConfig,
        DenseConfig,
    ]
    assert [type(c.mlp) for c in LayerSubset(checkpoint, [1, 3]).config.layers] == [
        ExpertsConfig,
        DenseConfig,
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_refuses_by_name_what_it_has_no_kernels_for(case):
    refused = {
        "deepseek": "latent attention",
        "glm4moelite": "latent attention",
        "gemma4 tied": "norms of values",
        "gemma4 unified": "norms of values",
        "gemma4moe": "norms of values",
        "gemma3n": "an embedding for each layer",
        "gemma4": "an embedding for each layer",
        "hunyuan": "behind their rotation",
    }
    cls, changes = CASES[case]
    cfg = read_config(random_config(cls, **changes))
    word = next((word for name, word in refused.items() if case.startswith(name)), None)
    if word is not None:
        with pytest.raises(UnsupportedModelError, match=word) as e:
            check(MODELS[cfg.family], cfg)
        assert len(str(e.value).splitlines()) == 2
    else:
        check(MODELS[cfg.family], cfg)


def test_keys_that_are_changed_behind_their_rope_are_never_turned():
    known = {
        case: read_config(random_config(CASES[case][0], **CASES[case][1])) for case in ("hunyuan", "qwen3")
    }
    assert [known["hunyuan"].may_evict, known["qwen3"].may_evict] == [False, True]


def test_layers_that_are_alike_share_a_memory():
    def kinds(case):
        checkpoint = FromTransformers(random_model(CASES[case][0], **CASES[case][1]))
        return [(spec.kind, spec.layers, spec.window) for spec in memories_of(checkpoint.config)]

    assert kinds("gemma3") == [("paged", (5,), 0), ("window", (0, 1, 2, 3, 4, 6), 64)]
    assert kinds("mistral window")[0][0] == "window"
    assert len(kinds("mistral window")) == 1
    assert [kind for kind, _, _ in kinds("smollm3")] == ["paged"]


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend])
def test_a_long_context_takes_longropes_long_factors(backend):
    # transformers chooses by the length of what it is given: here it is longer than the original context
    changes = CASES["phi3 longrope"][1] | dict(original_max_position_embeddings=60)
    hf = random_model("Phi3ForCausalLM", **changes)
    checkpoint = FromTransformers(hf)
    assert (checkpoint.config.context_length, checkpoint.config.long_context) == (60, 1600)
    assert checkpoint.config.for_context(60) is checkpoint.config
    checkpoint.config = checkpoint.config.for_context(200)
    assert checkpoint.config.context_length == 1600
    ours = run(backend(checkpoint, WeightPolicy("none", 16)))
    assert relative_error(ours, logits_of(hf, IDS)) < (1e-4 if backend is ReferenceBackend else 3e-3)


def test_another_family_would_be_noticed():
    # The comparisons above are worth something only if a missing part moves the logits far past their bound.
    hf = random_model("Qwen3ForCausalLM", head_dim=16)
    plain = random_model("LlamaForCausalLM", head_dim=16)
    plain.load_state_dict(
        {k: v for k, v in hf.state_dict().items() if "self_attn.q_norm" not in k}, strict=False
    )
    assert relative_error(logits_of(plain, IDS), logits_of(hf, IDS)) > 1e-2


@pytest.mark.parametrize(
    ("arch", "option", "value"),
    [
        ("LlamaForCausalLM", "attn_logit_softcapping", 50.0),
        ("LlamaForCausalLM", "num_local_experts", 8),
        ("LlamaForCausalLM", "residual_multiplier", 0.22),
        ("LlamaForCausalLM", "rope_interleaved", True),
        ("MistralForCausalLM", "final_logit_softcapping", 30.0),
        ("Qwen2ForCausalLM", "use_mrope", True),
        ("LlamaForCausalLM", "partial_rotary_factor", 0.5),
        ("Qwen3ForCausalLM", "num_experts", 128),
        ("Olmo2ForCausalLM", "clip_qkv", 8.0),
        ("Phi3ForCausalLM", "hidden_act", "gelu"),
        ("GraniteForCausalLM", "num_local_experts", 40),
        ("MixtralForCausalLM", "hidden_act", "gelu"),
        ("Qwen3MoeForCausalLM", "scoring_func", "sigmoid"),
        ("Qwen3MoeForCausalLM", "n_group", 8),
        ("MixtralForCausalLM", "n_shared_experts", 2),
        ("Gemma2ForCausalLM", "rope_scaling", dict(rope_type="axial")),
        ("Qwen3ForCausalLM", "layer_types", ["full_attention", "linear_attention"]),
    ],
)
def test_an_option_that_is_not_understood_is_refused_by_name(arch, option, value):
    cfg = dict(
        architectures=[arch], hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=258, no_rope_layer_interval=4,
    )  # fmt: skip
    read_config(cfg)
    with pytest.raises(UnsupportedModelError) as e:
        read_config({**cfg, option: value})
    named = value["rope_type"] if isinstance(value, dict) else option
    assert named in e.value.what or str(value) in e.value.what or value[-1] in e.value.what


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_experts=0),
        dict(num_experts=1 << 40),
        dict(num_experts=-1),
        dict(num_experts="128"),
        dict(num_experts=8, num_local_experts=16),
        dict(num_experts_per_tok=17),
        dict(num_experts_per_tok=0),
        dict(moe_intermediate_size=1 << 30),
        dict(moe_intermediate_size=0.5),
        dict(decoder_sparse_step=0),
        dict(mlp_only_layers=5),
        dict(num_hidden_layers=1024, num_experts=1024),
    ],
    ids=str,
)
def test_counts_of_experts_that_make_no_sense_are_refused(changes):
    sound = dict(
        architectures=["Qwen3MoeForCausalLM"], hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=258, num_experts=16,
    )  # fmt: skip
    assert read_config(sound).layers[0].mlp.taken == 8
    with pytest.raises(CheckpointError) as e:
        read_config(sound | changes)
    assert len(str(e.value).splitlines()) == 2


def test_either_name_of_the_number_of_experts_is_read():
    sound = dict(
        architectures=["Qwen3MoeForCausalLM"], hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=258,
    )  # fmt: skip
    assert read_config(sound).n_experts == 128
    for name in ("num_experts", "num_local_experts"):
        assert read_config({**sound, name: 24}).n_experts == 24


def test_silent_settings_are_those_of_transformers():
    # config.json leaves out what equals transformers' default, so the defaults here must be the same.
    import transformers

    names = (
        "Qwen2",
        "Qwen3",
        "Qwen3Moe",
        "Mistral",
        "Mixtral",
        "Phi3",
        "SmolLM3",
        "Olmo2",
        "Granite",
        "Gemma2",
        "Gemma3",
        "Gemma3n",
        "Gemma4",
        "Gemma4Unified",
        "Olmo3",
        "Exaone4",
        "Ernie4_5",
        "SeedOss",
        "Glm",
        "Glm4",
        "Lfm2",
        "Lfm2Moe",
        "Lfm3",
        "Qwen3_5",
        "Qwen3_5Moe",
        "Qwen3Next",
        "Ministral3",
        "HunYuanDenseV1",
        "GraniteSWA",
        "GraniteMoeHybrid",
        "FalconH1",
        "NemotronH",
        "Qwen2Moe",
        "GptOss",
    )
    attends = {"layer_types": ["full_attention"] + ["linear_attention"] * 31}
    also = {"GraniteMoeHybridForCausalLM": attends}  # whose layers have no attention where it is silent
    for name in (f"{n}ForCausalLM" for n in names):
        whole = getattr(transformers, name).config_class(**also.get(name, {})).to_dict()
        needed = (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id",
        )  # fmt: skip
        bare = {n: whole[n] for n in needed if n in whole} | {"architectures": [name]} | also.get(name, {})
        assert read_config(bare) == read_config(whole | {"architectures": [name]}), name
