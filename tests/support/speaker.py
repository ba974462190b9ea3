"""A tiny model that wants to say what a test tells it, and says it as far as it is allowed to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
from tiny import TinyCheckpoint
from tokenizers import decoders, models, pre_tokenizers

from tinychat.backends.cpu import CpuBackend
from tinychat.base.load_options import LoadOptions
from tinychat.engine.generation import Generation
from tinychat.loading import Drafts
from tinychat.model import Model
from tinychat.network.weight_policy import WeightPolicy
from tinychat.text.tokenizer import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"
# Qwen3's way: the model itself begins its thought, unless the template says that there is none.
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content and loop.last %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# DeepSeek's way: the prompt begins the thought, and thoughts are left out of what was said before.
OPENED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# gpt-oss' way: channels.
HARMONY = (
    "Reasoning: {{ reasoning_effort }}{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{% if m.thinking %}{{ '<|channel|>analysis<|message|>' + m.thinking }}{{ '<|end|><|start|>assistant' }}"
    "{% endif %}"
    "{{ '<|channel|>final<|message|>' + m.content + '<|return|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
WORDS = ["<think>", "</think>", START, END]
CHANNELS = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"]


class Checkpoint(TinyCheckpoint):
    """Every byte a token, then the words of a template; the last one ends an answer."""

    def __init__(self, template: str):
        self.words = CHANNELS if "<|channel|>" in template else WORDS if "think" in template else [START, END]
        n = 256 + len(self.words)
        super().__init__(0, template, vocab_size=n, eos_ids=(n - 1,), context_length=512)

    def tokenizer(self):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        t = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        t.decoder = decoders.ByteLevel()
        t.add_special_tokens([w for w in self.words if "think" not in w])
        t.add_tokens([w for w in self.words if "think" in w])
        self.made = Tokenizer(t, eos_ids={t.token_to_id(self.words[-1])}, chat_template=self.template)
        return self.made


def speaker(monkeypatch, template: str, wish: Callable[[str], str]) -> Model:
    """A model whose logits prefer the first token of what `wish` says, given what was written so far. Close
    behind are the tokens of the same row of a random network, so what is ruled out is replaced by chance.
    """
    checkpoint = Checkpoint(template)
    backend = CpuBackend(checkpoint, WeightPolicy("none", 16), threads=1)
    model = Model(checkpoint, backend, "tiny", LoadOptions(ctx=512), Drafts(LoadOptions()))
    choose = Generation._choose

    def chosen(generation, row, drafted, q=None, before: Sequence[int] = (), guide=None):
        ids = [*generation.context[len(generation.prompt) :], *before]
        said = model.tokenizer.decode(ids, skip_special=False)
        position = len(generation.context) + len(before)
        row = np.random.default_rng(position).normal(0, 1, model.config.vocab_size).astype(np.float32)
        row[model.tokenizer.encode(wish(said) or checkpoint.words[-1], special=True)[0]] = 40
        if generation.params.greedy and not generation._masks:
            row = int(row.argmax())
        return choose(generation, row, drafted, q, before, guide)

    monkeypatch.setattr(Generation, "_choose", chosen)
    return model


def saying(script: str) -> Callable[[str], str]:
    """The wish to say this, from wherever what was written agrees with it."""
    return lambda said: script[len(said) :] if script.startswith(said) else ""


ENDLESS = "hm, hm, " * 100


def thinker(opening="<think>\n", closing="</think>\n\n"):
    """Thinks without end; once the thought is closed, it says "Well, yes."."""

    def wish(said):
        thought = opening + ENDLESS
        if closing.strip() not in said:
            return thought[len(said) :] if thought.startswith(said) else "h"
        answer = "Well, yes."
        told = said.partition(closing)[2]
        return answer[len(told) :] if answer.startswith(told) else ""

    return wish
