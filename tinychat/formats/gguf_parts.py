"""Models in several GGUF files, as llama.cpp's gguf-split leaves them: NAME-00001-of-00003.gguf and so on.

The first part has the metadata of the model. Every part has tensors of its own, and says which part of how
many it is, and how many tensors there are in all.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from tinychat.base.errors import CheckpointError
from tinychat.base.files import MappedFile
from tinychat.formats.gguf_file import GGUFFile

_NAME = re.compile(r"(?P<model>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def model_of(name: str) -> str | None:
    """Name of the model that a file is a part of, as its name says; None for a whole file."""
    match = _NAME.fullmatch(name)
    return match["model"] if match else None


def names(name: str) -> list[str]:
    """Names of all parts of the model that a file is a part of, in their order; of a whole file its own."""
    match = _NAME.fullmatch(name)
    if match is None or match["count"] == "00000":
        return [name]
    return [f"{match['model']}-{i + 1:05}-of-{match['count']}.gguf" for i in range(int(match["count"]))]


def paths(path: Path) -> list[Path]:
    """Paths of all parts of the model that a file is a part of; of a whole file its own.

    Raises CheckpointError where one is missing.
    """
    found = [path.with_name(name) for name in names(path.name)]
    missing = [p.name for p in found if not p.exists()]
    if missing and len(found) > 1:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path.name} is one of {len(found)} parts, and {missing[0]} is missing{more}.",
            f"All parts belong into the folder {path.parent}; download what is missing.",
        )
    return found


def open_parts(path: Path) -> tuple[GGUFFile, list[MappedFile]]:
    """The file, and itself; for any part of a model the first part with the tensors of all, and all files.

    Raises CheckpointError for parts that are missing or do not belong together, and what `GGUFFile` raises.
    """
    given = GGUFFile(path)
    count = _said(given, "count", 1)
    if count <= 1:
        return given, [given.mapped]
    if len(names(path.name)) != count:
        number = _said(given, "no") + 1
        raise CheckpointError(
            f"{path} is part {number} of {count}, and its name does not say so.",
            f"Give it the name that it had: it ends in -{number:05}-of-{count:05}.gguf.",
        )
    parts = [given if p.name == path.name else GGUFFile(p) for p in paths(path)]
    _join(parts)
    return parts[0], [part.mapped for part in parts]


def _join(parts: list[GGUFFile]) -> None:
    """Give the first part the tensors of all. Raises CheckpointError for parts of different models."""
    first = parts[0]
    where: dict[str, GGUFFile] = {}
    total, kind = _said(first, "tensors.count"), first.fields.get("general.architecture")
    for i, part in enumerate(parts):
        number, count = _said(part, "no") + 1, _said(part, "count", 1)
        if (number, count) != (i + 1, len(parts)):
            raise _strange(part, f"says that it is part {number} of {count}")
        if _said(part, "tensors.count") != total or part.fields.get("general.architecture", kind) != kind:
            raise _strange(part, f"belongs to another model than {first.path.name}")
        for name in part.tensors:
            other = where.setdefault(name, part)
            if other is not part:
                raise _strange(part, f"has the tensor {name!r}, which {other.path.name} has too")
    if len(where) != total:
        raise _strange(first, f"and the other parts have {len(where)} tensors instead of {total}")
    first.tensors = {name: part.tensors[name] for name, part in where.items()}


def _strange(part: GGUFFile, what: str) -> CheckpointError:
    return CheckpointError(f"{part.path} {what}.", "Download all parts of the model again, from one place.")


def _said(part: GGUFFile, key: str, default: int | None = None) -> int:
    """A number about the parts out of a file's metadata."""
    value = part.fields.get(f"split.{key}", default)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 1 << 31:
        raise part.damaged(f"the field split.{key} is no count")
    return int(value)
