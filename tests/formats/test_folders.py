"""Which folders load, and what they hold, as transformers has it: missing tensors, shards, ties."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager, suppress

import numpy as np
import packers
import pytest
from safetensors.numpy import load_file, save_file
from tiny import byte_tokenizer

from tinychat.base.errors import CheckpointError, TinychatError, UnsupportedModelError
from tinychat.formats import open_checkpoint
from tinychat.formats.hf import read_config
from tinychat.hub import store

transformers = pytest.importorskip("transformers")
INDEX = "model.safetensors.index.json"
NAMES = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}


@pytest.fixture
def folder(tmp_path):
    """An untied tiny Llama in one file, as transformers saves it."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=258,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save(tmp_path / "m")
    return tmp_path / "m"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def settings(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shards(folder, parts, index=None):
    """Replace the whole file by shards `parts`: name → tensors; the index names them all, or is `index`."""
    (folder / "model.safetensors").unlink()
    for name, tensors in parts.items():
        save_file(tensors, folder / name, {"format": "pt"})
    weight_map = {t: name for name, tensors in parts.items() for t in tensors} if index is None else index
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_transformers(folder):
    """Assert that both read the same weights, or that what transformers misses is refused by name."""
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        with pytest.raises(CheckpointError) as e:
            open_checkpoint(folder)
        assert any(name in e.value.what for name in missing)
        return missing
    ours, state = open_checkpoint(folder), theirs.state_dict()
    tied = theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    assert ours.config.tie_embeddings == tied
    for name, t in state.items():
        module = name.removesuffix(".weight")
        if module == "lm_head" and tied:
            continue
        got = ours.vector(module) if "norm" in module else ours.linear(module).weight
        np.testing.assert_array_equal(got, t.numpy(), name)
    return []


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_refused_by_name_before_anything_is_read(folder, name):
    tensors = tensors_of(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert as_transformers(folder) == [name]


def test_a_missing_bias_is_refused_by_name(folder):
    settings(folder, attention_bias=True)
    missing = as_transformers(folder)
    assert "model.layers.0.self_attn.q_proj.bias" in missing


def test_one_whole_file_beside_leftovers_of_shards_loads(folder):
    whole = tensors_of(folder)
    stale = {n: np.zeros_like(a) for n, a in whole.items()}
    names = sorted(stale)
    save_file({n: stale[n] for n in names[:5]}, folder / "model-00001-of-00003.safetensors", {"format": "pt"})
    index = dict.fromkeys(names, "model-00002-of-00003.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert as_transformers(folder) == []


@pytest.mark.parametrize("cut", [1, 4, 10])
def test_any_sharding_loads(folder, cut):
    whole = tensors_of(folder)
    names = sorted(whole)
    pieces = [names[i : i + cut] for i in range(0, len(names), cut)]
    shards(folder, {f"part{i}.safetensors": {n: whole[n] for n in part} for i, part in enumerate(pieces)})
    assert as_transformers(folder) == []


def test_what_a_shard_holds_counts_and_not_what_the_index_says_of_it(folder):
    whole = tensors_of(folder)
    names = sorted(whole)
    first, second = {n: whole[n] for n in names[:8]}, {n: whole[n] for n in names[6:]}
    second |= {n: a + 1 for n, a in first.items() if n in second}  # in both: the later file's
    index = {names[0]: "a.safetensors", names[1]: "b.safetensors", "nowhere": "a.safetensors"}
    shards(folder, {"a.safetensors": first, "b.safetensors": second}, index)
    assert as_transformers(folder) == []


def test_a_tied_model_with_a_head_of_its_own_is_not_tied(folder):
    settings(folder, tie_word_embeddings=True)
    assert as_transformers(folder) == []
    assert not open_checkpoint(folder).config.tie_embeddings


@pytest.mark.parametrize("kept", ["embed", "head"])
def test_tied_tensors_stand_in_for_each_other(folder, kept):
    settings(folder, tie_word_embeddings=True)
    tensors = tensors_of(folder)
    del tensors[NAMES["head" if kept == "embed" else "embed"]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert as_transformers(folder) == []


def test_a_tied_model_with_the_same_head_is_tied(folder):
    settings(folder, tie_word_embeddings=True)
    tensors = tensors_of(folder)
    tensors[NAMES["head"]] = tensors[NAMES["embed"]].copy()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ours = open_checkpoint(folder)
    assert ours.config.tie_embeddings


def test_settings_may_name_the_file_of_weights_but_none_elsewhere(folder, tmp_path):
    whole = tensors_of(folder)
    save_file({n: a + 1 for n, a in whole.items()}, folder / "other.safetensors", {"format": "pt"})
    settings(folder, transformers_weights="other.safetensors")
    assert as_transformers(folder) == []
    settings(folder, transformers_weights="../m/other.safetensors")
    with pytest.raises(CheckpointError, match="plain file name"):
        open_checkpoint(folder)


# Old AutoGPTQ folders

GPTQ = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}


def auto_gptq(folder, file, **changes):
    """What AutoGPTQ wrote before it put its settings into config.json; the codes of one linear."""
    rng = np.random.default_rng(3)
    n, k = 48, 32
    codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
    zeros, scales = np.full((n, 1), 8, np.uint8), rng.random((n, 1)).astype(np.float16)
    tensors = tensors_of(folder)
    name = "model.layers.0.mlp.up_proj"
    del tensors[f"{name}.weight"]
    packed = packers.gptq(codes, zeros, scales, np.arange(k) // 32, 1)
    tensors |= {f"{name}.{part}": a for part, a in packed.items()}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / file)
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ | changes))
    return name, codes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_folder_saved_without_a_head_is_read_as_transformers_does(folder, tied, sharded):
    settings(folder, tie_word_embeddings=tied)
    base = {name.removeprefix("model."): a for name, a in tensors_of(folder).items() if "lm_head" not in name}
    if sharded:
        names = sorted(base)
        shards(folder, {f"{i}.safetensors": {n: base[n] for n in names[i::2]} for i in (0, 1)})
    else:
        save_file(base, folder / "model.safetensors", {"format": "pt"})
    assert as_transformers(folder) == ([] if tied else ["lm_head.weight"])


@pytest.mark.parametrize(
    ("file", "named", "leftover"),
    [
        ("gptq_model-4bit-32g.safetensors", None, False),
        ("gptq_model-4bit-32g.safetensors", "gptq_model-4bit-32g", True),
        ("model.safetensors", "model", False),
    ],
)
def test_an_old_autogptq_folder_loads(folder, file, named, leftover):
    stale = tensors_of(folder)
    name, codes = auto_gptq(folder, file, model_file_base_name=named, model_name_or_path=None)
    if leftover:
        save_file(stale, folder / "before.safetensors")
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.linear(name).codes, codes)
    assert (checkpoint.linear(name).zeros == 8).all()


def test_codes_without_their_scales_are_refused_by_name(folder):
    name, _ = auto_gptq(folder, "model.safetensors")
    tensors = tensors_of(folder)
    del tensors[f"{name}.scales"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor .*up_proj\.scales"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [{"bits": 7}, {"is_marlin_format": True}, {"quant_method": "marlin"}, {"checkpoint_format": "marlin"}],
)
def test_an_autogptq_folder_of_another_kind_is_refused_by_name(folder, changes):
    auto_gptq(folder, "model.safetensors", **changes)
    with pytest.raises(UnsupportedModelError, match=r"7 bits|marlin"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..\\x"])
def test_an_autogptq_folder_names_no_file_elsewhere(folder, name):
    auto_gptq(folder, "model.safetensors", model_file_base_name=name)
    with pytest.raises(CheckpointError, match="plain file name"):
        open_checkpoint(folder)


# Rope scalings

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "scaling",
    [
        YARN | {"finetuned": True},
        YARN | {"finetuned": False, "attention_factor": 0.9},
        YARN | {"factor": None},
        {"type": "linear", "factor": 2.0, "finetuned": True},
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
)
def test_rope_scalings_are_read_as_transformers_reads_them(folder, scaling):
    given = json.loads((folder / "config.json").read_text())
    given.pop("rope_parameters", None)
    given |= {"rope_scaling": scaling, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(given))
    rope = read_config(given).rope
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).model.rotary_emb
    np.testing.assert_allclose(rope.frequencies(), theirs.inv_freq.numpy(), rtol=1e-6)
    assert rope.magnitude == pytest.approx(theirs.attention_scaling)


# Odd files


@contextmanager
def within(seconds):
    """Interrupt what hangs."""

    def late(*_):
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "nothing", "loop"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json", "model.safetensors", "generation_config.json", "quant_config.json", "README.md",
        "quantize_config.json", INDEX, "extra.safetensors", "tokenizer.json", "tokenizer_config.json",
    ],
)  # fmt: skip
def test_whatever_lies_in_a_folder_nobody_waits_for_it(folder, name, kind):
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/null", "nothing": "not/there", "loop": path.name}[kind])
    needed = name in ("config.json", "model.safetensors", "tokenizer.json")
    with within(20), pytest.raises(TinychatError) if needed else suppress(TinychatError):
        checkpoint = open_checkpoint(folder)
        checkpoint.linear("model.embed_tokens")
        checkpoint.tokenizer()
        store.show(str(folder))


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_model_that_is_no_file_is_refused_by_what_it_is(tmp_path, kind):
    path = tmp_path / "model.gguf"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/null")
    with within(20):
        for model in (path, tmp_path):
            with pytest.raises(CheckpointError, match=r"no regular file|named pipe|device"):
                open_checkpoint(store.resolve(str(model)))
