"""What `show` says of a model: each kind of module, its form and its bytes, read from headers."""

from __future__ import annotations

import json
import re

import pytest
import tiny_gguf
from cli_helpers import in_process, on_terminal
from families import CASES, random_model
from family_gguf import write as write_family
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file, save_file
from tiny import tiny_folder

from tinychat.base.machine import human_bytes
from tinychat.formats import awq
from tinychat.formats.hf import read_config
from tinychat.hub import store
from tinychat.hub.facts import parameters
from tinychat.network.weights import quantize_rtn

INT8 = "8-bit, groups of 32, fp16 scale"


def entry(form: str, bits: float, size: int, runs: str | None = None, runs_bytes: int | None = None) -> dict:
    """What `show` says of one form of one kind of module."""
    return {
        "bits": bits,
        "bytes": size,
        "runs_as": runs or form,
        "runs_bytes": runs_bytes or size,
        "rounded": runs is not None,
    }


def test_a_gguf_says_the_form_of_each_kind_of_module(tmp_path):
    tiny_gguf.write(tmp_path / "m.gguf", Kind.Q4_1)
    facts = store.show(str(tmp_path / "m.gguf"))
    form = "4-bit, groups of 32, fp16 scale and offset"
    h, f, rows = tiny_gguf.H, tiny_gguf.F, (4 + 2 + 2) * 16
    numbers = {
        "embedding": tiny_gguf.VOCAB * h,
        "attention": 2 * (rows * h + h * h),
        "mlp": 2 * 3 * h * f,
    }
    entries = {kind: (n // 32 * 20) for kind, n in numbers.items()}
    assert facts["modules"] == {kind: {form: entry(form, 5.0, n)} for kind, n in entries.items()}
    token = sum(entries.values())  # the embedding is the head too
    assert facts["token"] == {"stored_bytes": token, "runs_bytes": token}
    code, out, _ = in_process("show", str(tmp_path / "m.gguf"))
    assert code == 0
    assert any(line.split() == ["embedding", "5", "10.4", "kB", *form.split()] for line in out.splitlines())
    assert out.splitlines()[-1].split()[0] == "token"
    code, out, _ = in_process("show", "--json", str(tmp_path / "m.gguf"))
    assert json.loads(out)["modules"] == facts["modules"]


@pytest.mark.parametrize("case", ["lfm2", "lfm3", "qwen3.5", "qwen3.5moe", "lfm2moe", "qwen3"])
def test_parameters_are_as_many_as_transformers_counts(case):
    cls, changes = CASES[case]
    hf = random_model(cls, **changes)
    given = {**hf.config.to_dict(), "architectures": [cls]}
    biases = sum(b.numel() for name, b in hf.named_buffers() if name.endswith("expert_bias"))
    assert parameters(read_config(given)) == sum(p.numel() for p in hf.parameters()) + biases


def test_a_type_that_has_no_words_is_called_by_its_name(tmp_path, monkeypatch):
    from tinychat.formats import gguf

    tiny_gguf.write(tmp_path / "m.gguf", Kind.Q5_0)
    monkeypatch.setattr(gguf, "FORMS", {})
    mlp = store.show(str(tmp_path / "m.gguf"))["modules"]["mlp"]
    n = 2 * 3 * tiny_gguf.H * tiny_gguf.F
    assert mlp == {"Q5_0": entry("Q5_0", 5.5, n // 32 * 22, INT8, n // 32 * 34)}
    _, out, _ = in_process("show", str(tmp_path / "m.gguf"))
    assert f"Q5_0; runs rounded to int8, {human_bytes(n // 32 * 34)}" in out
    assert re.search(r"token .*read for each token; [\d.]+ kB as stored", out)


def test_sixteen_bit_weights_run_as_int8_and_a_token_reads_only_the_experts_it_takes(tmp_path):
    hf = random_model("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=1)
    write_family(tmp_path / "m.gguf", hf, "llama")
    facts = store.show(str(tmp_path / "m.gguf"))
    assert list(facts["modules"]) == ["embedding", "attention", "router", "experts", "head"]
    assert facts["modules"]["router"]["fp32"] == entry("fp32", 32.0, 3 * 4 * 64 * 4)
    experts = 3 * 4 * 3 * 64 * 128
    assert facts["modules"]["experts"] == {"fp32": entry("fp32", 32.0, 4 * experts, INT8, experts // 32 * 34)}
    attention, head = 3 * (64 * 64 * 2 + 64 * 32 * 2), 258 * 64
    floats = attention + head + experts // 4
    assert facts["token"]["stored_bytes"] == 4 * floats + 3 * 4 * 64 * 4
    assert facts["token"]["runs_bytes"] == floats // 32 * 34 + 3 * 4 * 64 * 4


@pytest.mark.parametrize("described", [True, False])
def test_a_folder_says_forms_by_its_tensors_and_settings(tmp_path, described):
    folder = tiny_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight")).removesuffix(".weight")
    w = tensors.pop(f"{name}.weight")
    parts = awq.pack(quantize_rtn(w.astype("float32"), 32))
    save_file(tensors | {f"{name}.{p}": a for p, a in parts.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if described:
        config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    mlp = store.show(str(folder))["modules"]["mlp"]
    form = "4-bit, groups of 32, fp16 scale and zero point"
    words = form if described else "codes that config.json does not describe"
    assert mlp.pop(words)["bytes"] == sum(a.nbytes for a in parts.values())
    (rest,) = mlp.values()
    assert rest["bytes"] == sum(a.nbytes for n, a in tensors.items() if ".mlp." in n)


def test_a_form_that_a_file_packs_tighter_says_what_it_takes_here(tmp_path):
    """TQ1_0 has five ternary digits in a byte, 1.69 bits a weight; codes of 2 bits and a scale take 2.06."""
    hf = random_model("LlamaForCausalLM", hidden_size=256, num_hidden_layers=1, intermediate_size=512)
    write_family(tmp_path / "m.gguf", hf, "llama", lambda name: Kind.TQ1_0 if ".ffn_" in name else None)
    form, n = "2-bit, groups of 256, fp16 scale", 3 * 256 * 512
    facts = store.show(str(tmp_path / "m.gguf"))
    expected = {"bits": 1.6875, "bytes": n // 256 * 54, "runs_as": form, "runs_bytes": n // 256 * 66}
    assert facts["modules"]["mlp"] == {form: expected | {"rounded": False}}
    _, out, _ = in_process("show", str(tmp_path / "m.gguf"))
    assert f"{form}; runs as it is, {human_bytes(n // 256 * 66)}" in out


@pytest.mark.parametrize("width", [60, 80])
def test_show_fits_a_terminal_and_loses_nothing_there(tmp_path, width):
    hf = random_model("LlamaForCausalLM", hidden_size=256, num_hidden_layers=1)
    kinds = {"blk.0.attn_q.weight": Kind.Q4_K, "blk.0.attn_v.weight": Kind.Q6_K}
    write_family(tmp_path / "m.gguf", hf, "llama", kinds.get)
    _, piped, _ = in_process("show", str(tmp_path / "m.gguf"))
    code, out = on_terminal("show", tmp_path / "m.gguf", width=width)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert max(map(len, plain.splitlines())) <= width
    for words in (piped, plain):
        for form in (
            "4-bit, groups of 32, 6-bit scale and offset × fp16",
            "6-bit, groups of 16, 8-bit scale",
        ):
            assert set(form.split()) <= set(words.split())
    assert len(piped.splitlines()) < 30  # a line a row
