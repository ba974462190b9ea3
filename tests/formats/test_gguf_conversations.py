"""The same conversation has the same ids from a GGUF as from the folder that it was converted from.

For each family a small vocabulary of its shape: a tokenizer.json with the normalizer, the splits and the
flags of added tokens that the family's own has, and the fields that llama.cpp's converter makes of it.
"""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from tinychat.formats.gguf_tokenizer import from_gguf
from tinychat.text.template import ChatTemplate
from tinychat.text.tokenizer import Tokenizer

CONTROL, USER_DEFINED = 3, 4
BYTES = [f"<0x{b:02X}>" for b in range(256)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{{ '<s>[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
    "' ' + m.content + ' </s>' }}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else '<|endoftext|>' }}"
)
PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
PHI_4_MINI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else '<|endoftext|>' }}"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA_3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
)

LETTERS = [*"abcdehlmorstuwx.,!?:;'\"<>|/_[]()#*-+=\n\t0123456789", "é", "中"]
WORDS = [
    "he",
    "ll",
    "hell",
    "hello",
    "or",
    "wor",
    "th",
    "the",
    "er",
    "as",
    "us",
    "user",
    "12",
    "123",
    "..",
    "\n\n",
]


def merges_of(words, vocab):
    """Byte-pair merges in the order of the words, each split where both parts are tokens."""
    return [
        (w[:k], w[k:])
        for w in words
        for k in range(1, len(w))
        if w[:k] in vocab and w[k:] in vocab and len(w) > 1
    ]


def sentencepiece(special, user_defined=(), *, first=False, prefix=True, runs=(), **flags):
    """(tokenizer.json's content, GGUF fields) of a SentencePiece vocabulary.

    runs: added tokens of spaces, which the folder spells with ▁ and the converter with spaces.
    """
    words = [*["▁" + w for w in ("a", "h", "t", "the", "hello")], *WORDS[:-1], *runs]
    pieces = list(dict.fromkeys(["▁", *LETTERS, *words]))
    tokens = [*special[:3], *BYTES, *pieces, *special[3:], *user_defined]
    vocab = {t: i for i, t in enumerate(tokens)}
    scores = {w: -float(i) for i, w in enumerate([*runs, *[p for p in pieces if p not in runs]])}
    joined = sorted((w for w in pieces if len(w) > 1), key=lambda w: -scores[w])
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges_of(joined, vocab), unk_token=special[0], fuse_unk=True, byte_fallback=True)
    )
    if first:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    else:
        steps = [normalizers.Prepend("▁")] if prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    no_flags = {"<unk>", "<s>", "<|endoftext|>"}
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, **({} if t in no_flags else flags)) for t in special]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t in (*user_defined, *runs)])
    types = [1] * len(tokens)
    types[3 : 3 + 256] = [6] * 256
    for t in special:
        types[vocab[t]] = CONTROL
    for t in (*user_defined, *runs):
        types[vocab[t]] = USER_DEFINED
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [t.replace("▁", " ") if t in runs else t for t in tokens],
        "tokenizer.ggml.scores": [scores.get(t, 0.0) for t in tokens],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return backend.to_str(), fields


CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
CASED += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(special, user_defined=(), *, pre, nfc=False, split=None, digits=False, flags=None, **settings):
    """(tokenizer.json's content, GGUF fields) of a byte-level vocabulary. flags: of each added token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [w.replace("\n", "Ċ") for w in WORDS]
    words += ["Ġ" + w for w in ("a", "h", "t", "the", "he", "hell", "hello")]
    vocab = {t: i for i, t in enumerate([*alphabet, *words, *special, *user_defined])}
    merges = merges_of(words, {*alphabet, *words})
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, **settings))
    steps = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    flags = flags or (lambda token: {})
    backend.add_special_tokens([AddedToken(t, normalized=False, **flags(t)) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False, **flags(t)) for t in user_defined])
    tokens = list(vocab)
    types = [1] * len(tokens)
    for t in (*special, *user_defined):
        types[vocab[t]] = CONTROL if t in special else USER_DEFINED
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }
    return backend.to_str(), fields


THINK = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
RUNS = ["▁" * n for n in range(2, 9)]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PHI4 = ["<|dummy_0|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"]
PHI4_MINI = [
    "<|endoftext|>",
    "<|endofprompt|>",
    "<|assistant|>",
    "<|end|>",
    "<|user|>",
    "<|system|>",
    "<|tag|>",
]
HEADS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ONE_DIGIT, THREE_DIGITS = CASED.replace("DIGITS", ""), CASED.replace("DIGITS", "{1,3}")


def no_end(token):
    return {} if token in ("<|endoftext|>", "<|endofprompt|>") else {"rstrip": True}


FAMILIES = {
    "Llama 2": (LLAMA_2, {}, lambda: sentencepiece(["<unk>", "<s>", "</s>"])),
    "Mistral 0.3": (
        LLAMA_2,
        {},
        lambda: sentencepiece(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], first=True),
    ),
    "Phi-3": (
        PHI_3,
        {"general.architecture": "phi3", "general.name": "models--microsoft--mini"},
        lambda: sentencepiece(
            ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],
            rstrip=True,
        ),
    ),
    "Gemma": (
        GEMMA,
        {"general.architecture": "gemma2"},
        lambda: sentencepiece(
            ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
            ["\n\n\n", "<h1>"],
            prefix=False,
            runs=RUNS,
        ),
    ),
    "Llama 3": (
        LLAMA_3,
        {},
        lambda: byte_level(HEADS, pre="llama-bpe", split=THREE_DIGITS, ignore_merges=True),
    ),
    "Qwen": (
        CHATML,
        {"general.architecture": "qwen3"},
        lambda: byte_level(QWEN, THINK, pre="qwen2", nfc=True, split=ONE_DIGIT),
    ),
    "DeepSeek-R1-Qwen": (
        CHATML,
        {"general.architecture": "qwen2"},
        lambda: byte_level(QWEN, THINK, pre="deepseek-r1-qwen", split=ONE_DIGIT),
    ),
    "SmolLM2, Granite": (CHATML, {}, lambda: byte_level(QWEN, pre="smollm", digits=True)),
    "OLMo 2": (CHATML, {}, lambda: byte_level(QWEN, pre="dbrx", split=THREE_DIGITS)),
    "Phi-4": (
        PHI_4,
        {"general.architecture": "phi3", "general.name": "Phi 4"},
        lambda: byte_level(
            PHI4, pre="dbrx", split=THREE_DIGITS, flags=lambda t: {"lstrip": True, "rstrip": True}
        ),
    ),
    "Phi-4-mini": (
        PHI_4_MINI,
        {"general.architecture": "phi3", "general.name": "Phi 4 Mini Instruct"},
        lambda: byte_level(PHI4_MINI, ["<|tool|>"], pre="dbrx", split=THREE_DIGITS, flags=no_end),
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def both(request):
    """The chat template over the folder's tokenizer, over the GGUF's, and the library's own tokenizer."""
    template, more, make = FAMILIES[request.param]
    content, fields = make()
    folder = Tokenizer(tokenizers.Tokenizer.from_str(content))
    gguf = from_gguf({**fields, **more})
    library = tokenizers.Tokenizer.from_str(content)
    return ChatTemplate(template, folder), ChatTemplate(template, gguf), library


PARTS = [
    "hello",
    " the",
    "world",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\t",
    "é",
    "e\u0301",
    "中",
    "🙂",
    "12345",
    " 12",
]
PARTS += [
    "...",
    "<",
    ">",
    "<|im_end|>",
    "<think>",
    "</s>",
    "[INST]",
    "'s",
    "<h1>",
    "_",
    "def f(x):\n        y",
]
SAID = st.lists(st.sampled_from(PARTS), max_size=8).map("".join)


@given(said=SAID, answer=SAID, again=SAID)
@settings(max_examples=40, deadline=None)
def test_a_conversation_has_the_same_ids_in_both_forms(both, said, answer, again):
    folder, gguf, _ = both
    for messages in (
        [{"role": "user", "content": said}],
        [
            {"role": "user", "content": said},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": again},
        ],
    ):
        text = folder.render(messages)
        assert gguf.render(messages) == text
        ids = folder.encode(text)
        assert gguf.encode(text) == ids
        assert gguf.tokenizer.decode(ids, skip_special=False) == folder.tokenizer.decode(
            ids, skip_special=False
        )


HONEST = [
    "hello the world",
    "def f(x):\n    the\n        hello\n\n\n\n12345  x",
    " e\u0301 é 中 🙂...",
    "\nhello\n",
]


def test_an_honest_conversation_has_the_librarys_ids(both):
    folder, _, library = both
    messages = [{"role": r, "content": text} for text in HONEST for r in ("user", "assistant")]
    text = folder.render(messages)
    assert folder.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_flags_of_a_phi_3_are_not_given_to_others():
    content, fields = FAMILIES["Phi-3"][2]()
    other = from_gguf({**fields, "general.architecture": "llama"})
    assert not any(t.rstrip for t in other.backend.get_added_tokens_decoder().values())
    by_name = from_gguf({**fields, "general.name": "My Phi-3 tune"})
    flags = {t.content: t.rstrip for t in by_name.backend.get_added_tokens_decoder().values()}
    theirs = {t["content"]: t["rstrip"] for t in json.loads(content)["added_tokens"]}
    assert flags == theirs
