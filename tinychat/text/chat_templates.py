"""Places of chat templates in checkpoints: one, or several by name, as transformers looks for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.base.files import read_text

DEFAULT, TOOLS = "default", "tool_use"  # used when a conversation has no tools, and when it has
FOLDER = "additional_chat_templates"
MAX_NAMED = 64


def from_folder(folder: Path, config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a Hugging Face folder by name; none for a base model.

    Files of their own (chat_template.jinja, additional_chat_templates/NAME.jinja) go before what
    tokenizer_config.json (`config`) holds, and that before chat_template.json (`processor`).
    Raises UnsupportedModelError where several have names and none is the default.
    """
    files = {DEFAULT: folder / "chat_template.jinja"}
    if (folder / FOLDER).is_dir():
        files |= {f.stem: f for f in sorted((folder / FOLDER).glob("*.jinja"))[:MAX_NAMED]}
    found = {name: _read(file) for name, file in files.items() if file.is_file()}
    for settings in (config, processor):
        found = found or _named(settings.get("chat_template"))
    return _with_default(found, str(folder))


def from_gguf(fields: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a GGUF by name: its fields tokenizer.chat_template, tokenizer.chat_template.NAME."""
    found: dict[str, str] = {}
    for key, value in fields.items():
        match = re.fullmatch(r"tokenizer\.chat_template(?:\.(.+))?", key)
        if match and isinstance(value, str) and value and len(found) <= MAX_NAMED:
            found[match[1] or DEFAULT] = value
    return _with_default(found, "The file")


def to_config(templates: Mapping[str, str]) -> str | list[dict[str, str]]:
    """Entry for tokenizer_config.json."""
    if list(templates) == [DEFAULT]:
        return templates[DEFAULT]
    return [{"name": name, "template": template} for name, template in templates.items()]


def _named(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        value = {DEFAULT: value}
    if isinstance(value, list):
        named = (t for t in value if isinstance(t, dict) and isinstance(t.get("name"), str))
        value = {t["name"]: t.get("template") for t in named}
    if not isinstance(value, dict):
        return {}
    pairs = [(k, v) for k, v in value.items() if isinstance(k, str) and isinstance(v, str) and v]
    return dict(pairs[:MAX_NAMED])


def _with_default(found: dict[str, str], where: str) -> dict[str, str]:
    if found and DEFAULT not in found:
        if len(found) > 1:
            raise UnsupportedModelError(
                f"{where} has several chat templates ({', '.join(sorted(found))}) and none is the default.",
                f'Give the one for plain conversations the name "{DEFAULT}".',
            )
        found = {DEFAULT: next(iter(found.values()))} | found
    return found


def _read(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise CheckpointError(f"{file} cannot be read: {reason}.", "Pull the model again.") from e
