"""Grammars that hold an answer to calls of tools, and their arguments to the tools' schemas.

They are llguidance's dialect of Lark. Markers that are tokens of the vocabulary stand in them by number, for
the text of an answer has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinychat.base.errors import UsageError
from tinychat.text import grammar
from tinychat.text.calls.gemma import Gemma
from tinychat.text.calls.held_values import Values, in_order
from tinychat.text.calls.named import Named
from tinychat.text.calls.objects import Objects
from tinychat.text.calls.pythonic import Pythonic
from tinychat.text.calls.syntax import Syntax, as_json
from tinychat.text.calls.tagged import Tagged, kinds_of
from tinychat.text.reasoning import CHANNEL, END, MESSAGE, START
from tinychat.text.response_format import Form, of_schema

if TYPE_CHECKING:
    from tinychat.text.tokenizer import Tokenizer

CLOSED = {"type": "object", "additionalProperties": False}  # what a schema means that does not say
LOOSE = {"type": "object"}
TYPES = {"string", "number", "integer", "boolean", "null", "array", "object"}
ARGUMENTS = "{}"  # what stands for them in a call that is spelled
_BARE = r"/([ \n]*[^{\[ \n](?s:.*))?/"  # what does not look like a call without a marker


class Held:
    """The grammar of calls of some tools, as one model writes them.

    tools: (name, parameters) of each; the parameters are JSON schemas that llguidance takes. throughout: the
    grammar has the thought before the answer in it, too.
    """

    def __init__(self, syntax: Syntax, tools: Sequence[tuple[str, Mapping[str, Any]]], tokenizer: Tokenizer):
        self._syntax, self._tools = syntax, tools
        self.throughout = isinstance(syntax, Named) and syntax.ends == MESSAGE
        self._ids = {text: i for i, text in tokenizer.markers.items()}
        self._markers = re.compile(
            "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) or r"\b\B"
        )
        self._rules: list[str] = []

    def grammar(self, required: bool, several: bool, form: Mapping[str, Any] | None = None) -> str | None:
        """The grammar; None where calls of this syntax cannot be held to one.

        required: there must be a call. several: there may be more than one. form: JSON schema of an answer
        without calls; None leaves its text free.
        """
        if self.throughout:
            return self._channels(required, form)
        opener, rest = self._calls(several)
        calls = f"{self._lark(opener)} rest" if opener else "rest"
        if required:
            start = calls
        elif form is not None:
            start = f"form | {calls}"
            self._rules.append(f"form: {_json(form)}")
        else:
            start = self._with_words(opener, calls)
        return "\n".join((f"start: {start}", f"rest: {rest}", *self._rules, r"WS: /\n{0,2}/"))

    def _with_words(self, opener: str, calls: str) -> str:
        """Calls that words may go before, or words alone."""
        if not opener:
            self._rules.append(f"text: TEXT\nTEXT: {_BARE}")
            return f"text | {calls}"
        plain = [o for o in self._syntax.opens if not self._markers.search(o)]
        self._rules.append(f"text: TEXT\nTEXT: {_without(plain)}")
        if self._lark(opener).startswith("<["):
            return f"text ({calls})?"
        # A text ends where what opens a call is complete, which is then its end.
        others = _without([o for o in plain if o != opener])
        self._rules.append(f"before[suffix={self._plain(opener)}]: BEFORE\nBEFORE: {others}")
        return "text | before rest"

    def _channels(self, required: bool, form: Mapping[str, Any] | None) -> str | None:
        """Messages in channels (harmony): a thought, then a call, which ends the answer, or a final one. None
        where the vocabulary has no tokens for that.
        """
        if not {CHANNEL, MESSAGE, END, START} <= set(self._ids):
            return None
        calls = []
        for i, (name, parameters) in enumerate(self._tools):
            self._rules.append(f"arguments_{i}: {_json(parameters)}")
            calls.append(f"{self._lark(f'{name} <|constrain|>json{MESSAGE}')} arguments_{i}")
        self._rules.append(
            "call: " + self._lark(f"{CHANNEL}commentary to=functions.") + f" ({' | '.join(calls)})"
        )
        more = self._lark(f"{END}{START}assistant")
        self._rules.append(f"thought: {self._lark(f'{CHANNEL}analysis{MESSAGE}')} text {more}")
        self._rules.append("text: TEXT\nTEXT: /(?s:.*)/")
        if required:
            return "\n".join(("start: thought? call", *self._rules))
        final = "text" if form is None else "form"
        self._rules += [] if form is None else [f"form: {_json(form)}"]
        self._rules.append(f"words: {self._lark(f'{CHANNEL}commentary{MESSAGE}')} text {more}")
        self._rules.append(f"final: {self._lark(f'{CHANNEL}final{MESSAGE}')} {final}")
        return "\n".join(("start: thought? (final | words? call)", *self._rules))

    def _calls(self, several: bool) -> tuple[str, str]:
        """What opens the calls, and the rule for all behind that."""
        syntax = self._syntax
        if isinstance(syntax, Tagged):
            return self._tagged(syntax, several)
        if isinstance(syntax, Gemma):
            return self._gemma(syntax, several)
        if isinstance(syntax, Pythonic) and syntax.objects:
            opens = () if syntax.bare else syntax.opens
            keys = ("name", "parameters") if syntax.bare else ("name", "arguments")
            syntax = Objects(opens, syntax.closes, listed=not syntax.bare, keys=keys)
        elif isinstance(syntax, Pythonic):
            return self._keywords(syntax, several)
        assert isinstance(syntax, (Objects, Named))  # there is no other kind
        return self._of_json(syntax, several)

    def _of_json(self, syntax: Objects | Named, several: bool) -> tuple[str, str]:
        """Calls whose arguments are JSON: what stands before, between and behind them is as it is spelled."""
        before, between, behind, opener = [], [], "", ""
        for i, (name, parameters) in enumerate(self._tools):
            first, second, behind = syntax.spell([(name, {}), (name, {})]).split(ARGUMENTS)
            opener = max((o for o in syntax.opens if first.startswith(o)), key=len, default="")
            self._rules.append(f"arguments_{i}: {_json(parameters)}")
            before.append(f"{self._lark(first[len(opener) :])} arguments_{i}")
            between.append(f"{self._lark(second)} arguments_{i}")
        more = f" ({' | '.join(between)})*" if several else ""
        return opener, f"({' | '.join(before)}){more} {self._lark(behind)}"

    def _keywords(self, syntax: Pythonic, several: bool) -> tuple[str, str]:
        """Calls as Python has them, a line each. Their values are JSON, which is read as well."""
        calls = []
        for i, (name, parameters) in enumerate(self._tools):
            properties, required = parameters.get("properties", {}), parameters.get("required", ())
            shared = {n: parameters[n] for n in ("$defs", "definitions") if n in parameters}
            parts = []
            for k, (key, schema) in enumerate(properties.items()):
                if key in required and not key.isidentifier():
                    raise UsageError(
                        f"The tool {name}: this model cannot write {key!r}.", "Use another name for it."
                    )
                if key.isidentifier():
                    value = {**shared, **schema} if isinstance(schema, Mapping) else {}
                    self._rules.append(f"v{i}_{k}: {_json({**value, 'x-guidance': grammar.OPTIONS})}")
                    parts.append((f"{self._plain(f'{key}=')} v{i}_{k}", key in required))
            self._rules += in_order(f"k{i}", parts, ", ")
            calls.append(f'{self._lark(f"{name}(")} k{i}_first0 ")"')
        self._rules.append("call: " + "\n    | ".join(calls))
        more = ' ("\\n" call)*' if several else ""
        return syntax.opens[0], f"WS call{more} WS {self._lark(syntax.closes[0])}"

    def _gemma(self, syntax: Gemma, several: bool) -> tuple[str, str]:
        calls = []
        for i, (name, parameters) in enumerate(self._tools):
            values = Values(syntax.quote, parameters, self._lark, f"v{i}")
            root = values.rule({"properties": {}, **parameters, "type": "object"})
            calls.append(f"{self._lark(f'call:{name}')} {root} {self._lark(syntax.closes[0])}")
            self._rules += values.rules
        self._rules.append("call: " + "\n    | ".join(calls))
        opener = syntax.opens[0]
        return opener, f"call ({self._lark(opener)} call)*" if several else "call"

    def _tagged(self, syntax: Tagged, several: bool) -> tuple[str, str]:
        calls = []
        for i, (name, parameters) in enumerate(self._tools):
            end = "".join(e for e in (syntax.name_ends[0].strip(), syntax.head_end) if e)
            parts = [self._lark(name + end), "WS"]
            required = parameters.get("required", ())
            properties = parameters.get("properties", {})
            for k, (key, schema) in enumerate(properties.items()):
                shared = {n: parameters[n] for n in ("$defs", "definitions") if n in parameters}
                self._rules.append(
                    f"p{i}_{k}: {' '.join(self._parameter(syntax, key, schema, shared, f'v{i}_{k}'))}"
                )
                parts.append(f"(p{i}_{k} WS)" + ("" if key in required else "?"))
            calls.append(" ".join([*parts, self._lark(syntax.call_end)]))
        self._rules.append("call: " + "\n    | ".join(calls))
        opened = self._lark(syntax.call)
        more = f" (WS {opened} call)*" if several else ""
        if not syntax.section[0]:
            return syntax.call, f"call{more}"
        start, end = map(self._lark, syntax.section)
        self._rules.append(f"section: WS {opened} call{more} WS {end}")
        return syntax.section[0], "section" + (f" (WS {start} section)*" if several else "")

    def _parameter(
        self, syntax: Tagged, key: str, schema: Any, shared: Mapping[str, Any], rule: str
    ) -> Iterator[str]:
        kinds = kinds_of(schema)
        told = ""
        if syntax.typed:
            name, _, value = syntax.typed.partition("=")
            other = (
                '"false"'
                if value == '"true"'
                else as_json(min(kinds - {"null"} or {"null"}) if kinds else "object")
            )
            told = f" {name}={value if kinds == {'string'} else other}"
        edge = "\n" if syntax.lines else ""
        yield self._lark(syntax.key + key + syntax.key_ends[0] + told + syntax.tag_end)
        if syntax.between:
            yield "WS"
            yield self._lark(syntax.between)
        end = edge + syntax.value_end
        choices = schema.get("enum") if isinstance(schema, Mapping) else None
        if edge:
            yield self._lark(edge)
        if kinds != {"string"}:
            self._rules.append(
                f"{rule}: {_json({**shared, **schema} if isinstance(schema, Mapping) else {})}"
            )
        elif isinstance(choices, list) and all(isinstance(c, str) for c in choices):
            self._rules.append(f"{rule}: {' | '.join(map(self._plain, choices))}")
        elif syntax.value_end in self._ids:
            self._rules.append(f"{rule}: V{rule[1:]}\nV{rule[1:]}: /(?s:.*)/")
            end = syntax.value_end
        else:
            self._rules.append(f"{rule}[suffix={self._plain(end)}]: /(?s:.*)/")
            end = ""
        yield rule
        if end:
            yield self._lark(end)

    def _lark(self, text: str) -> str:
        """A text with its markers, as a sequence."""
        out, at = [], 0
        for match in self._markers.finditer(text):
            out += [self._plain(text[at : match.start()]), f"<[{self._ids[match[0]]}]>"]
            at = match.end()
        out.append(self._plain(text[at:]))
        return " ".join(part for part in out if part != '""') or '""'

    @staticmethod
    def _plain(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _without(texts: Sequence[str]) -> str:
    """The regular expression of a text in which none of these is."""
    return "/(?s:.*)/" + "".join(
        " & ~/(?s:.*){}(?s:.*)/".format(re.escape(t).replace("/", r"\/").replace("\n", "n")) for t in texts
    )


def form_of_calls(
    syntax: Syntax,
    tools: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    required: bool,
    several: bool,
    answer: Form | None = None,
) -> Form | None:
    """What an answer with calls is held to; None: nothing.

    tools: in OpenAI's form. Arguments are held to the schemas of those that are `strict`, and to all where a
    call is required. answer: form of an answer without calls.

    Raises UsageError where a schema cannot be held to, or a call cannot be required of the model.
    """
    functions = [t["function"] for t in tools]
    strict = [required or f.get("strict") is True for f in functions]
    if answer is not None and answer.kind != "json_schema":
        raise UsageError(
            "An answer with tools can be held to a JSON schema, and to no other form.",
            "Leave out one of them.",
        )
    if not any(strict) and answer is None:
        return None
    schemas = [
        {**CLOSED, **f["parameters"]} if s else _loose(f["parameters"], syntax)
        for f, s in zip(functions, strict, strict=True)
    ]
    named = [(f["name"], _taken(s)) for f, s in zip(functions, schemas, strict=True)]
    said = None if answer is None else {**json.loads(answer.text), "x-guidance": grammar.OPTIONS}
    held = Held(syntax, named, tokenizer)
    text = held.grammar(required, several, said)
    if text is None:
        if required or answer is not None:
            raise UsageError(
                "This model writes calls in a syntax that its answers cannot be held to.",
                'Use tool_choice="auto", and no response_format beside tools.',
            )
        return None
    form = Form("lark", text, held.throughout)
    try:
        grammar.matcher(form, tokenizer)
    except UsageError as e:
        _blame(functions, schemas, tokenizer)
        raise UsageError(
            f"The tools cannot be held to: {e.what}", "Use simpler schemas, or fewer tools."
        ) from e
    return form


def _loose(parameters: Mapping[str, Any], syntax: Syntax) -> Mapping[str, Any]:
    """What arguments are held to that need not fit a schema: where names of parameters are part of the
    syntax, those of the schema, and their types.
    """
    if isinstance(syntax, (Objects, Named)) or (isinstance(syntax, Pythonic) and syntax.objects):
        return LOOSE
    types = {k: kinds_of(v) for k, v in parameters.get("properties", {}).items()}
    known = {k: {"type": sorted(t)} if t and t <= TYPES else {} for k, t in types.items()}
    return {**LOOSE, "properties": known}


def _taken(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema as llguidance takes it: exact, and with the white space that answers have."""
    return {**json.loads(of_schema(with_null(schema)).text), "x-guidance": grammar.OPTIONS}


def _blame(
    functions: Sequence[Mapping[str, Any]], schemas: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> None:
    """Raise UsageError for the tool whose schema is wrong by itself."""
    for function, schema in zip(functions, schemas, strict=True):
        try:
            grammar.matcher(of_schema(with_null(schema)), tokenizer)
        except UsageError as e:
            raise UsageError(f"The tool {function['name']}: {e.what}", e.todo) from e


def with_null(schema: Any, depth: int = 0) -> Any:
    """A schema that says `nullable` (as schemas of functions do) in words of JSON Schema."""
    if isinstance(schema, list):
        return [with_null(s, depth + 1) for s in schema]
    if not isinstance(schema, Mapping) or depth > 100:
        return schema
    out = {k: with_null(v, depth + 1) for k, v in schema.items()}
    if isinstance(out.get("nullable"), bool) and out.pop("nullable"):
        return {"anyOf": [out, {"type": "null"}]}
    return out
