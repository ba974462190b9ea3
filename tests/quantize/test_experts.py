"""Mixtures of experts through the quantizers: each on the tokens that reach it, routers as they were."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import CASES, logits_of, random_model
from memories import allocate, step_of
from safetensors.numpy import load_file
from tiny import byte_tokenizer

from tinychat.backends.reference import ReferenceBackend
from tinychat.base.errors import UnsupportedModelError
from tinychat.formats.hf import HFCheckpoint
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import QuantizedLinear
from tinychat.quantize import experts, quantize, tune
from tinychat.quantize.block import BlockQuantizer, Options, round_to_nearest
from tinychat.quantize.forward import Forward, read_block
from tinychat.quantize.grids import Grid
from tinychat.quantize.linears import kept, quantized

SMALL = dict(num_hidden_layers=2, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
FOUR = {
    "mixtral": dict(num_local_experts=4),
    "qwen2moe": dict(num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32),
}
TEXT = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 1024)))
IDS = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def saved(case, folder, **changes):
    """A small model of that kind in a folder, and transformers' own."""
    cls, own = CASES[case]
    hf = random_model(cls, **(own | SMALL | FOUR.get(case, {}) | changes))
    hf.save_pretrained(folder)
    byte_tokenizer().save(folder)
    return HFCheckpoint(folder), hf


def divergence(folder, hf, ids) -> float:
    """KL(transformers' float model ‖ the folder) on a text, the mean over tokens."""
    backend, n = ReferenceBackend(HFCheckpoint(folder), WeightPolicy("none", 16)), len(ids)
    allocate(backend, 16)
    ours = backend.step(step_of(backend, ids.astype(np.int32), 0, 0, np.arange(16, dtype=np.int32), 0))
    theirs, ours = (torch.from_numpy(x).double().log_softmax(-1) for x in (logits_of(hf, ids), ours))
    return float(torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)) / n


@pytest.mark.parametrize("case", ["qwen2moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_calibration_loses_less_on_its_text_than_rounding_and_routers_stay(case, text, tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "LEAST", 64)
    checkpoint, hf = saved(case, tmp_path / "source")
    lost = {}
    for method, ranges in (("awq", "searched"), ("gptq", "whole"), ("rtn", "whole")):
        quantize(checkpoint, tmp_path / method, method=method, ranges=ranges, group_size=32, calib_file=text)
        written = HFCheckpoint(tmp_path / method)
        written.check_complete()
        assert written.config == checkpoint.config
        for name in quantized(checkpoint.config, 1):
            assert isinstance(written.linear(name), QuantizedLinear)
        for name in kept(checkpoint.config):
            np.testing.assert_array_equal(
                written.linear(name).dequantize(), checkpoint.linear(name).dequantize()
            )
        lost[method] = divergence(tmp_path / method, hf, IDS[:256])
    assert lost["awq"] < lost["gptq"] < lost["rtn"]


def test_the_tensors_have_the_names_that_others_read(text, tmp_path):
    checkpoint, _ = saved("mixtral", tmp_path / "source")
    quantize(checkpoint, tmp_path / "out", method="rtn", ranges="whole", group_size=32)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    moe = "model.layers.1.block_sparse_moe."
    expected = {f"{moe}experts.{e}.w{i}" for e in range(4) for i in (1, 2, 3)}
    assert {
        n.removesuffix(".qweight") for n in names if n.startswith(moe) and n.endswith("qweight")
    } == expected
    assert f"{moe}gate.weight" in names
    assert not any(".mlp." in n for n in names)


@pytest.mark.parametrize(
    ("format", "setting"), [("compressed-tensors", "ignore"), ("awq", "modules_to_not_convert")]
)
def test_config_json_names_what_stays_as_others_look_for_it(format, setting, tmp_path):
    checkpoint, _ = saved("qwen2moe", tmp_path / "source")
    quantize(checkpoint, tmp_path / "out", method="rtn", ranges="whole", format=format)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][setting]
    gates = {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate", "shared_expert_gate")}
    assert set(said) - {"lm_head"} == gates


def test_norms_and_embeddings_have_the_names_of_their_family(tmp_path):
    for case, theirs in (
        ("lfm2", "embedding_norm"),
        ("nemotron-h bias", "norm_f"),
        ("falcon-h1", "final_layernorm"),
    ):
        cls, changes = CASES[case]
        hf = random_model(cls, **changes)
        hf.save_pretrained(tmp_path / case)
        byte_tokenizer().save(tmp_path / case)
        quantize(HFCheckpoint(tmp_path / case), tmp_path / "out", method="rtn", ranges="whole", group_size=32)
        names = set(load_file(tmp_path / "out" / "model.safetensors"))
        assert f"model.{theirs}.weight" in names
        # all that is not quantized is there as transformers calls it
        assert {n for n in hf.state_dict() if "norm" in n or "embed" in n} <= names


def test_what_latent_attention_multiplies_heads_by_stays_in_the_tensor_that_files_have(text, tmp_path):
    cls, changes = CASES["glm4moelite"]
    hf = random_model(cls, **changes).half().float()
    hf.save_pretrained(tmp_path / "source")
    byte_tokenizer().save(tmp_path / "source")
    checkpoint = HFCheckpoint(tmp_path / "source")
    quantize(checkpoint, tmp_path / "out", method="rtn", ranges="whole", group_size=32)
    tensors, whole = (
        load_file(tmp_path / "out" / "model.safetensors"),
        "model.layers.1.self_attn.kv_b_proj.weight",
    )
    assert tensors[whole].dtype == np.float16
    np.testing.assert_array_equal(tensors[whole], hf.state_dict()[whole].numpy())
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    np.testing.assert_array_equal(tensors[bias], hf.state_dict()[bias].numpy())
    assert HFCheckpoint(tmp_path / "out").config == checkpoint.config


def test_each_expert_gets_the_tokens_that_transformers_routes_to_it(tmp_path):
    checkpoint, hf = saved("qwen2moe", tmp_path / "source")
    cfg, ids = checkpoint.config, torch.from_numpy(IDS[:240]).view(3, 80)
    with torch.inference_mode():
        scores = hf(ids, output_router_logits=True).router_logits[0]
    taken = scores.view(240, -1).topk(cfg.layers[0].mlp.taken).indices
    f = Forward(cfg)
    with torch.inference_mode():
        x = f.embed(torch.from_numpy(checkpoint.linear("model.embed_tokens").dequantize()), ids)
        w = read_block(checkpoint, 0)
        first, second = f.halves(0)
        x = f.value(first.end, w, {first.start: x})
        rows, routed = experts.given(f, second.start, second.mixture, w, x, batch=2)
    assert rows.shape == (240, cfg.hidden_size)
    for e in range(4):
        by_hand = [t for t in range(240) if e in taken[t].tolist()]
        assert routed.tokens[e].tolist() == by_hand


def test_an_expert_that_few_tokens_reach_is_fitted_to_those_of_the_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "LEAST", 192)
    checkpoint, _ = saved("mixtral", tmp_path / "source", num_experts_per_tok=1)
    f, w = Forward(checkpoint.config), read_block(checkpoint, 0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 160, 8, generator=g) @ torch.randn(8, 64, generator=g)
    second = f.halves(0)[1]
    with torch.inference_mode():
        router, few = w.norm["mlp.gate"], 2
        router[few], router[1] = 0, -router[0]  # of these two one is always better
        m, routed = experts.given(f, second.start, second.mixture, w, x, batch=2)
        reached = experts.reach(routed, m)
        assert len(routed.tokens[few]) < experts.LEAST
        assert reached[few].tolist() == list(range(640))
        served = [e for e in range(4) if len(routed.tokens[e]) >= experts.LEAST]
        assert served
        assert all(reached[e] is routed.tokens[e] for e in served)
        grid = lambda k: Grid(group=32)  # noqa: E731
        fitted, _, _ = BlockQuantizer(f, Options(grid, target="local"))(w, x.clone(), x.clone())
        nearest = round_to_nearest(w, grid, checkpoint.config)
        name = f"mlp.experts.{few}.gate_proj"  # whose rows are as they were
        between = f.value(f.halves(0)[0].end, fitted.weights(), {f.halves(0)[0].start: x})
        read, _ = experts.given(f, second.start, second.mixture, fitted.weights(), between, batch=2)
        wanted = read @ w.linear[name].T
        lost = [(read @ q.linear[name].dequantize().T - wanted).square().mean() for q in (fitted, nearest)]
        assert lost[0] < 0.5 * lost[1]
        between = f.value(f.halves(0)[0].end, w, {f.halves(0)[0].start: x})
        m, _ = experts.given(f, second.start, second.mixture, w, between, batch=2)
        importance = f.mean_squares(x.clone(), w)
    assert all(of.isfinite().all() for of in importance.values())
    torch.testing.assert_close(importance[f"mlp.experts.{few}.up_proj"], m.square().mean(0))


def test_every_token_that_one_expert_gets_is_weighed_as_in_the_forward_pass(tmp_path):
    """Batches follow each other: tokens of the second have other numbers, and no other weights."""
    checkpoint, _ = saved("mixtral", tmp_path / "source")
    f, w = Forward(checkpoint.config), read_block(checkpoint, 1)
    x = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(1))
    half = f.halves(1)[1]
    with torch.inference_mode():
        m, whole = experts.given(f, half.start, half.mixture, w, x, batch=3)
        again, parts = experts.given(f, half.start, half.mixture, w, x, batch=1)
    torch.testing.assert_close(m, again)
    for a, b in zip(whole.tokens, parts.tokens, strict=True):
        assert a.tolist() == b.tolist()
    for a, b in zip(whole.weights, parts.weights, strict=True):
        torch.testing.assert_close(a, b)


def test_tuning_moves_experts_and_leaves_routers_as_they_are(text, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "PLAN", tune.Schedule(steps=4, batch=1, held_out=2, every=2, warmup=1))
    monkeypatch.setattr(tune, "LENGTH", 64)
    checkpoint, _ = saved("qwen2moe", tmp_path / "source")
    wishes = dict(method="rtn", ranges="whole", group_size=32, calib_file=text)
    tuned = quantize(checkpoint, tmp_path / "out", tune=True, **wishes)["tuned"]
    assert tuned["divergence_after"] < tuned["divergence_before"]
    quantize(checkpoint, tmp_path / "plain", **wishes)
    out, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    different = {name for name in out if not np.array_equal(out[name], plain[name])}
    assert any("experts.3.down_proj" in name for name in different)
    gates = {name for name in out if name.endswith((".gate.weight", "expert_gate.weight"))}
    assert len(gates) == 4
    assert not gates & different


def test_experts_that_have_four_bits_are_not_quantized_again(tmp_path):
    checkpoint, _ = saved("gpt-oss", tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="4 bits"):
        quantize(checkpoint, tmp_path / "out", method="rtn")
    assert not (tmp_path / "out").exists()
