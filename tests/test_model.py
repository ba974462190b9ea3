"""`tinychat.load` and the Model it gives: parameters, prompts, and how stored weights are run."""

from __future__ import annotations

import dataclasses
import gc
import os

import numpy as np
import psutil
import pytest
from tiny import TinyCheckpoint, byte_tokenizer, tiny_folder, tiny_model

import tinychat
from tinychat.base.errors import CheckpointError, MemoryBudgetError, ModelNotFoundError, UsageError
from tinychat.base.load_options import LoadOptions
from tinychat.network.weight_policy import WeightPolicy
from tinychat.network.weights import DenseLinear, QuantizedLinear, quantize_int8, quantize_rtn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def test_a_loaded_folder_computes_what_its_weights_say(folder):
    ids = list(range(100, 140))
    with (
        tiny_model() as memory,
        tinychat.load(folder, device="reference", quantize="none", head_bits=16) as disk,
    ):
        np.testing.assert_allclose(disk.logits(ids), memory.logits(ids), rtol=1e-5, atol=1e-5)
        assert disk.n_ctx == 256
        facts = disk.describe()
        assert (facts["backend"], facts["act_bits"], facts["ctx"]) == ("reference", 32, 256)


def test_the_api_of_the_readme(folder):
    with tinychat.load(str(folder), ctx=128) as model:
        ids = model.tokenizer.encode("hi there")
        assert model.tokenizer.decode(ids) == "hi there"
        assert model.logits(ids).shape == (len(ids), 258)
        printed = "".join(e.text for e in model.generate("Once upon", temperature=0, max_tokens=8))
        reply = model.chat([{"role": "user", "content": "hi"}], temperature=0, max_tokens=8)
        assert reply.finish_reason in ("stop", "length")
        assert reply.stats.generated_tokens == len(reply.token_ids)
        chat = model.session(system="Be kind.", temperature=0, max_tokens=8)
        said = "".join(e.text for e in chat.send("hi"))
        assert chat.messages[-1]["content"] == said
        assert isinstance(printed, str)
        assert model.n_ctx == 128


def test_a_text_is_a_chat_of_one_message_whole_and_in_pieces():
    with tiny_model(ctx=256) as model:
        asked = dict(temperature=0, max_tokens=8)
        whole = model.chat([{"role": "user", "content": "hi"}], **asked)
        assert model.chat("hi", **asked).token_ids == whole.token_ids
        for said in ("hi", [{"role": "user", "content": "hi"}]):
            *pieces, done = model.chat(said, stream=True, **asked)
            assert [p.token_id for p in pieces if p.token_id is not None] == whole.token_ids
            assert done.completion.text == "".join(p.text for p in pieces) == whole.text
        for bad in ("", b"hi", 7):
            with pytest.raises(UsageError):
                model.chat(bad)


@pytest.mark.parametrize(
    "bad",
    [
        dict(device="tpu"),
        dict(threads=0),
        dict(threads=5000),
        dict(act_bits=4),
        dict(head_bits=4),
        dict(ctx=0),
        dict(ctx=257),
        dict(ctx=-5),
        dict(quantize="int3"),
        dict(draft_tokens=-1),
    ],
    ids=str,
)
def test_impossible_parameters_are_refused(folder, bad):
    with pytest.raises(UsageError):
        tinychat.load(folder, **bad)


def test_nothing_there(tmp_path):
    for name in (tmp_path / "missing", tmp_path, "surely/not-a-model-on-this-machine"):
        with pytest.raises(ModelNotFoundError):
            tinychat.load(name, offline=True)


def test_a_model_larger_than_memory_is_refused_before_it_is_read(folder, monkeypatch):
    monkeypatch.setattr("tinychat.loading.available_memory", lambda: 1_000_000)
    for device in ("auto", "reference"):
        with pytest.raises(MemoryBudgetError, match=r"1\.0 MB are free"):
            tinychat.load(folder, device=device)


def test_the_context_shrinks_to_the_memory_unless_it_is_asked_for(monkeypatch):
    with tiny_model() as m:
        per_block = m.backend.kv_bytes_per_block()
    monkeypatch.setattr(
        "tinychat.base.machine.available_memory", lambda: 300_000_000 + (5 + 2) * per_block
    )  # two to spare
    checkpoint = TinyCheckpoint()
    from tinychat.backends.reference import ReferenceBackend
    from tinychat.model import Model

    with Model(checkpoint, ReferenceBackend(checkpoint, WeightPolicy("none", 16)), "tiny") as m:
        assert m.n_ctx == 80
    with pytest.raises(MemoryBudgetError, match="--ctx 80"):
        tiny_model(ctx=96)
    monkeypatch.setattr("tinychat.base.machine.available_memory", lambda: 1000)
    with pytest.raises(MemoryBudgetError, match="smaller model"):
        tiny_model(ctx=None)


def test_a_beginning_of_text_token_goes_first_once():
    tokenizer = byte_tokenizer()
    tokenizer.bos_id, tokenizer.add_bos = 256, True
    tokenizer.special_tokens = {"bos_token": "<|im_start|>"}
    checkpoint = TinyCheckpoint()
    checkpoint.tokenizer = lambda: tokenizer
    from tinychat.backends.reference import ReferenceBackend
    from tinychat.model import Model

    with Model(
        checkpoint, ReferenceBackend(checkpoint, WeightPolicy("none", 16)), "tiny", LoadOptions(ctx=256)
    ) as m:
        assert m.encode_prompt("a") == [256, *tokenizer.encode("a")]
        # The template writes it itself: not a second time.
        one = m.chat([{"role": "user", "content": "hi"}], temperature=0, max_tokens=1)
        text = m.template.render([{"role": "user", "content": "hi"}])
        assert one.stats.prompt_tokens == len(m.template.encode(text))


def test_stored_bits_run_as_they_are():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 64)).astype(np.float32)
    stored = {"int8": quantize_int8(w), "rtn": quantize_rtn(w, 32)}
    checkpoint = TinyCheckpoint()
    checkpoint.linear = lambda name: stored[name]
    for quantize in ("auto", "rtn", "none"):
        policy = WeightPolicy(quantize)
        assert policy.linear(checkpoint, "int8") is stored["int8"]
        assert policy.linear(checkpoint, "rtn") is stored["rtn"]
        assert policy.embedding(checkpoint, "int8") is stored["int8"]


def test_wider_weights_run_in_the_bits_asked_for():
    checkpoint = TinyCheckpoint()
    q, embed = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
    w = checkpoint.weights[q]
    forms = {
        "auto": "8-bit, groups of 32, fp16 scale",
        "rtn": "4-bit, one group a row, fp16 scale and zero point",
        "none": "fp32",
    }
    for quantize, form in forms.items():
        linear = WeightPolicy(quantize).linear(checkpoint, q)
        assert str(linear.form) == form
        step = {"auto": np.abs(w).max() / 127, "rtn": np.ptp(w) / 15, "none": 1e-9}[quantize]
        assert np.abs(linear.dequantize() - w).max() <= step * 1.01
    assert str(WeightPolicy().embedding(checkpoint, embed).form) == forms["auto"]
    assert str(WeightPolicy(head_bits=16).embedding(checkpoint, embed).form) == "fp32"
    assert WeightPolicy().head(checkpoint, "lm_head") is None  # tied


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["weight", "scales", "offsets", "bias", "int8"])
def test_nan_and_infinity_are_refused_by_name(bad, where):
    w = np.ones((4, 64), dtype=np.float32)
    spoiled = w[:, :2].astype(np.float16).copy()
    spoiled[1, 1] = bad
    linear = {
        "weight": lambda: DenseLinear(np.where(np.eye(4, 64) > 0, np.float32(bad), w)),
        "scales": lambda: QuantizedLinear(w.astype(np.uint8), spoiled, zeros=np.zeros((4, 2), np.uint8)),
        "offsets": lambda: QuantizedLinear(w.astype(np.uint8), w[:, :2], offsets=spoiled),
        "bias": lambda: DenseLinear(w, bias=np.array([0, 1, bad, 2], dtype=np.float32)),
        "int8": lambda: dataclasses.replace(quantize_int8(w), scales=spoiled),
    }[where]()
    checkpoint = TinyCheckpoint()
    checkpoint.linear = lambda name: linear
    with pytest.raises(CheckpointError, match=r"model\.layers\.7"):
        WeightPolicy().linear(checkpoint, "model.layers.7.mlp.up_proj")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("cycles", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_starting_cancelling_and_closing_leaks_nothing(cycles):
    """Threads, files and memory after many short lives of a model, each left in the middle of an answer."""

    def live(seed):
        with tiny_model(ctx=256, backend="cpu") as m:
            m.tokenizer.eos_ids = frozenset()
            session = m.session(temperature=0)
            for n, _ in enumerate(session.send("hello there")):
                if n == seed % 4:
                    session.cancel()
                    break

    def held():
        gc.collect()
        process = psutil.Process()
        return process.num_threads(), process.num_fds(), process.memory_info().rss

    for i in range(20):
        live(i)
    threads, files, memory = held()
    for i in range(cycles):
        live(i)
    after = held()
    assert after[:2] == (threads, files)
    assert after[2] - memory < 20_000_000
