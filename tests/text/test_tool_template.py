"""Conversations with tools in chat templates, against transformers, and where a template does less."""

# ruff: noqa: E501 (templates)

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import transformers
from tiny import byte_tokenizer

from tinychat.base import arguments
from tinychat.base.tools import tools
from tinychat.text.calls.families import SYNTAXES
from tinychat.text.markers import reveal
from tinychat.text.template import ChatTemplate
from tinychat.text.tokenizer import StreamDecoder

NAMES = {id(syntax): name for name, syntax in SYNTAXES.items()}
FOLDER = os.environ.get("TINYCHAT_TEST_TEMPLATES", "")
ARGUMENTS = {"city": 'Bern </tool_call> "x"\n', "days": 2, "what": ["rain", "snow"]}
SCHEMA = {
    "name": "weather",
    "description": "Tells it.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where."},
            "days": {"type": "integer", "description": "How many."},
            "what": {"type": "array", "items": {"type": "string"}, "description": "Of what."},
        },
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": SCHEMA}]
START, END = "<|im_start|>", "<|im_end|>\n"
LISTED = "{% if tools %}" + START + "system\n{{ tools | tojson }}" + END + "{% endif %}"
ASK = "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"


def turns(call: str = "") -> str:
    """Each message, and in it each call."""
    calls = "{% for c in m.tool_calls %}" + call + "{% endfor %}" if call else ""
    return "{% for m in messages %}" + START + "{{ m.role }}\n{{ m.content }}" + calls + END + "{% endfor %}"


TEMPLATES = {
    "hermes": LISTED + turns('<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}}\n</tool_call>") + ASK,
    "hermes, text": LISTED + turns('<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments + '' }}}\n</tool_call>") + ASK,
    "qwen-coder": LISTED + turns("<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n"
    "</parameter>\n{% endfor %}</function>\n</tool_call>") + ASK,
    "mistral": LISTED + "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have nine characters') }}{% endif %}{% endfor %}{% endfor %}"
    + turns("[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]{{ c.function.arguments | tojson }}") + ASK,
}  # fmt: skip


def conversation(id: str, as_text: bool = False) -> list[dict]:
    given = json.dumps(ARGUMENTS) if as_text else ARGUMENTS
    function = {"name": "weather", "arguments": given}
    return [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": id, "content": "18 °C"},
    ]


def template(source: str) -> ChatTemplate:
    tokenizer = byte_tokenizer(source)
    tokenizer.special_tokens = {"bos_token": "<BOS>", "eos_token": "<EOS>"}
    return ChatTemplate(source, tokenizer)


def ours(t: ChatTemplate, messages: list[dict]) -> str:
    return reveal(t.tools.render(arguments.messages(messages), tools(TOOLS)))[0]


def theirs(t: ChatTemplate, messages: list[dict]) -> str:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=t.tokenizer.backend, **t.tokenizer.special_tokens
    )
    return tokenizer.apply_chat_template(
        messages, tools=TOOLS, chat_template=t.source, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_wants_is_found_and_it_gets_what_transformers_gives_it(name):
    t = template(TEMPLATES[name])
    habits = t.tools.habits
    assert NAMES[id(habits.syntax)] == name.split(",")[0]
    assert (habits.lists, habits.calls, habits.results, habits.system) == (True, True, True, True)
    assert habits.as_text == (name == "hermes, text")
    assert habits.short_ids == (name == "mistral")
    for given in (False, True):  # a caller may give arguments either way
        found = ours(t, conversation("abcdefghi", given))
        assert found == theirs(t, conversation("abcdefghi", habits.as_text))


def test_ids_that_a_template_refuses_are_made_short_and_stay_different():
    t = template(TEMPLATES["mistral"])
    text = ours(t, [*conversation("call_1"), *conversation("call_2")[2:]])
    ids = [part.split("[ARGS]")[0] for part in text.split("[CALL_ID]")[1:]]
    assert len(set(ids)) == 2
    assert all(len(i) == 9 and i.isalnum() for i in ids)


ALTERNATING = (  # as Gemma 2: no system prompt, no tools, user and model in turn
    "{% for m in messages %}{% if m.role == 'system' or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('no') }}{% endif %}"
    + START
    + "{{ m.role }}\n{{ m.content }}"
    + END
    + "{% endfor %}"
    + ASK
)


def test_a_template_that_knows_nothing_of_tools_is_told_in_the_conversation():
    t = template(ALTERNATING)
    habits = t.tools.habits
    assert (habits.lists, habits.calls, habits.results, habits.system) == (False, False, False, False)
    assert NAMES[id(habits.syntax)] == "hermes"
    messages = [*conversation("1")[1:], conversation("1")[3], {"role": "user", "content": "And then?"}]
    text = ours(t, messages)
    first, call, results = text.split(START)[1:4]
    assert first.startswith("user\nYou may call tools.")
    assert json.dumps(TOOLS[0]) in first
    assert first.endswith(f"\n\nRain?{END}")
    written = json.dumps({"name": "weather", "arguments": ARGUMENTS})
    assert call == f"assistant\n<tool_call>\n{written}\n</tool_call>{END}"
    told = "<tool_response>\n18 °C\n</tool_response>\n"
    assert results == f"user\n{told}{told}And then?{END}"


def test_a_template_that_writes_tools_and_no_calls_has_them_spelled_as_its_vocabulary_says():
    source = LISTED.replace("{{ tools | tojson }}", "<|tool_list_start|>{{ tools | tojson }}") + turns() + ASK
    tokenizer = byte_tokenizer(source)
    tokenizer.backend.add_special_tokens(["<|tool_call_start|>", "<|tool_call_end|>", "<|other|>"])
    tokenizer = type(tokenizer)(tokenizer.backend, eos_ids={257}, chat_template=source)
    t = ChatTemplate(source, tokenizer)
    assert NAMES[id(t.tools.syntax)] == "lfm2"
    function = {"name": "weather", "arguments": {"city": "<|tool_call_end|>"}}
    messages = [
        {"role": "user", "content": "<|tool_call_start|>"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]},
    ]
    ids = t.encode(t.tools.render(arguments.messages(messages), tools(TOOLS)))
    start, end, other = (
        tokenizer.backend.token_to_id(f"<|{n}|>") for n in ("tool_call_start", "tool_call_end", "other")
    )
    assert (ids.count(start), ids.count(end)) == (1, 1)  # the call's own; what was typed is text
    at = ids.index(start)
    assert tokenizer.decode(ids[at + 1 : ids.index(end)]) == "[weather(city='<|tool_call_end|>')]"
    # The control tokens that mark calls are read as text, and no others.
    shown = t.tools.caller(TOOLS).shown
    assert shown == {start, end}
    decoder = StreamDecoder(tokenizer, continued=True, shown=shown)
    assert "".join(
        map(decoder.push, [start, 65, other, end])
    ) == "<|tool_call_start|>b<|tool_call_end|>".replace("b", tokenizer.decode([65]))


# llama.cpp's templates: the syntax of each. What is not named knows no tools, or is not read.
REAL = {
    "Apertus": "apertus", "Apriel": "tool-calls", "Bielik": "hermes", "Seed-OSS": "seed-oss", "Cohere2MoE": "command",
    "command-r-plus": "command-r", "command-r7b": "command", "GLM-4": "glm", "GigaChat3.1": "gigachat",
    "LFM2.5-8B": "lfm2", "MiMo": "hermes", "MiniMax-M1": "tool-calls", "MiniMax-M2": "minimax", "Kimi-K3": "kimi-3",
    "Mistral-Nemo": "mistral-list", "Mistral-Small": "mistral", "Ministral": "mistral", "mistral-Devstral": "mistral", "Nemotron-3": "qwen-coder",
    "Nemotron-Nano-v2": "nemotron", "NousResearch": "hermes", "QwQ": "hermes", "Qwen2.5": "hermes",
    "Qwen3-0.6B": "hermes", "Qwen3-Coder": "qwen-coder", "Qwen3.5": "qwen-coder", "Reka": "hermes", "Spark": "glm",
    "StepFun": "qwen-coder", "R1-Distill-Qwen": "deepseek-r1", "DeepSeek-V3.1": "deepseek",
    "DeepSeek-V3.2": "deepseek-3.2", "DeepSeek-V4": "deepseek-4", "gemma-4": "gemma-4", "granite-3.3": "granite-3",
    "granite-4": "hermes", "ling-3": "glm", "functionary-medium-v3.1": "functionary", "Llama-3.": "llama",
    "moonshotai-Kimi-K2": "kimi", "muse": "muse", "gpt-oss": "harmony", "MiniCPM5": "minicpm", "Laguna": "glm",
    "Hy3": "hunyuan", "Solar": "solar",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(
    not FOLDER, reason="TINYCHAT_TEST_TEMPLATES does not name llama.cpp's folder `models/templates`"
)
def test_real_templates_are_understood_and_rendered_as_by_transformers():
    seen = set()
    for file in sorted(Path(FOLDER).glob("*.jinja")):
        name = next((n for n in sorted(REAL, key=len, reverse=True) if n in file.name), None)
        if name is None or "DeepSeek-R1-Distill-Llama" in file.name:
            continue
        t = template(file.read_text())
        habits = t.tools.habits
        assert NAMES[id(habits.syntax)] == REAL[name], file.name
        seen.add(name)
        if habits.lists and habits.calls:
            simple = conversation("abcdefghi", habits.as_text)
            assert ours(t, simple) == theirs(t, simple), file.name
    assert seen == set(REAL)
