"""Chat templates where checkpoints keep them, against transformers reading the same folder."""

from __future__ import annotations

import json

import pytest
import transformers
from tiny import TEMPLATE, byte_tokenizer

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.hub.huggingface import choose_files
from tinychat.text.chat_templates import from_gguf
from tinychat.text.template import ChatTemplate
from tinychat.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
DEFAULT, TOOL_USE, RAG = (
    name + "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | length if tools else 0 }}"
    for name in ("D", "T", "R")
)
NAMED = [{"name": "rag", "template": RAG}, {"name": "default", "template": DEFAULT}]
FOLDERS = {
    "one in the settings": {"tokenizer_config.json": {"chat_template": DEFAULT}},
    "two by name": {"tokenizer_config.json": {"chat_template": NAMED}},
    "three by name": {
        "tokenizer_config.json": {"chat_template": [*NAMED, {"name": "tool_use", "template": TOOL_USE}]}
    },
    "a file": {"chat_template.jinja": DEFAULT, "tokenizer_config.json": {"chat_template": "old"}},
    "files": {
        "chat_template.jinja": DEFAULT,
        "additional_chat_templates/tool_use.jinja": TOOL_USE,
        "additional_chat_templates/rag.jinja": RAG,
        "tokenizer_config.json": {"chat_template": [{"name": "default", "template": "old"}]},
    },
}


def write(folder, files):
    tokenizer = byte_tokenizer(None)
    tokenizer.save(folder)
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps({**json.loads(file.read_text()), **content} if file.exists() else content)
        file.write_text(content)
    return folder


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", FOLDERS)
def test_the_template_that_transformers_chooses_is_chosen(name, tools, tmp_path):
    folder = write(tmp_path, FOLDERS[name])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_hf(folder)
    expected = theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
    template = ChatTemplate(ours.chat_template, ours)
    assert template.render(MESSAGES, False, tools=tools) == expected
    again = tmp_path / "again"
    again.mkdir()
    ours.save(again)
    saved = transformers.AutoTokenizer.from_pretrained(again)
    assert saved.apply_chat_template(MESSAGES, tools=tools, tokenize=False) == expected


def test_the_settings_of_a_processor_are_the_last_place(tmp_path):
    folder = write(tmp_path, {"chat_template.json": {"chat_template": DEFAULT}})
    assert Tokenizer.from_hf(folder).chat_template == DEFAULT
    write(tmp_path, {"tokenizer_config.json": {"chat_template": TOOL_USE}})
    assert Tokenizer.from_hf(folder).chat_template == TOOL_USE


def test_several_templates_without_a_default_are_refused_by_name(tmp_path):
    named = [{"name": "rag", "template": RAG}, {"name": "tool_use", "template": TOOL_USE}]
    folder = write(tmp_path, {"tokenizer_config.json": {"chat_template": named}})
    with pytest.raises(UnsupportedModelError, match="rag, tool_use"):
        Tokenizer.from_hf(folder)
    named[0]["name"] = "default"  # as it says
    write(folder, {"tokenizer_config.json": {"chat_template": named}})
    assert Tokenizer.from_hf(folder).chat_templates == {"default": RAG, "tool_use": TOOL_USE}


@pytest.mark.parametrize("value", [
    [], {}, 3, True, [3], [{"name": "default"}], [{"name": None, "template": "x"}], [{"name": {}}], {"a": 1},
    {"default": ["x"]}, "", [[]], [{"name": "x", "template": None}],
], ids=repr)  # fmt: skip
def test_what_is_no_template_is_none(value, tmp_path):
    folder = write(tmp_path, {"tokenizer_config.json": {"chat_template": value}})
    assert Tokenizer.from_hf(folder).chat_template is None


def test_a_template_file_that_is_no_text_is_refused(tmp_path):
    folder = write(tmp_path, {})
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_hf(folder)


def test_a_gguf_has_named_templates_too():
    fields = {"tokenizer.chat_template": DEFAULT, "tokenizer.chat_template.tool_use": TOOL_USE,
              "tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.rag": 3}  # fmt: skip
    assert from_gguf(fields) == {"default": DEFAULT, "tool_use": TOOL_USE}
    assert from_gguf({"tokenizer.chat_template": [1]}) == from_gguf({}) == {}


def test_a_broken_template_for_tools_is_said_when_the_model_is_loaded():
    tokenizer = byte_tokenizer(TEMPLATE)
    tokenizer.chat_templates["tool_use"] = "{% if %}"
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate(TEMPLATE, tokenizer)


def test_additional_templates_are_downloaded():
    wanted = ["config.json", "model.safetensors", "chat_template.jinja"]
    wanted += ["additional_chat_templates/tool_use.jinja"]
    others = ["additional_chat_templates/x.bin", "additional_chat_templates/a/b.jinja", "onnx/model.onnx"]
    assert choose_files("a/b", [*wanted, *others]) == sorted(wanted)


READING = {
    "reasoning_content": "{% for m in messages %}{{ m.reasoning_content or '-' }};{% endfor %}",
    "thinking": "{% for m in messages %}{{ m['thinking'] if 'thinking' in m else '-' }};{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.get('reasoning', '-') }}|{{ m.content }};{% endfor %}",
    "all": "{% for m in messages %}{{ m | tojson(sort_keys=true) }}{% endfor %}",
}


@pytest.mark.parametrize("given", ["reasoning_content", "thinking", "reasoning", "two", "none", "empty"])
@pytest.mark.parametrize("read", READING)
def test_reasoning_reaches_templates_under_the_names_that_transformers_gives_it(read, given):
    more = {
        "two": {"thinking": "first", "reasoning": "second"},
        "none": {"reasoning_content": None},
        "empty": {"reasoning": ""},
    }.get(given, {given: "hm"})
    messages = [*MESSAGES, {"role": "assistant", "content": "yes", **more}]
    tokenizer = byte_tokenizer(READING[read])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    expected = theirs.apply_chat_template(messages, chat_template=READING[read], tokenize=False)
    assert ChatTemplate(READING[read], tokenizer).render(messages, False) == expected
