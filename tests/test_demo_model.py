"""The demo model, a real one, against transformers with the same dequantized weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import takewhile

import numpy as np
import pytest
import torch
import transformers

import tinychat
from tinychat.perplexity import perplexity

QUESTION = "Name the capital of France."

TEXT = """\
The lighthouse at the end of the harbour had been dark for eleven years when Marta bought it. Nobody in
the town could say why the council had finally agreed to sell, but the price was low and the roof, she
was told, did not leak in summer. She arrived in October with two suitcases, a box of tools and a dog
that was afraid of stairs.

The first winter taught her what the wind can do. It came from the north-west and pressed on the door
until the hinges sang; it pushed the rain up under the tiles, and from there the water found its way down
four floors to the kitchen. She learned to sleep in the room with the stove, to keep the batteries
charged, and to write down what the barometer said at 6:00 and at 18:00. By March she had 302 numbers in
a notebook and could tell, from the last three of them, whether the fishing boats would go out.

In April a man from the university came to ask about the lamp. The lens had been ground in Paris in 1887,
he said, and there were only five of its kind left: one in Brittany, two in Chile, one in a museum and
this one. He wanted to photograph it. Marta made coffee, carried the dog up the stairs, and showed him
how the great glass rings threw small rainbows on the wall whenever the sun stood low enough. "Does it
still turn?" he asked. She put her hand on the brass and pushed. It moved as though it weighed nothing,
because it floated, as it always had, on a ring of mercury.

They lit it again on midsummer's night, without permission, for exactly one minute. Far out, a tanker
answered with its horn. The council sent a letter, then an invoice, and at last, in September, a
delegation with a cake.
def visible(height_m): return 3.57 * height_m ** 0.5  # kilometres to the horizon
"""

PROMPTS = [
    "Once upon a time",
    "The capital of Germany is",
    "def fibonacci(n):\n",
    "Water boils at",
    "1, 2, 3, 4, 5,",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is 7 times 8?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
    "<|im_start|>assistant\n",
    "<|im_start|>user\nExplain gravity to a child in two sentences.<|im_end|>\n<|im_start|>assistant\n",
    "¿Dónde está la biblioteca? 图书馆",
]


@pytest.fixture(scope="module")
def model(demo_gguf):
    with tinychat.load(demo_gguf, device="reference", ctx=1024) as m:
        yield m


@pytest.fixture(scope="module")
def hf(demo_gguf):
    """transformers' Llama with the file's weights, dequantized by the gguf package alone."""
    import gguf

    reader = gguf.GGUFReader(demo_gguf)

    def meta(key):
        return reader.fields[f"llama.{key}"].contents()

    heads, kv_heads = meta("attention.head_count"), meta("attention.head_count_kv")
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors
    }
    config = transformers.LlamaConfig(
        vocab_size=len(tensors["token_embd.weight"]),
        hidden_size=meta("embedding_length"),
        intermediate_size=meta("feed_forward_length"),
        num_hidden_layers=meta("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=meta("context_length"),
        rms_norm_eps=meta("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": meta("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
    )

    def straight(w, n):
        # llama.cpp stores the rows of q and k interleaved for its rotary embedding.
        return w.reshape(n, w.shape[0] // n // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    state = {"model.embed_tokens.weight": tensors["token_embd.weight"]}
    state["model.norm.weight"] = tensors["output_norm.weight"]
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for i in range(config.num_hidden_layers):
        for theirs, name in names.items():
            state[f"model.layers.{i}.{name}.weight"] = tensors[f"blk.{i}.{theirs}.weight"]
        for which, n in (("q", heads), ("k", kv_heads)):
            state[f"model.layers.{i}.self_attn.{which}_proj.weight"] = straight(
                tensors[f"blk.{i}.attn_{which}.weight"], n
            )
    llama = transformers.LlamaForCausalLM(config).float().eval()
    missing, unexpected = llama.load_state_dict(
        {k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=False
    )
    assert not unexpected
    assert missing == ([] if not config.tie_word_embeddings else ["lm_head.weight"])
    llama.tie_weights()
    return llama


@torch.inference_mode()
def their_logits(hf, ids):
    return hf(torch.tensor([list(ids)])).logits[0].numpy()


def test_logits_equal_transformers_over_200_tokens(model, hf):
    ids = model.tokenizer.encode(TEXT)[:200]
    assert len(ids) == 200
    ours, theirs = model.logits(ids), their_logits(hf, ids)
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) <= 1e-4
    row_errors = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert row_errors.max() <= 1e-4


@pytest.fixture(scope="module")
def continuations(model, hf):
    """(prompt, greedy continuation of 64 tokens or up to the end of the turn) by transformers' generate."""
    prompts = [model.tokenizer.encode(p, special=True) for p in PROMPTS]
    longest = max(map(len, prompts))
    ends = model.tokenizer.eos_ids
    rows = hf.generate(
        torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )[:, longest:].tolist()
    return [(p, list(takewhile(lambda i: i not in ends, row))) for p, row in zip(prompts, rows, strict=True)]


@pytest.mark.parametrize("n", range(len(PROMPTS)))
def test_greedy_choices_equal_transformers_generate(model, continuations, n):
    # Greedy decoding by induction: every next token of transformers' is the argmax of our logits.
    prompt, theirs = continuations[n]
    choices = model.logits(prompt + theirs).argmax(axis=1)[len(prompt) - 1 :].tolist()
    assert choices[:-1] == theirs
    assert len(theirs) == 64 or choices[-1] in model.tokenizer.eos_ids


@pytest.mark.parametrize("n", [n if n == 6 else pytest.param(n, marks=pytest.mark.slow) for n in range(10)])
def test_greedy_generation_equals_transformers_generate(model, continuations, n):
    prompt, theirs = continuations[n]
    *_, done = model.generate(prompt, temperature=0, max_tokens=64)
    assert done.completion.token_ids == theirs
    assert done.finish_reason == ("length" if len(theirs) == 64 else "stop")


def test_perplexity_equals_transformers(model, hf):
    ids = model.tokenizer.encode(TEXT)
    window = 128
    value, n = perplexity(model.logits, ids, window)
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        log_p = torch.log_softmax(torch.tensor(their_logits(hf, part), dtype=torch.float64), -1)
        losses += [-log_p[i - 1, part[i]].item() for i in range(window // 2, window)]
    assert n == len(losses) >= 192
    assert value == pytest.approx(np.exp(np.mean(losses)), abs=1e-3)
    assert 2 < value < 60


def test_python_api_knows_paris(model):
    reply = model.chat([{"role": "user", "content": QUESTION}], temperature=0, max_tokens=32)
    assert "Paris" in reply.text
    assert reply.text == model.tokenizer.decode(reply.token_ids)
    chat = model.session(temperature=0, max_tokens=32)
    events = list(chat.send(QUESTION))
    assert "".join(e.text for e in events) == reply.text
    # The turn is an append: the second prompt finds all of the first and of its answer.
    *_, done = chat.send("And of Italy?")
    first = events[-1].stats
    assert done.stats.cached_tokens >= first.prompt_tokens + first.generated_tokens - 1


def run(args, demo_gguf, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "tinychat", "run", str(demo_gguf), "--temp", "0", "--max-tokens", "32", *args],
        capture_output=True,
        text=True,
        timeout=300,
        env={k: v for k, v in os.environ.items() if not k.startswith("TINYCHAT_DEBUG")},
        **kwargs,
    )


@pytest.mark.parametrize("how", ["argument", "pipe", "json"])
def test_command_line_knows_paris_and_stdout_has_the_answer_only(demo_gguf, tmp_path, how):
    if how == "pipe":
        out = run([], demo_gguf, cwd=tmp_path, input=QUESTION)
    else:
        extra = ["--json"] if how == "json" else ["--verbose"]
        out = run([QUESTION, *extra], demo_gguf, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert out.returncode == 0, out.stderr
    if how == "json":
        answer = json.loads(out.stdout)
        assert "Paris" in answer["text"]
        assert answer["finish_reason"] == "stop"
        return
    assert "Paris" in out.stdout
    assert out.stdout.endswith("\n")
    assert "tok/s" not in out.stdout
    assert "<|" not in out.stdout
    assert ("tok/s" in out.stderr) == (how == "argument")


def test_it_calls_a_tool_that_it_must_call_and_hears_the_result(demo_gguf):
    asked = []

    def capital(country: str) -> str:
        """Name of a country's capital.

        Args:
            country: Its name.
        """
        asked.append(country)
        return "Paris"

    with tinychat.load(str(demo_gguf), ctx=2048) as model:
        how = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0, "max_tokens": 60}
        run = tinychat.run_tools(model, QUESTION, [capital], most_turns=1, **how)
        call, result, answer = run.messages[1:4]
        (called,) = call["tool_calls"]
        assert called["function"] == {"name": "capital", "arguments": '{"country": "France"}'}
        assert asked == ["France"]
        assert (result["tool_call_id"], result["content"]) == (called["id"], "Paris")
        assert answer["role"] == "assistant"
        assert run.completion.stats.cached_tokens > 100  # of the first prompt and its call, all that stays
