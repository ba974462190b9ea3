"""Who writes calls how. A family's syntax is found by what its chat template writes (`ToolTemplate`)."""

from __future__ import annotations

from tinychat.text.calls.gemma import Gemma
from tinychat.text.calls.named import Named
from tinychat.text.calls.objects import Objects
from tinychat.text.calls.pythonic import Pythonic
from tinychat.text.calls.syntax import Syntax
from tinychat.text.calls.tagged import Tagged

HERMES = Objects(("<tool_call>",), ("</tool_call>",))  # also Qwen2.5 and Qwen3, Granite 4, Bielik, MiMo, Reka
NAME = r"(?P<name>[^\s<>\[\]{}|｜]+)"
KIMI_NAME = r"(?P<name>[^\s<>:|]+)"


def _xml(section: str, lines: bool = True) -> Tagged:
    return Tagged(
        "<function=", (">",), "<parameter=", (">",), "</parameter>", "</function>",
        (f"<{section}>", f"</{section}>"), lines=lines,
    )  # fmt: skip


def _invoke(prefix: str, section: str, typed: str = "") -> Tagged:
    return Tagged(
        f'<{prefix}invoke name="', ('"',), f'<{prefix}parameter name="', ('"',), f"</{prefix}parameter>",
        f"</{prefix}invoke>", (f"<{section}>", f"</{section}>"), head_end=">", tag_end=">", typed=typed,
    )  # fmt: skip


def _arg_keys(suffix: str = "", separator: str = "") -> Tagged:
    section = (f"<tool_calls{suffix}>", f"</tool_calls{suffix}>") if suffix else ("", "")
    return Tagged(
        f"<tool_call{suffix}>", (separator or "\n",), f"<arg_key{suffix}>", (f"</arg_key{suffix}>",),
        f"</arg_value{suffix}>", f"</tool_call{suffix}>", section, between=f"<arg_value{suffix}>",
    )  # fmt: skip


# The first that reads what a template writes is a model's; a bare one reads most, and is the last.
SYNTAXES: dict[str, Syntax] = {
    "hermes": HERMES,
    "qwen-coder": _xml("tool_call"),  # also Qwen3.5, Nemotron 3, Step 3.5
    "seed-oss": _xml("seed:tool_call", lines=False),
    "glm": _arg_keys(),  # also Laguna, Ling, Spark
    "hunyuan": _arg_keys(":opensource", "<tool_sep:opensource>"),
    "mistral-list": Objects(("[TOOL_CALLS]",), listed=True),  # before 2025
    "mistral": Named(
        ("[TOOL_CALLS]",), rf"\[TOOL_CALLS\]{NAME}(\[CALL_ID\][^\[\]]*)?(\[ARGS\])?\s*",
        objects=True, parts=("[CALL_ID]",), pattern="[TOOL_CALLS]{name}[ARGS]{arguments}",
    ),
    "deepseek-r1": Named(
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        rf"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{NAME}\s*(```json)?\s*",
        ("```<｜tool▁call▁end｜>", "<｜tool▁call▁end｜>"),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        pattern="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
    ),
    "deepseek": Named(
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        rf"<｜tool▁call▁begin｜>(function<｜tool▁sep｜>)?{NAME}(<｜tool▁sep｜>)?\s*(```json)?\s*",
        ("```<｜tool▁call▁end｜>", "<｜tool▁call▁end｜>"),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        pattern="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
    ),
    "deepseek-3.2": _invoke("｜DSML｜", "｜DSML｜function_calls", 'string="true"'),
    "deepseek-4": _invoke("｜DSML｜", "｜DSML｜tool_calls", 'string="true"'),
    "kimi": Named(
        ("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
        rf"<\|tool_call_begin\|>\s*(functions\.)?{KIMI_NAME}(:\d+)?\s*<\|tool_call_argument_begin\|>\s*",
        ("<|tool_call_end|>",),
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        pattern="<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
    ),
    "harmony": Named(
        ("<|start|>", "<|channel|>", " to=functions."),
        rf"[^{{}}]*?\bto=functions\.{NAME}[^{{}}]*<\|message\|>",
        ("<|call|>", "<|end|>"),
        ends="<|message|>",
        pattern=" to=functions.{name}<|channel|>commentary json<|message|>{arguments}",
    ),
    "gemma-4": Gemma(("<|tool_call>",), ("<tool_call|>",), '<|"|>'),
    "functiongemma": Gemma(("<start_function_call>",), ("<end_function_call>",), "<escape>"),
    "minimax": _invoke("", "minimax:tool_call"),
    "muse": _invoke("atem:", "atem:function_calls"),
    "minicpm": Tagged(
        '<function name="', ('"',), '<param name="', ('"',), "</param>", "</function>",
        head_end=">", tag_end=">", wrapped=("<![CDATA[", "]]>"),
    ),
    "kimi-3": Tagged(
        '<|open|>call tool="', ('"',), '<|open|>argument key="', ('"',), "<|close|>argument<|sep|>",
        "<|close|>call<|sep|>", ("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
        head_end="<|sep|>", tag_end="<|sep|>", typed='type="string"',
    ),
    "lfm2": Pythonic(("<|tool_call_start|>",), ("<|tool_call_end|>",), objects=True),
    "olmo": Pythonic(("<function_calls>",), ("</function_calls>",), listed=False),
    "granite-3": Objects(
        ("<|tool_call|>", "<tool_call>"), ("", "<|/tool_call|>", "</tool_call>"), listed=True
    ),
    "command": Objects(
        ("<|START_ACTION|>",), ("<|END_ACTION|>",), listed=True, keys=("tool_name", "parameters")
    ),
    "command-r": Objects(
        ("Action:\n```json", "Action: ```json"), ("```",), listed=True, keys=("tool_name", "parameters")
    ),
    "apertus": Objects(("<|tools_prefix|>",), ("<|tools_suffix|>",), listed=True, by_name=True),
    "nemotron": Objects(("<TOOLCALL>",), ("</TOOLCALL>",), listed=True),
    "tool-calls": Objects(("<tool_calls>",), ("</tool_calls>",), listed=True),  # Apriel, MiniMax-M1
    "gigachat": Objects(("<|function_call|>",)),
    "functionary": Named(("<function=",), rf"<function={NAME}>\s*", ("</function>",),
                         pattern="<function={name}>{arguments}</function>"),
    "solar": Named(
        ("<|tool_calls|>", "<|tool_call:begin|>"),
        rf"<\|tool_call:begin\|>[^<>{{}}]*<\|tool_call:name\|>{NAME}<\|tool_call:args\|>\s*",
        ("<|tool_call:end|>",),
        ("<|tool_calls|>", ""),
        pattern="<|tool_call:begin|>call<|tool_call:name|>{name}<|tool_call:args|>{arguments}<|tool_call:end|>",
    ),
    "llama": Pythonic(("<|python_tag|>",), objects=True, bare=True),  # JSON, or Python in a list
}  # fmt: skip
