"""Agents: programs that come back with the whole conversation, and what the server reads of it each time."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tinychat.engine import step
from tinychat.engine.memory.branch import common_prefix

# As templates of reasoning models do it: tools behind the system prompt, results as a user's, and of thoughts
# those alone that came after the last question.
THINKING = """{%- set asked = namespace(last=-1) -%}
{%- for m in messages if m.role == "user" %}{% set asked.last = messages.index(m) %}{% endfor -%}
{%- for m in messages -%}
<|im_start|>{{ "user" if m.role == "tool" else m.role }}
{% if m.role == "assistant" -%}
{%- if m.reasoning_content and loop.index0 > asked.last -%}
<think>
{{ m.reasoning_content }}
</think>

{% endif -%}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor -%}
{%- elif m.role == "tool" -%}
<tool_response>
{{ m.content }}
</tool_response>
{%- else -%}
{{ m.content }}
{%- endif -%}
{%- if loop.first and tools %}
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>{% endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


def words(n: int) -> str:
    """So many characters of real text."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    text = "\n".join(path.read_text() for path in sorted(docs.glob("*.md")))
    return text[:n]


def tools(n: int) -> list[dict[str, Any]]:
    """So many tools, as OpenAI's API has them."""
    text = {"type": "string", "description": "A path, from the folder of the project on."}
    parameters = {"type": "object", "properties": {"path": text, "n": {"type": "integer"}}, "required": ["n"]}
    about = "Looks at a file of the project, and says what is there."
    return [
        {
            "type": "function",
            "function": {"name": f"look_{i}", "description": about, "parameters": parameters},
        }
        for i in range(n)
    ]


def call(i: int, thought: str = "") -> str:
    """What the model writes in turn i. Its JSON has other spaces and another order than a template's."""
    head = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    arguments = f'{{"path":  "src/é{i}.py", "n": {i}}}'
    called = f'{{"arguments":{arguments} , "name": "look_0"}}'
    return f"{head}I look at no. {i}.\n<tool_call>\n{called}\n</tool_call>"


@dataclass
class Turn:
    """What a turn took, in tokens.

    prompt, made   of the prompt, and of the answer
    read           of the prompt, as the usage says; `computed`: as the engine did
    known          of the prompt that some prompt and its answer had in common with it before
    """

    prompt: int
    made: int
    read: int
    computed: int
    known: int


@dataclass
class Agent:
    """One that calls a tool in each turn. send: a request's path and body, to its answer.

    thinks: it sends back what was thought
    """

    send: Callable[[str, dict[str, Any]], Any]
    speaks: str
    system: str
    tools: list[dict[str, Any]]
    thinks: bool = True
    messages: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """The user says something."""
        self.messages.append({"role": "user", "content": text})

    def turn(self) -> tuple[int, int, int]:
        """One answer, and the result of its call; tokens of the prompt, that were read, of the answer."""
        return self._openai() if self.speaks == "openai" else self._anthropic()

    def _openai(self) -> tuple[int, int, int]:
        system = {"role": "system", "content": self.system}
        body = {"model": "tiny", "messages": [system, *self.messages], "tools": self.tools, "max_tokens": 400}
        said = self.send("chat/completions", body)
        message = {k: v for k, v in said["choices"][0]["message"].items() if v is not None}
        if not self.thinks:
            message.pop("reasoning_content", None)
        (asked,) = message["tool_calls"]
        result = {
            "role": "tool",
            "tool_call_id": asked["id"],
            "content": self._result(asked["function"]["arguments"]),
        }
        self.messages += [message, result]
        used = said["usage"]
        read = used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"]
        return used["prompt_tokens"], read, used["completion_tokens"]

    def _anthropic(self) -> tuple[int, int, int]:
        known = [{"name": t["function"]["name"], "description": t["function"]["description"],
                  "input_schema": t["function"]["parameters"]} for t in self.tools]  # fmt: skip
        body = {"model": "tiny", "system": self.system, "messages": self.messages, "tools": known}
        said = self.send("messages", {**body, "max_tokens": 400})
        content = [b for b in said["content"] if self.thinks or b["type"] != "thinking"]
        (asked,) = (b for b in content if b["type"] == "tool_use")
        result = {
            "type": "tool_result",
            "tool_use_id": asked["id"],
            "content": self._result(json.dumps(asked["input"])),
        }
        self.messages += [{"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
        used = said["usage"]
        return (
            used["input_tokens"] + used["cache_read_input_tokens"],
            used["input_tokens"],
            used["output_tokens"],
        )

    @staticmethod
    def _result(arguments: str) -> str:
        return f"Of {json.loads(arguments)['path']}: " + "a line of it; " * (json.loads(arguments)["n"] % 5)


class Watch:
    """What the engine computes of prompts, and what it could have known."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.computed = self.known = 0
        self._seen: list[array] = []
        outputs = step._outputs

        def counted(backend, parts):
            self.computed += sum(part.n for part in parts if part.rows.prompt)
            return outputs(backend, parts)

        monkeypatch.setattr(step, "_outputs", counted)

    def at(self, model) -> None:
        """Look at this one, which is being served."""
        shelf = model.shelf
        take, put = shelf.take, shelf.put

        def took(ids):
            self.known = max((common_prefix(seen, array("i", ids)) for seen in self._seen), default=0)
            return take(ids)

        def was_put(branch, texts=()):
            self._seen.append(branch.ids[:])
            put(branch, texts)

        shelf.take, shelf.put = took, was_put

    def turn(self, agent: Agent) -> Turn:
        """A turn, with what it took."""
        self.computed = 0
        prompt, read, made = agent.turn()
        return Turn(prompt, made, read, self.computed, self.known)
