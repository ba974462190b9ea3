"""Conversations with tools as a chat template wants them, and the syntax in which its model calls.

Both are found out by rendering: what a template writes for an answer with a call is what its model was
trained to write. What a template does not do is done here: calls spelled in the answer's text, results as a
user's message, and the tools themselves in the system prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from tinychat.base.errors import TinychatError
from tinychat.text.calls.caller import Caller
from tinychat.text.calls.families import HERMES, SYNTAXES
from tinychat.text.calls.held import form_of_calls
from tinychat.text.calls.syntax import ID_LENGTH, Syntax
from tinychat.text.markers import CALLS, Trusted, beginning

if TYPE_CHECKING:
    from tinychat.text.response_format import Form
    from tinychat.text.tokenizer import Tokenizer

Message = dict[str, Any]
# What is said to find out: words that no template writes.
ASKED, TOLD, TOOL, RESULT, ID = "zq-asked", "zq-told", "zq_tool", "zq-result", "zq0123456"
_PARAMETERS = {
    "text": {"type": "string", "description": "A text."},
    "number": {"type": "integer", "description": "A number."},
    "list": {"type": "array", "items": {"type": "string"}, "description": "Texts."},
}
_PROBE = {
    "type": "function",
    "function": {
        "name": TOOL,
        "description": "Does it.",
        "parameters": {"type": "object", "properties": _PARAMETERS, "required": ["text"]},
    },
}
# A text with line breaks around it tells syntaxes apart; some templates cannot write one.
_ARGUMENTS = (
    {"text": "\na b\n", "number": 7, "list": ["c", "d"]},
    {"text": "a b", "number": 7, "list": ["c", "d"]},
)
PROMPT = """You may call tools. Their signatures, as JSON schemas, stand between <tools> and </tools>:
<tools>
{tools}
</tools>

To call one, write its name and its arguments in this form:
{example}
Its result comes next. Call no tool if none is needed."""
_EXAMPLE = [("the tool's name", {"an argument's name": "its value"})]


@dataclass(frozen=True)
class Habits:
    """What a template does.

    syntax      in which its model calls
    lists       it writes the tools
    calls       it writes calls of an answer; `as_text`: their arguments are to be JSON text
    results     it knows messages of the role `tool`
    system      it knows a system prompt
    short_ids   it refuses ids that have not nine letters and digits
    """

    syntax: Syntax
    lists: bool
    calls: bool
    as_text: bool
    results: bool
    system: bool
    short_ids: bool


class Template(Protocol):
    """What is needed of a `ChatTemplate`."""

    source: str
    tokenizer: Tokenizer

    def render(self, messages: list[Message], add_generation_prompt: bool = True, **extra: Any) -> str: ...

    def guard(self, value: Any, spoken: bool = False) -> Any: ...


class ToolTemplate:
    """A chat template for conversations with tools."""

    def __init__(self, template: Template):
        self._template = template

    @property
    def syntax(self) -> Syntax:
        """How the model writes calls."""
        return self.habits.syntax

    def caller(self, tools: Sequence[Mapping[str, Any]], most: int | None = None) -> Caller:
        """Finds calls in what the model writes. tools: in OpenAI's form. most: of calls in one answer."""
        functions = [t["function"] for t in tools]
        parameters = {f["name"]: f.get("parameters", {}) for f in functions}
        return Caller(self.syntax, parameters, self._shown, most)

    def form(
        self, tools: Sequence[Mapping[str, Any]], required: bool, several: bool, answer: Form | None
    ) -> Form | None:
        """What an answer with these tools is held to (`held.form_of_calls`)."""
        return form_of_calls(self.syntax, tools, self._template.tokenizer, required, several, answer)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """A conversation's text, as `ChatTemplate.render` gives it. tools: in OpenAI's form."""
        out = self._with_calls(messages)
        if tools and self.habits.lists:
            extra["tools"] = [_without_strict(t) for t in tools]
        elif tools:
            out = self._with_prompt(out, tools)
        return self._template.render(out, add_generation_prompt, **extra)

    def renderings(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        prompt: str,
        written: str,
        whole: bool = False,
    ) -> Iterator[str]:
        """How what a model wrote behind `prompt`, with calls, stands in the text of the conversation that
        goes on with it: the last of these messages. None where the template leaves some of it out.

        whole: the message says all that was written, so that the template's text stands for it, although that
        has other spaces or another order.
        """
        try:
            text = self.render(messages, tools, False)
        except TinychatError:
            return
        if not text.startswith(prompt):
            return
        behind, end = text[len(prompt) :], self._answers_end
        thought = self._template.guard(messages[-1].get("reasoning_content") or "", spoken=True).strip()
        if (form := beginning(behind, written)) is not None:
            yield form
        elif whole and end and behind.endswith(end) and thought in behind:
            yield behind.removesuffix(end)

    @cached_property
    def _answers_end(self) -> str:
        """What the template writes behind an answer; nothing where that is not known."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!answer!"}]
        try:
            return self._template.render(messages, False).rpartition("!answer!")[2]
        except TinychatError:
            return ""

    @cached_property
    def _shown(self) -> frozenset[int]:
        """Control tokens that mark calls."""
        t = self._template.tokenizer
        marks = self.syntax.marks
        return frozenset(
            i
            for i, text in t.markers.items()
            if i in t.silent_ids and i not in t.eos_ids and any(text in mark for mark in marks)
        )

    # What the template does not write

    def _with_calls(self, messages: Sequence[Message]) -> list[Message]:
        names: dict[str, str] = {}
        out: list[Message] = []
        for given in messages:
            m = dict(given)
            if m["role"] == "developer" and "developer" not in self._template.source:
                m["role"] = "system"
            if calls := m.get(CALLS):
                names.update({c["id"]: c["function"]["name"] for c in calls if "id" in c})
                m = self._calling(m, calls)
            elif m["role"] == "tool":
                known = names.get(m.get("tool_call_id", ""), m.get("name"))
                m = self._result(m, known, out)
            elif m["role"] == "user" and out and out[-1].get("results") and not self.habits.results:
                m["content"] = Trusted(f"{out.pop()['content']}\n{self._template.guard(m['content'])}")
            out.append(m)
        for m in out:
            m.pop("results", None)
        return out

    def _calling(self, m: Message, calls: Sequence[Mapping[str, Any]]) -> Message:
        read = [(c, c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]
        if self.habits.calls:
            m[CALLS] = [
                {
                    **({"id": self._id(c["id"])} if "id" in c else {}),
                    "type": "function",
                    "function": {"name": n, "arguments": json.dumps(a, ensure_ascii=False)}
                    if self.habits.as_text
                    else {"name": n, "arguments": a},
                }
                for c, n, a in read
            ]
            return m
        guard = self._template.guard
        content = guard(m["content"], spoken=True)
        spelled = self.syntax.spell([(guard(n), guard(a)) for _, n, a in read])
        del m[CALLS]
        return {**m, "content": Trusted(f"{content}\n{spelled}" if content else spelled)}

    def _result(self, m: Message, name: str | None, before: list[Message]) -> Message:
        if self.habits.results:
            if "tool_call_id" in m:
                m["tool_call_id"] = self._id(m["tool_call_id"])
            return {**m, "name": name} if name is not None else m
        text = f"<tool_response>\n{self._template.guard(m['content'])}\n</tool_response>"
        if before and before[-1].get("results"):
            text = f"{before.pop()['content']}\n{text}"
        return {"role": "user", "content": Trusted(text), "results": True}

    def _id(self, given: str) -> str:
        """The id as the template takes it."""
        if not self.habits.short_ids or (len(given) == ID_LENGTH and given.isalnum()):
            return given
        import hashlib

        return hashlib.sha256(given.encode("utf-8", "replace")).hexdigest()[:ID_LENGTH]

    def _with_prompt(self, messages: list[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The tools said in the system prompt, or before what the user says first."""
        guard = self._template.guard
        listed = "\n".join(json.dumps(guard(_without_strict(t)), ensure_ascii=False) for t in tools)
        example = self.syntax.spell(_EXAMPLE)
        prompt = PROMPT.replace("{example}", example).replace("{tools}", listed)
        role = "system" if self.habits.system else "user"
        at = next((i for i, m in enumerate(messages) if m["role"] == role), None)
        if at is None or (role == "system" and at > 0):
            return [{"role": role, "content": Trusted(prompt)}, *messages]
        m = messages[at]
        said = m["content"] if isinstance(m["content"], Trusted) else guard(m["content"])
        text = f"{said}\n\n{prompt}" if role == "system" else f"{prompt}\n\n{said}"
        return [*messages[:at], {**m, "content": Trusted(text)}, *messages[at + 1 :]]

    # Finding out

    @cached_property
    def habits(self) -> Habits:
        """What the template does, found out when it is first needed."""
        user = {"role": "user", "content": ASKED}
        listed = self._try([user], True) or ""
        lists = TOOL in listed
        syntax, as_text, arguments = self._find()
        calls = syntax is not None
        if syntax is None:
            syntax = self._mentioned(listed) if lists else HERMES

        def told(id: str) -> list[Message]:
            if not calls:
                return [{"role": "assistant", "content": TOLD}]
            return [_calling(id, json.dumps(arguments) if as_text else arguments)]

        def answered(id: str) -> bool:
            result = {"role": "tool", "content": RESULT, "tool_call_id": id, "name": TOOL}
            return RESULT in (self._try([user, *told(id), result], False) or "")

        system = self._try([{"role": "system", "content": TOLD}, user], False)
        results = answered(ID)
        return Habits(
            syntax,
            lists,
            calls,
            as_text,
            results,
            TOLD in (system or ""),
            results and not answered("call_" + ID),
        )

    def _find(self) -> tuple[Syntax | None, bool, dict[str, Any]]:
        """The syntax that reads what the template writes, and leaves least of it; whether it wants arguments
        as text; the arguments that were given.
        """
        for arguments in _ARGUMENTS:
            for as_text in (False, True):
                given = json.dumps(arguments) if as_text else arguments
                text = self._try([{"role": "user", "content": ASKED}, _calling(ID, given)], False)
                if text is None or TOOL not in text.rpartition(ASKED)[2]:
                    continue
                left = {
                    name: n
                    for name, syntax in SYNTAXES.items()
                    if (n := _left(syntax, text.rpartition(ASKED)[2], arguments)) is not None
                }
                if left:
                    return SYNTAXES[min(left, key=lambda name: left[name])], as_text, arguments
        return None, False, {}

    def _mentioned(self, listed: str) -> Syntax:
        """The syntax whose marker the prompt has, or the vocabulary as a control token."""
        vocabulary = set(self._template.tokenizer.markers.values())
        tests: list[Callable[[str], bool]] = [
            lambda mark: mark in listed, lambda mark: mark in vocabulary and mark in self._template.source,
            vocabulary.__contains__,
        ]  # fmt: skip
        for test in tests:
            for syntax in SYNTAXES.values():
                if any(test(mark) for mark in syntax.opens):
                    return syntax
        return HERMES

    def _try(self, messages: list[Message], generating: bool) -> str | None:
        try:
            return self._template.render(messages, generating, tools=[_PROBE])
        except TinychatError:
            return None


def _calling(id: str, arguments: Any) -> Message:
    function = {"name": TOOL, "arguments": arguments}
    return {"role": "assistant", "content": "", CALLS: [{"id": id, "type": "function", "function": function}]}


def _left(syntax: Syntax, text: str, arguments: dict[str, Any]) -> int | None:
    """Characters that a syntax leaves of a text in which it finds exactly this call; None if it does not."""
    caller = Caller(syntax, {TOOL: {"type": "object", "properties": _PARAMETERS}})
    parts = [*caller.push(text), *caller.flush()]
    calls = caller.calls
    if len(calls) != 1 or calls[0].name != TOOL or json.loads(calls[0].arguments) != arguments:
        return None
    return sum(len(p.text) for p in parts if not p.called)


def _without_strict(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as templates show it: `strict` is not the model's business."""
    return {**tool, "function": {k: v for k, v in tool["function"].items() if k != "strict"}}
