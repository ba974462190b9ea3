"""The space before a text: a conversation in pieces has the ids of the conversation in one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from tinychat.conversation import Tree
from tinychat.formats.gguf_tokenizer import from_gguf
from tinychat.session import Message, Session
from tinychat.text.stopping import cut_ids
from tinychat.text.template import ChatTemplate
from tinychat.text.tokenizer import SOME_TEXT, Tokenizer

MARKERS = ["<s>", "</s>", "<|user|>", "<|end|>"]
LETTERS = [*"abcUB.:#[]/INST", "\n", "é"]
SPACED = ["▁a", "▁b", "▁U", "▁B", "▁#", "▁[", "▁."]
JOINED = ["ab", "▁ab", "##", "###", "▁###"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def sentencepiece(prefix):
    words = ["▁", *LETTERS, *SPACED, *JOINED]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(["<unk>", *BYTES, *words]))}
    merges = [
        (w[:k], w[k:]) for w in [*SPACED, *JOINED] for k in range(1, len(w)) if {w[:k], w[k:]} <= vocab.keys()
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    if prefix == "prepended":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif prefix is None:
        backend.normalizer = replace
    elif prefix == "nested":
        inner = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), inner])
    else:
        scheme, split = prefix
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=split)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def byte_level(add_prefix_space):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġa", "Ġb", "ab", "##", "###", "Ġ#", "Ġ##"]
    merges = [("Ġ", "a"), ("Ġ", "b"), ("a", "b"), ("#", "#"), ("##", "#"), ("Ġ", "#"), ("Ġ#", "#")]
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate([*alphabet, *words])}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def gguf(**more):
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", *LETTERS, *SPACED, *JOINED, "<|user|>", "<|end|>"]
    n = len(tokens)
    return from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [-float(i) for i in range(n)],
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (n - 261), 3, 3],
            "tokenizer.ggml.add_bos_token": False,
            **more,
        }
    )


def wrapped(backend):
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in MARKERS])
    return Tokenizer(backend)


SHAPES = {
    "no prefix": lambda: wrapped(sentencepiece(None)),
    "prepended": lambda: wrapped(sentencepiece("prepended")),
    "prepended, nested": lambda: wrapped(sentencepiece("nested")),
    "always": lambda: wrapped(sentencepiece(("always", False))),
    "always, split": lambda: wrapped(sentencepiece(("always", True))),
    "first": lambda: wrapped(sentencepiece(("first", False))),
    "never": lambda: wrapped(sentencepiece(("never", False))),
    "byte-level": lambda: wrapped(byte_level(False)),
    "byte-level, prefixed": lambda: wrapped(byte_level(True)),
    "gguf": gguf,
    "gguf, no prefix": lambda: gguf(**{"tokenizer.ggml.add_space_prefix": False}),
    "gguf of Phi-3": lambda: gguf(**{"general.architecture": "phi3"}),
}
EACH = "{% for m in messages %}{% set mine = m.role == 'user' %}"
TEMPLATES = {
    "text": EACH + "{{ '### ' + ('U' if mine else 'B') + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### B:\n' }}{% endif %}",
    "markers": EACH + "{{ '<|user|>' if mine else '' }}{{ m.content + '<|end|>' }}{% endfor %}",
    "markers, spaces": EACH + "{{ '<|user|>\n' if mine else '\n' }}{{ m.content + ' <|end|> ' }}{% endfor %}",
    "mixed": "<s>" + EACH + "{{ ('[INST] ' + m.content + ' [/INST]') if mine else "
    "('\n' + m.content + '\n</s>') }}{% endfor %}",
}


@pytest.fixture(scope="module", params=SHAPES)
def tokenizer(request):
    return SHAPES[request.param]()


# Answers begin and end where no vocabulary above joins them with what the templates write beside them.
WORD = st.text(st.sampled_from("ab ."), max_size=6)
ANSWER = st.builds("c{}c".format, WORD)
SAID = st.lists(st.tuples(st.text(st.sampled_from("ab .\n#é<"), min_size=1, max_size=8), ANSWER), max_size=3)


@pytest.mark.parametrize("template", TEMPLATES)
@given(said=SAID)
@settings(max_examples=12, deadline=None)
def test_a_session_has_the_ids_of_the_whole_conversation(tokenizer, template, said):
    t = ChatTemplate(TEMPLATES[template], tokenizer)
    session = Session.__new__(Session)
    session._system, session._tools, session.tree = None, [], Tree()
    session.model = SimpleNamespace(template=t, tokenizer=tokenizer, bos=lambda text: [])
    at = None
    for question, text in [*said, ("a", "cc")]:
        session.nodes.append(Message("user", question, at))
        at = len(session.nodes) - 1
        pieces = session._prompt(list(range(at + 1)), True)
        whole = t.render([{"role": m.role, "content": m.content} for m in session.nodes])
        assert [i for _, ids in pieces for i in ids] == t.encode(whole)
        prompt_text, prompt_ids = pieces[-1]
        # What a model says has the ids that the whole conversation gives it.
        ids = tokenizer.encode(text, after=prompt_ids[-1])
        session.nodes.append(Message("assistant", text, at, prompt_text, prompt_ids, ids))
        at += 1


@given(
    head=st.text(st.sampled_from("ab .\né"), max_size=8), tail=st.text(st.sampled_from("ab .\né"), max_size=8)
)
@settings(max_examples=30, deadline=None)
def test_text_that_goes_on_says_what_it_says(tokenizer, head, tail):
    ids = tokenizer.encode("c" + head)
    on = tokenizer.encode(tail, after=SOME_TEXT)
    assert tokenizer.decode(ids + on).lstrip(" ") == ("c" + head + tail)
    assert tokenizer.decode(on, continued=True) == tail


@given(text=st.text(st.sampled_from("ab .\né"), max_size=12), at=st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_an_answer_that_is_cut_keeps_its_text(tokenizer, text, at):
    ids = tokenizer.encode(text, after=SOME_TEXT)
    cut = cut_ids(tokenizer, ids, text[:at])
    assert tokenizer.decode(cut, continued=True) == text[:at]


def test_settings_of_the_backend_are_as_they_were(tokenizer):
    before = tokenizer.backend.encode("a b", add_special_tokens=False).ids
    tokenizer.encode("<|user|> a", special=True, after=SOME_TEXT)
    assert tokenizer.backend.encode("a b", add_special_tokens=False).ids == before
