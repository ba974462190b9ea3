"""Reasoning is told from the answer, in every family's markers, wherever an answer goes."""

from __future__ import annotations

import io
import json
import sys

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stored import add
from tiny import TEMPLATE, TinyCheckpoint
from tokenizers import decoders, models, pre_tokenizers

from tinychat.backends.reference import ReferenceBackend
from tinychat.base.events import Done, TextDelta, event_to_json
from tinychat.base.load_options import LoadOptions
from tinychat.chats import export
from tinychat.chats.chat_store import ChatStore
from tinychat.cli.output import Printer
from tinychat.engine.generation import Generation
from tinychat.model import Model
from tinychat.network.weight_policy import WeightPolicy
from tinychat.session import Session
from tinychat.text.reasoning import Splitter, split_thought
from tinychat.text.stopping import Outlet
from tinychat.text.template import ChatTemplate
from tinychat.text.tokenizer import Tokenizer

# What models write, what stood before, and what that is: reasoning and answer.
WRITTEN = [
    ("<think>a</think>b", "", "a", "b"),
    ("<think>\na\n\nb\n</think>\n\nc", "", "a\n\nb", "c"),
    ("\n<think>\na</think>\n    indented", "", "a", "    indented"),
    ("a\n</think>\n\nb", "<｜Assistant｜><think>\n", "a", "b"),
    ("<think>\n\n</think>\n\nhi", "", "", "hi"),
    ("hi", "<think>\n\n</think>\n\n", None, "hi"),
    ("[THINK]hm[/THINK]yes", "", "hm", "yes"),
    ("hm[/THINK]yes [THINK] is a marker", "[/INST][THINK]", "hm", "yes [THINK] is a marker"),
    ("<|START_THINKING|>hm<|END_THINKING|>yes", "", "hm", "yes"),
    ("<seed:think>\nhm\n</seed:think>yes", "", "hm", "yes"),
    ("<|channel>thought\nhm\n<channel|>yes", "", "hm", "yes"),
    ("<|begin_of_thought|>\n\nhm\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\nyes<|end_of_solution|>", "",
     "hm", "yes"),
    ("<think>hm</think><response>yes</response>", "", "hm", "yes"),
    ("<|think|>hm<|end|><|begin|>assistant<|content|>yes", "", "hm", "yes"),
    ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes", "",
     "hm", "yes"),
    ("<|channel|>final<|message|>yes", "<|start|>assistant", "", "yes"),
    ("hm<|end|><|start|>assistant<|channel|>final<|message|>yes",
     "<|start|>assistant<|channel|>analysis<|message|>", "hm", "yes"),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
     "<|start|>assistant<|channel|>analysis<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>d",
     "", "a\n\nc", "b\n\nd"),
    ("<think>a</think><think>b</think>c", "", "a\n\nb", "c"),
    ("The tag <think> opens, </b> closes", "", None, "The tag <think> opens, </b> closes"),
    ("<table><tr>", "", None, "<table><tr>"),
    ("  \n plain", "", None, "  \n plain"),
    ("<", "<b>", None, "<"),
]  # fmt: skip


def heard(pieces):
    """(reasoning, answer, all that was written)"""
    text = {"reasoning": "", "answer": "", "marker": ""}
    for p in pieces:
        text[p.kind] += p.text
    return text["reasoning"], text["answer"], "".join(p.written for p in pieces)


def in_parts(written, prompt, sizes):
    splitter, pieces, at = Splitter(prompt), [], 0
    while at < len(written):
        for size in sizes:
            pieces += splitter.push(written[at : at + size])
            at += size
    return heard([*pieces, *splitter.flush()])


@pytest.mark.parametrize(("written", "prompt", "reasoning", "answer"), WRITTEN)
def test_families_mark_reasoning_in_their_own_ways(written, prompt, reasoning, answer):
    for sizes in ([1], [2], [3, 1], [7], [1000]):
        assert in_parts(written, prompt, sizes) == (reasoning or "", answer, written)
    if written != "<":  # as a whole, that is a marker on its way
        assert split_thought(written, prompt) == (reasoning, answer, True)


MARKS = [
    *("<think>", "</think>", "[THINK]", "[/THINK]", "<|START_THINKING|>", "<|END_THINKING|>"),
    *("<|channel|>analysis<|message|>", "<|end|>", "<|start|>assistant<|channel|>final<|message|>"),
    *("<response>", "</response>", "\n", " ", "<", "a", "stop", "|>", "[", "end"),
]
PROMPTS = ["", "<think>\n", "<|start|>assistant"]
texts = st.lists(st.sampled_from(MARKS), max_size=14).map("".join)


@given(
    texts, st.sampled_from(["", "<think>\n", "<|start|>assistant"]), st.lists(st.integers(1, 9), min_size=1)
)
@example("<think></think><response></response></response>", "", [1])
@settings(max_examples=400)
def test_what_is_heard_does_not_depend_on_how_it_arrives_and_nothing_is_lost(written, prompt, sizes):
    whole = in_parts(written, prompt, [len(written) + 1])
    assert in_parts(written, prompt, sizes) == whole
    assert whole[2] == written


@given(texts, st.lists(st.integers(1, 9), min_size=1))
@settings(max_examples=400)
def test_stop_strings_are_looked_for_in_the_answer_alone(written, sizes):
    reasoning, answer, _ = in_parts(written, "", [len(written) + 1])
    outlet, said, at = Outlet(("stop", "top["), Splitter()), [], 0
    while at < len(written) and not outlet.stopped:
        for size in sizes:
            said.append(outlet.push(written[at : at + size]))
            at += size
    said.append(outlet.flush())
    cut = min((i for i in (answer.find("stop"), answer.find("top[")) if i >= 0), default=None)
    assert outlet.stopped == (cut is not None)
    assert "".join(s.text for s in said) == answer[:cut]
    assert written.startswith("".join(s.written for s in said))
    if cut is None:
        assert "".join(s.reasoning for s in said) == reasoning
        assert "".join(s.written for s in said) == written


# With a model, whose tokens are chosen here

WORDS = ["<s>", "</s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]"]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# Keeps the reasoning of the last answer alone, as most do.
READS = (
    "{% for m in messages %}{{ '[INST]' + m.role + ':' }}{% if m.reasoning_content and loop.last %}"
    "{{ '[THINK]' + m.reasoning_content + '[/THINK]' }}{% endif %}{{ m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}[INST]assistant:{% endif %}"
)
KEEPS = READS.replace(" and loop.last", "")


class Checkpoint(TinyCheckpoint):
    """Every byte a token, then WORDS as control tokens."""

    def __init__(self, template):
        super().__init__(0, template, vocab_size=256 + len(WORDS), eos_ids=(257,))

    def tokenizer(self):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        t = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        t.decoder = decoders.ByteLevel()
        t.add_special_tokens(WORDS)
        specials = {"bos_token": "<s>", "eos_token": "</s>"}
        return Tokenizer(t, eos_ids={257}, chat_template=self.template, special_tokens=specials)


@pytest.fixture(params=[MISTRAL], ids=["mistral"])
def model(request, monkeypatch):
    """A model that says what `model.script` spells, whatever it computes."""
    checkpoint = Checkpoint(request.param)
    policy = WeightPolicy("none", 16)
    with Model(
        checkpoint, ReferenceBackend(checkpoint, policy, threads=1), "tiny", LoadOptions(ctx=256)
    ) as m:
        m.script = "[THINK]hm stop[/THINK]Yes, stop.</s>"

        def choose(generation, row, drafted, q=None, before=(), guide=None):
            at = len(generation.context) + len(before) - len(generation.prompt)
            return m.tokenizer.encode(m.script, special=True)[at]

        monkeypatch.setattr(Generation, "_choose", choose)
        yield m


def test_decoding_keeps_control_tokens_that_mark_reasoning(model):
    ids = model.tokenizer.encode("<s>[INST]a[THINK]b[/THINK]c</s>", special=True)
    assert model.tokenizer.decode(ids) == "a[THINK]b[/THINK]c"


def test_events_and_completion_hold_reasoning_beside_the_text(model):
    *deltas, done = model.session().send("Well?")
    assert "".join(e.text for e in deltas) == done.completion.text == "Yes, stop."
    assert "".join(e.reasoning for e in deltas) == done.completion.reasoning == "hm stop"
    assert "".join(e.written for e in deltas) == "[THINK]hm stop[/THINK]Yes, stop."
    assert done.stats.reasoning_tokens == len("hm stop") + 2
    ids = model.tokenizer.encode("[THINK]hm stop[/THINK]Yes, stop.", special=True)
    assert done.completion.token_ids == ids == [e.token_id for e in deltas]
    assert event_to_json(done)["reasoning"] == "hm stop"
    assert {"event": "text", "text": "", "reasoning": "h", "token_id": ids[1]} in map(event_to_json, deltas)
    completion = model.chat([{"role": "user", "content": "Well?"}])
    assert (completion.text, completion.reasoning) == ("Yes, stop.", "hm stop")


def test_a_bare_prompt_is_continued_as_it_is(model):
    *_, done = model.generate("Well?")
    assert (done.completion.text, done.completion.reasoning) == ("[THINK]hm stop[/THINK]Yes, stop.", "")


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_a_stop_string_ends_the_answer_and_not_the_reasoning(model, draft):
    model.script = "[THINK]stop stop stop[/THINK]stay stay stay stop stop</s>"
    session = model.session(draft=draft)
    *_, done = session.send("stay stay stop stop", stop=(" stop",))
    assert (done.completion.text, done.completion.reasoning) == ("stay stay stay", "stop stop stop")
    assert session.nodes[-1].content == "[THINK]stop stop stop[/THINK]stay stay stay"
    assert session.nodes[-1].ids == model.tokenizer.encode(session.nodes[-1].content, special=True)


@pytest.mark.parametrize("model", [MISTRAL, KEEPS], indirect=True, ids=["in one piece", "by name"])
def test_the_next_turn_keeps_the_ids_that_the_answer_was_generated_in(model):
    session = model.session()
    list(session.send("Well?"))
    before = [*session.nodes[1].prompt_ids, *session.nodes[1].ids]
    *_, done = session.send("And?")
    assert done.stats.cached_tokens >= len(before) // 16 * 16 > 0
    assert session.messages[1] == {"role": "assistant", "content": "Yes, stop.", "reasoning": "hm stop"}
    segments = session._prompt(session.path()[:3], True)
    assert [i for _, ids in segments for i in ids][: len(before)] == before


@pytest.mark.parametrize("model", [READS], indirect=True)
def test_a_template_that_drops_reasoning_from_history_gets_its_way(model):
    session = model.session()
    list(session.send("Well?"))
    list(session.send("And?"))
    text = "".join(text for text, _ in session._prompt(session.path()[:3], True))
    assert text == "[INST]user:Well?</s>[INST]assistant:Yes, stop.</s>[INST]user:And?</s>[INST]assistant:"
    ids = [i for _, part in session._prompt(session.path()[:3], True) for i in part]
    assert ids == model.tokenizer.encode(text, special=True)


def test_an_answer_that_ends_in_the_middle_of_its_reasoning_is_kept(model):
    session = model.session()
    *_, done = session.send("Well?", max_tokens=4)
    assert (done.completion.text, done.completion.reasoning, done.finish_reason) == ("", "hm ", "length")
    assert session.messages[-1] == {"role": "assistant", "content": "", "reasoning": "hm "}
    events = session.regenerate()
    for _ in range(5):
        next(events)
    events.close()
    assert session.messages[-1]["reasoning"] == "hm s"
    assert session.nodes[-1].ids == model.tokenizer.encode("[THINK]hm s", special=True)


def test_a_saved_conversation_has_its_reasoning(model, tmp_path):
    session = model.session()
    list(session.send("Well?"))
    session.save(tmp_path / "s.json")
    assert Session.load(tmp_path / "s.json", model).messages == session.messages


def test_markdown_folds_reasoning(model):
    session = model.session()
    list(session.send("Well?"))
    answer = session.nodes[1]
    store = ChatStore(in_memory=True)
    chat = store.create("tiny")
    question = add(store, chat.id, "user", "Well?")
    add(store, chat.id, "assistant", answer.content, question, "tiny", finish_reason="stop")
    text = export.to_markdown(store, chat.id)
    assert text.endswith("<details><summary>Reasoning</summary>\n\nhm stop\n\n</details>\n\nYes, stop.\n")
    assert json.loads(export.to_json(store, chat.id))["nodes"][1]["content"] == answer.content


class Screen(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stream)
    out = Printer()
    for text, reasoning in (("", ""), ("", "hm\x1b]0;x\x07"), ("", " so"), ("Y", ""), ("es", "")):
        out.show(TextDelta(text, 1, reasoning))
    out.end()
    return stream.getvalue()


def test_reasoning_is_faint_on_a_terminal_and_never_in_a_pipe(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(monkeypatch, io.StringIO()) == "Yes\n"
    text = shown(monkeypatch, Screen())
    assert text.endswith("\n\nYes\n")
    assert "\x1b[2m so\x1b[0m" in text
    assert "\x1b]" not in text
    assert "\x1b" not in shown(monkeypatch, Screen(), NO_COLOR="1")
    assert shown(monkeypatch, Screen(), NO_COLOR="1").startswith("(thinking)\nhm")


def test_channels_of_a_vocabulary_end_no_turn():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"]

    def of(words):
        t = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        t.decoder = decoders.ByteLevel()
        t.add_special_tokens(words)
        return Tokenizer(t, eos_ids=[t.token_to_id("<|end|>")], chat_template=TEMPLATE)

    harmony = of(words)
    assert {harmony.backend.id_to_token(i) for i in harmony.eos_ids} == {"<|return|>", "<|call|>"}
    written = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes"
    text = harmony.decode(harmony.encode(written + "<|return|>", special=True))
    assert split_thought(text) == ("hm", "yes", True)
    phi = of(["<|end|>", "<|user|>"])
    assert {phi.backend.id_to_token(i) for i in phi.eos_ids} == {"<|end|>"}
    assert phi.decode(phi.encode("a<|end|>", special=True)) == "a"


@pytest.mark.parametrize("marks", [
    ("<|think_start|>", "<|think_end|>"), ("[REASONING]", "[/REASONING]"), ("<|thought|>", "<|/thought|>"),
    ("<|begin_of_thinking|>", "<|end_of_thinking|>"), ("<|THINKING|>", "</|THINKING|>"),
])  # fmt: skip
def test_families_that_nobody_has_named_yet_are_known_by_their_looks(marks):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([*marks, "<|im_end|>", "<|im_start|>"])
    tokenizer = Tokenizer(t, chat_template=TEMPLATE)
    written = f"{marks[0]}\nhm{marks[1]}\n\nyes"
    assert tokenizer.decode(tokenizer.encode(written + "<|im_end|>", special=True)) == written
    template = ChatTemplate(TEMPLATE, tokenizer)
    for prompt, text in (("", written), (f"<|im_start|>assistant\n{marks[0]}\n", written[len(marks[0]) :])):
        splitter = template.splitter(prompt)
        pieces = [p for c in text for p in splitter.push(c)]
        assert heard([*pieces, *splitter.flush()]) == ("hm", "yes", text)
        assert split_thought(text, prompt) == ("hm", "yes", True)
    assert split_thought(f"{marks[0]} is a marker") == (None, f"{marks[0]} is a marker", True)


def test_phrases_count_where_the_template_uses_them():
    granite = "Write after 'Here is my thought process:' and then after 'Here is my response:'."
    written = "Here is my thought process: hm Here is my response: yes"
    for source, expected in ((granite, (" hm ", " yes")), (TEMPLATE, ("", written))):
        splitter = Splitter("", source)
        assert heard([*splitter.push(written), *splitter.flush()])[:2] == expected
    assert split_thought(written) == (" hm ", " yes", True)
    assert split_thought("Here is my thought process: hm") == (None, "Here is my thought process: hm", True)


def test_done_is_the_last_event_whatever_is_held_back(model):
    for script in ("[THINK]", "[THINK]\n", "[THINK]a[/THINK]\n\n", "<", "<think", "\n", "[THINK]a[/THINK]"):
        model.script = script + "</s>"
        *deltas, done = model.session().send("Well?")
        assert isinstance(done, Done)
        assert "".join(e.written for e in deltas) == script
        assert "".join(e.text for e in deltas) == done.completion.text
