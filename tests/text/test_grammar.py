"""Holding text to a form: which tokens may come, on vocabularies of several kinds."""

from __future__ import annotations

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import schemas
import tokenizers
from tiny import byte_tokenizer
from tokenizers import decoders, models, pre_tokenizers

from tinychat.base.errors import TinychatError, UnsupportedModelError, UsageError
from tinychat.engine.sampling import masked
from tinychat.formats.gguf_file import GGUFFile
from tinychat.formats.gguf_tokenizer import from_gguf
from tinychat.text import grammar
from tinychat.text.response_format import of_schema, response_format
from tinychat.text.tokenizer import Tokenizer

BYTES = byte_tokenizer()
FOLDER = os.environ.get("TINYCHAT_TEST_VOCABULARIES", "")


def sentencepiece() -> Tokenizer:
    """Gemma's kind: spaces are ▁, what is no token is spelled in <0x00>…<0xFF>, a marker is user-defined."""
    pieces = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [
        "▁",
        "{",
        "}",
        '"',
        '{"',
        '"}',
        ":",
        ",",
        "a",
        "b",
        "▁a",
        "▁b",
        "ab",
        "é",
        "▁▁",
        "1",
        "2",
        "<turn>",
    ]
    t = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    t.add_special_tokens(["<s>", "</s>"])
    t.add_tokens([tokenizers.AddedToken("<turn>", normalized=False)])
    return Tokenizer(t, bos_id=0, eos_ids={1})


PIECES = sentencepiece()


def matcher(value, tokenizer=BYTES):
    form = of_schema(value) if "type" not in value or value["type"] not in FORMS else response_format(value)
    return grammar.matcher(form, tokenizer)


FORMS = ("regex", "choice", "grammar", "json_object")


def takes(m, text, tokenizer=BYTES):
    """Whether a text, given token by token, is complete in its form."""
    m = m.fork()
    for token in tokenizer.encode(text, after=-1):
        if not m.allowed()[token]:
            return False
        m.push(token)
    return bool(m.allowed()[sorted(tokenizer.eos_ids)].all())


def walk(m, tokenizer, rng, longest=600):
    """Text of random tokens that are allowed; None: it did not come to an end."""
    ids: list[int] = []
    ends = sorted(tokenizer.eos_ids)
    while len(ids) < longest:
        allowed = m.allowed()
        may_end = allowed[ends].all()
        allowed[ends] = False
        choices = np.flatnonzero(allowed)
        if may_end and (m.finished or not len(choices) or rng.random() < 0.3):
            return tokenizer.decode(ids, continued=True)
        plain = [i for i in choices if tokenizer.token_bytes(int(i)) not in (b" ", b"\n", b"\t", b"\\")]
        token = int(rng.choice(plain if plain and rng.random() < 0.95 else choices))
        m.push(token)
        ids.append(token)
    return None


def check(text, schema):
    """Raise where a text is no JSON that the schema allows. Dates: 29 February is one in every year."""
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    formats = jsonschema.FormatChecker([f for f in formats.checkers if not f.startswith("date")])
    jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator, format_checker=formats)


def valid_texts(n, seed):
    """How many of n schemas a random text was complete and valid for; raises at one that is not valid."""
    done = 0
    for k, schema in enumerate(schemas.corpus(n, seed)):
        text = walk(grammar.matcher(of_schema(schema), BYTES), BYTES, np.random.default_rng(k))
        if text is not None:
            try:
                check(text, schema)
            except ValueError as e:
                raise AssertionError(f"{schema} let {text!r} through") from e
            done += 1
    return done


def test_random_texts_of_many_schemas_are_valid():
    assert valid_texts(90, 0) >= 75


@pytest.mark.slow
def test_random_texts_of_very_many_schemas_are_valid():
    assert valid_texts(3000, 1) >= 2700


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="TINYCHAT_TEST_VOCABULARIES does not name llama.cpp's folder `models`")
def test_real_vocabularies_are_held_to_schemas_and_a_mask_costs_little(capsys):
    row = np.random.default_rng(0).normal(0, 3, 1 << 18).astype(np.float32)
    for file in sorted(Path(FOLDER).glob("ggml-vocab-*.gguf")):
        try:
            tokenizer = from_gguf(GGUFFile(file).fields)
        except UnsupportedModelError:
            continue
        seconds, done = [], 0
        for k, schema in enumerate(schemas.corpus(60, 3)):
            m = grammar.matcher(of_schema(schema), tokenizer)
            ask = m.allowed

            def timed(ask=ask, seconds=seconds):
                began = time.perf_counter()
                allowed = ask()
                masked(row, allowed)
                seconds.append(time.perf_counter() - began)
                return allowed

            m.allowed = timed
            text = walk(m, tokenizer, np.random.default_rng(k), 250)
            if text is not None:
                check(text, schema)
                done += 1
        middle, late = np.percentile(seconds, [50, 95]) * 1e3
        with capsys.disabled():
            print(
                f"\n{file.stem}: {m.n_tokens} tokens, {done} valid; {middle:.2f} ms each (95 %: {late:.2f})"
            )
        assert done >= 50
        assert middle < 1.25  # 5 % of a token of 25 ms


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte-level", "sentencepiece"])
def test_the_end_is_allowed_where_the_form_is_complete_and_nowhere_else(tokenizer):
    m = grammar.matcher(of_schema({"type": "string", "maxLength": 3}), tokenizer)
    (end,) = tokenizer.eos_ids
    for token in tokenizer.encode('"aé"', after=-1):
        assert not m.allowed()[end]
        assert not m.finished
        m.push(token)
    assert m.finished
    assert np.flatnonzero(m.allowed()).tolist() == [end]


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte-level", "sentencepiece"])
def test_characters_are_whole_where_tokens_are_parts_of_them(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(5):
        text = walk(
            grammar.matcher(response_format({"type": "regex", "pattern": "[é日𝄞]{2,4}"}), tokenizer),
            tokenizer,
            rng,
        )
        assert re.fullmatch("[é日𝄞]{2,4}", text)


def test_added_tokens_are_never_part_of_a_text():
    for tokenizer in (BYTES, PIECES):
        m = grammar.matcher(response_format({"type": "regex", "pattern": "(.|\n)*"}), tokenizer)
        for _ in range(3):
            allowed = m.allowed()
            assert not allowed[[i for i in tokenizer.markers if i not in tokenizer.eos_ids]].any()
            m.push(int(np.flatnonzero(allowed)[40]))
        assert takes(m, "<turn><|im_start|>", tokenizer)  # their spelling is text


def test_a_grammar_names_a_marker_by_its_token():
    m = grammar.matcher(response_format({"type": "grammar", "grammar": "start: <|im_start|> /a+/"}), BYTES)
    assert np.flatnonzero(m.allowed()).tolist() == [256]


def test_a_vocabulary_without_an_end_goes_on_where_it_can_and_is_finished_where_it_cannot():
    tokenizer = byte_tokenizer()
    tokenizer.eos_ids = frozenset()
    m = grammar.matcher(response_format({"type": "regex", "pattern": "ab?"}), tokenizer)
    for token in tokenizer.encode("ab"):
        assert m.allowed()[token]
        assert not m.finished
        m.push(token)
    assert m.finished
    assert len(m.allowed()) == 258


def test_a_fork_goes_on_by_itself_and_guesses_are_counted_up_to_the_first_that_cannot_come():
    m = matcher({"type": "regex", "pattern": "[ab]{4}"})
    a, b, c = BYTES.encode("abc")
    m.push(a)
    other = m.fork()
    assert m.accepts([a, b, c, a]) == 2
    assert m.accepts([]) == 0
    for token in (b, b, b):
        other.push(token)
    assert other.finished
    assert m.accepts([a, b, a, b]) == 3
    with pytest.raises(TinychatError, match="cannot be held"):
        m.push(c)


def test_what_has_to_come_is_known():
    m = matcher({"type": "choice", "choices": ["yesterday", "yes, sir"]})
    assert BYTES.decode(m.forced()) == "yes"
    for token in BYTES.encode("yes,"):
        m.push(token)
    assert BYTES.decode(m.forced()) == " sir"


def test_white_space_between_the_tokens_of_json_is_bounded():
    m = matcher({"type": "array", "items": {"type": "boolean"}})
    for text in ("[true,false]", "[true, false]", "[\n  true,\n  false\n]"):
        assert takes(m, text)
    for text in ("[  true]", "[\n\n\n true]", f"[\n{' ' * 30}true]", " [true]"):
        assert not takes(m, text)


QUOTE, BACKSLASH, NEWLINE = json.dumps('"'), json.dumps("\\"), json.dumps("\n")


@pytest.mark.parametrize(
    "pattern", ['^[^"]$', "^[^\\\\]$", "^[^!-~]$", '^(a|[^"\\\\])$', "^[\\x00-!#-~]$", "^[^x]$", "^\\W$"]
)
def test_classes_of_characters_forbid_quotes_and_backslashes_where_they_say_so(pattern):
    m = matcher({"type": "string", "pattern": pattern})
    for value in ('"', "\\", "a", "x", " ", "/"):
        if takes(m, json.dumps(value)):
            assert re.search(pattern, value), value
        else:
            assert not re.search(pattern, value), value


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "number", "minimum": -2.5, "exclusiveMaximum": -2}, "-2.01", "-2"),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1.5}, "1.001", "1"),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, "0.25", "0"),
        ({"type": "integer", "exclusiveMinimum": 1, "maximum": 3}, "2", "1"),
        ({"const": {"exclusiveMinimum": 0, "maximum": 0.5}}, '{"exclusiveMinimum":0,"maximum":0.5}', "0"),
    ],
)
def test_exclusive_bounds_exclude(schema, right, wrong):
    m = matcher(schema)
    assert takes(m, right)
    assert not takes(m, wrong)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "foo"}, "#"),
        ({"properties": {"a/b": {"items": {"type": "foo"}}}}, "#/properties/a~1b/items"),
        ({"anyOf": [{}, {"not": {}}]}, "#/anyOf/1"),
        ({"$defs": {"q": {"pattern": "(["}}, "properties": {"a": {"$ref": "#/$defs/q"}}}, "#/$defs/q"),
        ({"properties": {"a": {"$ref": "http://example.org/x"}}}, "#/properties/a"),
        ({"properties": {"a": {"uniqueItems": True, "type": "array"}}}, "#/properties/a"),
        (
            {"type": "array", "prefixItems": [{"enum": []}], "minItems": 1},
            "#/prefixItems/0",
        ),
        ({"items": {"type": "object", "minProperties": 2}}, "#/items"),
        ({"items": {"type": "string", "format": "nonsense"}}, "#/items"),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused_with_its_place(schema, place):
    with pytest.raises(UsageError) as e:
        matcher(schema)
    assert f" at {place}: " in e.value.what
    assert "\n" not in e.value.what


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({"type": "regex", "pattern": "(["}, "unclosed character class"),
        ({"type": "regex", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "grammar", "grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"type": "grammar", "grammar": "start: <|nobody|>"}, "unknown special token"),
        ({"type": "grammar", "grammar": "start: s\ns: s"}, "NoExtension"),
        ({"type": "grammar", "grammar": "start: " + "(" * 500 + '"a"' + ")" * 500}, "deeply nested"),
    ],
)
def test_an_expression_that_means_nothing_is_refused_with_what_is_wrong(form, why):
    with pytest.raises(UsageError, match=re.escape(why)) as e:
        matcher(form)
    assert len(e.value.what) < 400


HOSTILE = {
    "references that refer on": {
        "$defs": {**{f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(990)}, "d990": {}},
        "$ref": "#/$defs/d0",
    },
    "alternatives of all": {
        "allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(3)]} for i in range(12)]
    },
    "a regular expression of millions": {"type": "regex", "pattern": "((a{1000}){1000}){1000}"},
    "a text of a million": {"type": "string", "pattern": "^a{1000000}$"},
    "terms that double": {
        "type": "grammar",
        "grammar": "start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(199)) + 'R199: "a"',
    },
    "rules that double": {
        "type": "grammar",
        "grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(900)) + 'r900: "a"',
    },
    "rules that go on": {
        "type": "grammar",
        "grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(900)) + 'r900: "a"',
    },
    "many properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}},
    "classes without an end": {"type": "string", "pattern": "[" * 100_000},
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_form_costs_seconds_at_most(value):
    began = time.process_time()
    try:
        m = matcher(value)
        for _ in range(5):
            choices = np.flatnonzero(m.allowed())
            m.push(int(choices[len(choices) // 2]))
            if m.finished:
                break
    except TinychatError:
        pass
    assert time.process_time() - began < 5


def test_matchers_are_made_and_asked_by_several_threads():
    def write(k):
        schema = schemas.corpus(30, 5)[k]
        text = walk(grammar.matcher(of_schema(schema), BYTES), BYTES, np.random.default_rng(k))
        return text is None or check(text, schema)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(30)))
