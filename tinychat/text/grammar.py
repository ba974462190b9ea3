"""Holding what a model writes to a form, token by token, by llguidance (Moskal et al., Microsoft).

A `Matcher` says after each token which ones may come next. Its vocabulary is the tokenizer's, as bytes, so
that a text may be cut into tokens anywhere; markers of turns and of reasoning are in it by number only, and
are never part of a text. The end of the answer is allowed where the form is complete, and nowhere else.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tinychat.base.errors import TinychatError, UsageError
from tinychat.text.response_format import Form, escaped
from tinychat.text.tokenizer import SOME_TEXT, Tokenizer

if TYPE_CHECKING:
    import llguidance

T = TypeVar("T")

KEPT = 16  # compiled forms of one vocabulary
STACK_BYTES = 1 << 26  # of the thread that compiles: references are followed by recursion
SEARCHED = 400  # parts of a schema that are looked at for the one that is wrong
# Rows of some thousand items are what a schema of a thousand optional properties takes. The rest bounds what
# a hostile form may cost: about a second to be compiled, tenths of one in a step, 1 to 2 KB for each state.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 8000,
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}
# Between the tokens of JSON: one space, or a new line with an indentation. A model that may write any number
# of spaces sometimes never stops.
SPACES = r"( |\n{1,2}[ \t]{0,20})"
OPTIONS: dict[str, Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": SPACES,
    "lenient": False,
    "coerce_one_of": False,
    "json_allow_general_unicode_escapes": False,
}


class Matcher:
    """Place in a form, after some tokens of the answer."""

    def __init__(self, inner: llguidance.LLMatcher, n_tokens: int):
        self._inner, self.n_tokens = inner, n_tokens

    def fork(self) -> Matcher:
        """Another one at the same place, which goes on by itself; it costs microseconds."""
        return Matcher(self._inner.deep_copy(), self.n_tokens)

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, those that end an answer among them where the form is complete:
        bool [n_tokens]. Raises TinychatError where the form has become too complex to go on.
        """
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self.n_tokens, bitorder="little").view(bool)

    def push(self, token: int) -> None:
        """That token comes. Raises TinychatError if it may not."""
        self._inner.consume_token(token)
        self._check()

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of these may come one after the other."""
        return self._inner.validate_tokens(list(tokens)) if tokens else 0

    def forced(self) -> list[int]:
        """Tokens that have to come next, if there is no choice."""
        return self._inner.compute_ff_tokens()

    @property
    def finished(self) -> bool:
        """Whether the form is complete and nothing can be added."""
        return self._inner.is_stopped() and not self._inner.is_error()

    def _check(self) -> None:
        if self._inner.is_error():
            raise TinychatError(
                f"The answer cannot be held to its form any further: {_first_line(self._inner.get_error())}.",
                "Use a simpler schema, expression or grammar.",
            )


class _Vocabulary:
    """The tokens of a tokenizer as llguidance wants them, and the forms that were compiled for them."""

    is_tokenizer_wrapper = True  # what llguidance looks for

    def __init__(self, tokenizer: Tokenizer):
        import llguidance

        self._tokenizer = weakref.ref(tokenizer)
        highest = max([tokenizer.vocab_size - 1, *tokenizer.markers])
        n = min(highest + 1, tokenizer.n_embeddings)
        # Without a token that ends an answer, llguidance gets one that no model has.
        self.n_tokens, ends = n, sorted(i for i in tokenizer.eos_ids if i < n)
        self.tokens = [tokenizer.text_bytes(i) for i in range(n)] + [b"<end>"] * (not ends)
        unread = {*tokenizer.markers, *tokenizer.special_ids, *tokenizer.written}
        self.special_token_ids = sorted(i for i in unread if i < n) + [n] * (not ends)
        self.eos_token_id, self.bos_token_id = (ends or [n])[0], None
        self.inner = llguidance.LLTokenizer(
            self,  # type: ignore[arg-type]
            n_vocab=len(self.tokens),
            eos_token=ends or [n],
            slices=llguidance.LLTokenizer.json_slices(),
        )
        self._kept: OrderedDict[Form, Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of text that goes on: what llguidance takes for the one way to write what has to come."""
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return []
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return tokenizer.encode(text, after=SOME_TEXT)

    def matcher(self, form: Form) -> Matcher:
        with self._lock:
            found = self._kept.get(form)
        if found is None:
            found = _on_a_deep_stack(lambda: self._compiled(form))
            with self._lock:
                self._kept[form] = found
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return found.fork()

    def _compiled(self, form: Form) -> Matcher:
        inner, why = self._compile(_grammar(form))
        if not why:
            return Matcher(inner, self.n_tokens)
        if form.kind == "json_schema":
            place, why = self._place(json.loads(form.text), why)
            raise UsageError(
                f"The schema cannot be held to at {place}: {why}.", "Change that part, or leave it out."
            )
        what = "regular expression" if form.kind == "regex" else "grammar"
        raise UsageError(f"The {what} cannot be held to: {why}.", "Change it.")

    def _compile(self, grammar: str) -> tuple[llguidance.LLMatcher, str]:
        """The matcher, and what is wrong with it in one line."""
        import llguidance

        limits = llguidance.LLParserLimits(**LIMITS)
        inner = llguidance.LLMatcher(self.inner, grammar, log_level=0, limits=limits)
        if not inner.is_error():
            trial = inner.deep_copy()  # what cannot begin says so now
            trial.compute_bitmask()
            if trial.is_error() or (trial.is_stopped() and not trial.is_accepting()):
                return inner, _first_line(trial.get_error()) or "nothing can be written in it"
        return inner, _first_line(inner.get_error())

    def _place(self, schema: Any, why: str) -> tuple[str, str]:
        """JSON pointer of the smallest part that is wrong by itself, and why."""
        shared = {k: schema[k] for k in ("$defs", "definitions") if isinstance(schema, dict) and k in schema}
        place, part, left, seen = "#", schema, SEARCHED, {"#"}
        while isinstance(part, dict):
            for at, inner in _parts(part, place, schema):
                left -= 1
                if left < 0:
                    return place, why
                if at in seen or not isinstance(inner, dict):
                    continue
                found = self._compile(_schema_grammar(json.dumps({**shared, **inner})))[1]
                if found:
                    place, part, why = at, inner, found
                    seen.add(at)
                    break
            else:
                break
        return place, why


def _parts(part: dict[str, Any], place: str, root: Any) -> Iterator[tuple[str, Any]]:
    """Schemas within a schema, with their places."""
    for key in ("properties", "patternProperties"):
        if isinstance(inner := part.get(key), dict):
            yield from ((f"{place}/{key}/{escaped(name)}", value) for name, value in inner.items())
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(inner := part.get(key), list):
            yield from ((f"{place}/{key}/{i}", value) for i, value in enumerate(inner))
    for key in ("items", "additionalProperties"):
        if key in part:
            yield f"{place}/{key}", part[key]
    if isinstance(target := part.get("$ref"), str) and target.startswith("#/"):
        value = root
        for key in target[2:].split("/"):
            key = key.replace("~1", "/").replace("~0", "~")
            value = value.get(key) if isinstance(value, dict) else None
        yield target[:200], value


def _grammar(form: Form) -> str:
    import llguidance

    if form.kind == "json_schema":
        return _schema_grammar(form.text)
    if form.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(form.text)
    return llguidance.LLMatcher.grammar_from_lark(form.text)


def _schema_grammar(schema: str) -> str:
    import llguidance

    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)  # type: ignore[arg-type]  # a TypedDict of its stub


def _first_line(error: str) -> str:
    """What llguidance says, without the place in its own sources and without the dot."""
    lines = [line.strip() for line in error.splitlines()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines or [""])[0][:200].rstrip(". ")


def _on_a_deep_stack(make: Callable[[], T]) -> T:
    """What `make` returns or raises, run on a thread with a stack of STACK_BYTES."""
    out: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            out.append(make())
        except BaseException as e:
            raised.append(e)

    with _stacks:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if raised:
        raise raised[0]
    return out[0]


_stacks = threading.Lock()
_vocabularies: weakref.WeakKeyDictionary[Tokenizer, _Vocabulary] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def matcher(form: Form, tokenizer: Tokenizer) -> Matcher:
    """A matcher at the beginning of a form. The first one of a tokenizer takes a part of a second, the first
    one of a form milliseconds.

    Raises UsageError that names the place where a form is wrong, or asks for what cannot be held to.
    """
    with _making:
        if (vocabulary := _vocabularies.get(tokenizer)) is None:
            vocabulary = _vocabularies[tokenizer] = _Vocabulary(tokenizer)
    return vocabulary.matcher(form)
