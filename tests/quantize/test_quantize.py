"""The quantizer on a tiny random Llama: folder written, function kept, bad input refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_logits import logits
from tiny import TinyCheckpoint, files

from tinychat.base.errors import CheckpointError, TinychatError, UsageError
from tinychat.formats.hf import HFCheckpoint
from tinychat.network.weights import QuantizedLinear, quantize_rtn
from tinychat.quantize import folder, quantize, settings
from tinychat.quantize.forward import Forward, read_block
from tinychat.quantize.grids import Grid
from tinychat.quantize.nodes import BlockWeights
from tinychat.quantize.target import choose_group

SUPPORT = Path(__file__).parents[1] / "support"
HEADS = {"grouped": {}, "one to one": {"n_kv_heads": 4}, "untied": {"tie_embeddings": False}}


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS.keys())
def test_the_folder_is_read_back_bit_for_bit_and_by_transformers(tmp_path, text, changes):
    transformers = pytest.importorskip("transformers")
    source = TinyCheckpoint(**changes)
    facts = quantize(source, tmp_path / "out", calib_file=text)
    assert facts["group_size"] == 32
    assert not (tmp_path / ".out.partial").exists()
    c = HFCheckpoint(tmp_path / "out")
    for field in (
        "hidden_size",
        "n_layers",
        "attentions",
        "tie_embeddings",
        "eos_ids",
    ):
        assert getattr(c.config, field) == getattr(source.config, field)
    assert c.has("lm_head") != source.config.tie_embeddings
    embedding = source.linear("model.embed_tokens").dequantize()
    assert np.array_equal(c.linear("model.embed_tokens").weight, embedding.astype(np.float16))
    assert isinstance(c.linear("model.layers.1.mlp.down_proj"), QuantizedLinear)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.quantization_config["quant_method"] == "awq"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("hi\n").input_ids == source.tokenizer().encode("hi\n")
    chat = [{"role": "user", "content": "hi"}]
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template(chat, tokenize=False)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 257


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS.keys())
def test_folded_scales_leave_the_float_function_as_it_is(tmp_path, text, monkeypatch, changes):
    """With rounding switched off, what is left of AWQ must be the same network."""
    from tinychat.quantize import block

    class Unrounded:
        """A weight that claims to be rounded."""

        def __init__(self, w):
            self.w = w

        def dequantize(self):
            return self.w

        def divide_rows(self, s):
            self.w = self.w / s[:, None]

    norms = {}

    def no_fp16(self, group, w, s):
        norms[group.names] = s
        return s

    monkeypatch.setattr(block, "compensated", lambda w, metric, grid, search=True: Unrounded(w))
    monkeypatch.setattr(block, "refine", lambda w, metric, r, rounds: r)
    monkeypatch.setattr(block.Metric, "loss", lambda self, w, r: -float(self.u.diagonal().prod()))
    source = TinyCheckpoint(**changes)
    options = block.Options(lambda k: Grid(group=32), target="local", alphas=(0.0, 0.7))
    f = Forward(source.config)
    x = torch.randn(4, 64, source.config.hidden_size)
    quantizer = block.BlockQuantizer(f, options)
    # Judges see no difference between scales here; make them take the second.
    monkeypatch.setattr(block, "_better", lambda error, best: True)
    w = read_block(source, 0)
    before = f.block(x, w)
    quantized, _, after = quantizer(w, x.clone(), x.clone())
    assert torch.allclose(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    folded = quantized.weights()
    assert torch.allclose(f.block(x, folded), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert not torch.allclose(folded.norm[name], w.norm[name], rtol=0.05)
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert not torch.allclose(folded.linear[name], w.linear[name], rtol=0.05)


def read_as_autoawq_does(folder: Path, module: str) -> torch.Tensor:
    """A weight [out, in] from the files alone, in the way of AutoAWQ's `dequantize_gemm`: shift the nibbles
    of a word apart, put them in the order 0, 4, 1, 5, 2, 6, 3, 7, repeat scales and zeros down the group.
    """
    from safetensors.torch import load_file

    q = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (q["quant_method"], q["version"], q["bits"], q["zero_point"]) == ("awq", "gemm", 4, True)
    t = load_file(folder / "model.safetensors")

    def nibbles(words: torch.Tensor) -> torch.Tensor:
        apart = (words[:, :, None] >> torch.arange(0, 32, 4)) & 15
        return apart[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1)

    def down(rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat_interleave(q["group_size"], dim=0)

    codes, zeros = nibbles(t[module + ".qweight"]), nibbles(t[module + ".qzeros"])
    return ((codes - down(zeros)) * down(t[module + ".scales"].float())).T


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS.keys())
def test_an_independent_reader_of_the_folder_gets_the_same_weights_and_logits(tmp_path, text, changes):
    import tinychat
    from tinychat.models.llama import linears

    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    quantize(TinyCheckpoint(**changes), out, calib_file=text)
    ours = HFCheckpoint(out)
    config = transformers.LlamaConfig.from_pretrained(out)
    del config.quantization_config
    theirs = transformers.LlamaForCausalLM(config).eval()
    from safetensors.torch import load_file

    state = {k: v.float() for k, v in load_file(out / "model.safetensors").items() if k.endswith(".weight")}
    for layer in range(ours.config.n_layers):
        for name in linears(ours.config, layer):
            weight = read_as_autoawq_does(out, name)
            assert torch.equal(weight, torch.from_numpy(ours.linear(name).dequantize()))
            state[name + ".weight"] = weight
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    theirs.tie_weights()
    ids = list(b"They say the lazy fox jumps.")
    with torch.inference_mode():
        want = theirs(torch.tensor([ids])).logits[0].numpy()
    with tinychat.load(out, device="reference", head_bits=16) as model:
        got = model.logits(ids)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_torchs_threads_are_left_as_they_were(tmp_path, text):
    from tinychat.quantize import rounding

    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        quantize(TinyCheckpoint(n_layers=1), tmp_path / "out", calib_file=text)
        assert torch.get_num_threads() == before + 1
        with pytest.raises(AttributeError):
            rounding.compensated(None, None, Grid())
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_what_is_written_computes_what_the_quantizer_saw(tmp_path, text):
    """The written folder, run by transformers, agrees with the float model far better than chance."""
    source = TinyCheckpoint()
    quantize(source, tmp_path / "awq", calib_file=text)
    quantize(source, tmp_path / "rtn", method="rtn")
    ids = np.frombuffer(b"They say the lazy fox jumps 9 times over 8 dogs.", np.uint8).astype(np.int64)
    want = logits(source, ids)
    error = {m: float((logits(HFCheckpoint(tmp_path / m), ids) - want).pow(2).mean()) for m in ("awq", "rtn")}
    assert error["awq"] < error["rtn"] < 0.2 * float(want.pow(2).mean())


def test_rtn_is_plain_rounding_to_nearest(tmp_path):
    source = TinyCheckpoint()
    quantize(source, tmp_path / "rtn", method="rtn", ranges="whole")
    c = HFCheckpoint(tmp_path / "rtn")
    name = "model.layers.0.mlp.gate_proj"
    want, got = quantize_rtn(source.linear(name).dequantize(), 32), c.linear(name)
    assert np.array_equal(got.scales, want.scales)
    assert np.array_equal(got.zeros, want.zeros)
    assert (got.codes != want.codes).mean() < 1e-3  # ties may fall either way


def test_awq_loses_less_than_rtn_on_held_out_activations():
    from tinychat.quantize.block import BlockQuantizer, Options, round_to_nearest

    torch.manual_seed(0)
    source = TinyCheckpoint(hidden_size=128, intermediate_size=256, head_dim=32)
    f = Forward(source.config)
    w = read_block(source, 0)
    loud = torch.where(torch.rand(128) < 0.05, 12.0, 1.0)  # a few loud channels, as language models have
    mix = torch.randn(128, 128) / 12

    def make(n: int) -> torch.Tensor:
        return (torch.randn(n, 128, 128) @ mix) * loud

    calibration, held_out = make(24), make(8)
    want = f.block(held_out, w)

    def error(q: BlockWeights) -> float:
        return float((f.block(held_out, q) - want).pow(2).mean())

    rtn = error(round_to_nearest(w, lambda k: Grid(group=64), source.config).weights())
    quantizer = BlockQuantizer(f, Options(lambda k: Grid(group=64)))
    awq = error(quantizer(w, calibration.clone(), calibration.clone())[0].weights())
    assert awq < 0.6 * rtn


def test_biases_are_carried_through_the_folding(tmp_path, text):
    from tinychat.quantize.block import BlockQuantizer, Options, round_to_nearest

    source = TinyCheckpoint()
    f = Forward(source.config)
    w = read_block(source, 0)
    torch.manual_seed(0)
    w.bias = {n: torch.randn(t.shape[0]) for n, t in w.linear.items()}
    x = torch.randn(8, 64, 64)
    want = f.block(x, w)
    quantized, _, _ = BlockQuantizer(f, Options(lambda k: Grid(group=32)))(w, x.clone(), x.clone())
    got = f.block(x, quantized.weights())
    # A bias that folding loses costs as much as the whole output; mere rounding does not.
    rounded = f.block(x, round_to_nearest(w, lambda k: Grid(group=32), source.config).weights())
    assert float((got - want).pow(2).mean()) < float((rounded - want).pow(2).mean())


def test_the_same_call_gives_the_same_bytes(tmp_path, text):
    for name in ("a", "b"):
        quantize(TinyCheckpoint(), tmp_path / name, calib_file=text)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("method", ["awq", "rtn"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_weights_are_refused_by_name(tmp_path, text, method, bad):
    source = TinyCheckpoint()
    source.weights["model.layers.1.mlp.up_proj"][3, 5] = bad
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        quantize(source, tmp_path / "out", method=method, calib_file=text)
    assert not (tmp_path / "out").exists()


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do(tmp_path):
    source = TinyCheckpoint(hidden_size=192, intermediate_size=256, n_heads=4, head_dim=48)
    assert choose_group(source.config, None) == 64
    with pytest.raises(UsageError) as e:
        quantize(source, tmp_path / "out", group_size=128)
    assert "128 does not divide the 192 inputs" in e.value.what
    assert "64 or 32" in e.value.todo
    for bad in (0, -2, 48, 16):
        with pytest.raises(UsageError):
            choose_group(source.config, bad)
    with pytest.raises(TinychatError, match="No group size"):
        choose_group(TinyCheckpoint(intermediate_size=72).config, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("short.txt", b"too short", "tokens"),
        ("latin1.txt", b"caf\xe9 " * 100, "UTF-8"),
        ("chats.jsonl", b'{"prompt": "hi"}\n' * 100, "neither"),
        ("chats.jsonl", b"{" * 100, "cannot be used"),
    ],
)
def test_calibration_text_that_cannot_be_used_is_refused(tmp_path, name, content, word):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UsageError, match=word):
        quantize(TinyCheckpoint(), tmp_path / "out", calib_file=file)
    with pytest.raises(UsageError, match="cannot be used"):
        quantize(TinyCheckpoint(), tmp_path / "out", calib_file=tmp_path / "missing.txt")


def test_chats_are_calibrated_on_in_the_models_own_template(tmp_path):
    from tinychat.quantize.calibration import windows

    tokenizer = TinyCheckpoint().tokenizer()
    file = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]}
    file.write_text(json.dumps(chat) + "\n")
    ids = windows(tokenizer, file=file)[0].tolist()
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello there<|im_end|>\n"
    )
    assert ids.count(256) == 2


def test_the_default_text_is_half_a_models_and_half_peoples(demo_gguf):
    from pydoc_data.topics import topics

    from tinychat.formats import open_checkpoint
    from tinychat.quantize.calibration import DEFAULT, windows

    tokenizer = open_checkpoint(demo_gguf).tokenizer()
    ids = windows(tokenizer, count=16, length=128)
    assert ids.shape == (16, 128)
    assert np.array_equal(ids, windows(tokenizer, count=16, length=128))
    assert not np.array_equal(ids, windows(tokenizer, count=16, length=128, seed=1))
    reference = "".join(topics.values())
    told = ""
    for d in map(json.loads, DEFAULT.read_text(encoding="utf-8").splitlines()):
        told += d["text"] if "text" in d else "".join(m["content"] for m in d["messages"])
    middles = [tokenizer.decode(row[40:60].tolist()) for row in ids]
    assert 5 <= sum(m in reference for m in middles) <= 11
    assert 5 <= sum(m in told for m in middles) <= 11


def test_large_models_are_written_in_shards(tmp_path):
    arrays = {f"t{i}": np.full((10, 10), i, np.float16) for i in range(5)}
    entries = [folder.Entry.of(k, v) for k, v in arrays.items()]
    folder.write_weights(tmp_path, entries, shard_bytes=450)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    from safetensors.numpy import load_file

    for name, file in index["weight_map"].items():
        assert np.array_equal(load_file(tmp_path / file)[name], arrays[name])


def test_llama3_rope_written_out_by_gguf_is_named_again():
    from tinychat.base.errors import UnsupportedModelError
    from tinychat.network.config import RopeConfig

    llama3 = RopeConfig(500000.0, 64, "llama3", 32.0, 1.0, 4.0, 8192)
    plain = RopeConfig(500000.0, 64)
    factors = tuple((plain.frequencies() / llama3.frequencies()).tolist())
    assert settings._rope_scaling(RopeConfig(500000.0, 64, "factors", factors=factors)) == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    with pytest.raises(UnsupportedModelError):
        settings._rope_scaling(RopeConfig(500000.0, 64, "factors", factors=tuple([3.0] * 32)))


@pytest.mark.slow
def test_awq_recovers_most_of_what_rounding_to_nearest_loses(demo_gguf, tmp_path):
    """Perplexity of the float weights, AWQ g64 and RTN g64, on text that calibration never saw."""
    from importlib.metadata import metadata

    from tinychat.formats import open_checkpoint

    source = open_checkpoint(demo_gguf)
    packages = (
        "huggingface-hub",
        "textual",
        "click",
        "rich",
        "jinja2",
        "tokenizers",
        "safetensors",
        "hypothesis",
    )
    text = "\n\n".join(metadata(p).get_payload() or "" for p in packages)
    ids = source.tokenizer().encode(text)
    windows = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)[:24]
    assert len(windows) >= 12
    found = {"float": _perplexity(source, windows)}
    for method in ("awq", "rtn"):
        quantize(source, tmp_path / method, method=method, group_size=64)
        found[method] = _perplexity(HFCheckpoint(tmp_path / method), windows)
    print(found)
    assert found["float"] < found["awq"] < found["rtn"]
    assert (found["rtn"] - found["awq"]) / (found["rtn"] - found["float"]) >= 0.45


@torch.inference_mode()
def _perplexity(checkpoint, windows: torch.Tensor) -> float:
    """Of the second half of each window, dequantized weights in float32."""
    f = Forward(checkpoint.config)
    embedding = torch.from_numpy(checkpoint.linear("model.embed_tokens").dequantize())
    x = embedding[windows]
    for layer in range(checkpoint.config.n_layers):
        w = read_block(checkpoint, layer)
        x = torch.cat([f.block(part, w) for part in x.split(4)])
    half = windows.shape[1] // 2
    x = f.normed(x[:, half - 1 : -1], torch.from_numpy(checkpoint.vector("model.norm")))
    losses = [
        torch.nn.functional.cross_entropy(x[i] @ embedding.T, windows[i, half:]) for i in range(len(windows))
    ]
    return float(torch.stack(losses).mean().exp())
