"""Damaged GGUF files and folders, loaded and spoken with: headers, types of metadata, tensors, settings."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import JUNK, damage_blocks, damage_bytes, damage_file, damage_json, sound_models
from fuzz.harness import Case, first_seed, minutes, run
from raw_gguf import ARRAY, SCALARS, STRING, Raw

import tinychat
import tinychat.backends.cpu
import tinychat.formats.gguf
import tinychat.formats.hf
import tinychat.hub.store
import tinychat.loading

SETTINGS = [
    "config.json", "config.json", "generation_config.json", "quantize_config.json", "quant_config.json",
    "tokenizer_config.json", "model.safetensors.index.json",
]  # fmt: skip
TEXTS = ["", "x", "\0", "\ufffd", "▁", "<|im_start|>", "é" * 3, "a" * 200, "b" * 200_000, "\u202e\x1b]0;x\a"]


def pick(rng: np.random.Generator, items: list) -> Any:
    """One of them, as it is: `rng.choice` would make floats of large integers."""
    return items[int(rng.integers(len(items)))]


def junk(rng: np.random.Generator) -> tuple[int, Any]:
    """A value of any type."""
    kind = pick(rng, [*SCALARS, STRING, STRING, ARRAY, ARRAY])
    if kind == STRING:
        return kind, TEXTS[rng.integers(len(TEXTS))]
    if kind == ARRAY:
        item = pick(rng, [4, 5, 6, 7, 12, STRING])
        n = pick(rng, [0, 1, 2, 7, 300, 5000])
        return kind, (item, [scalar(rng, item) for _ in range(n)])
    return kind, scalar(rng, kind)


def scalar(rng: np.random.Generator, kind: int) -> Any:
    if kind == STRING:
        return TEXTS[rng.integers(len(TEXTS) - 2)]
    code = SCALARS[kind]
    if code == "?":
        return bool(rng.integers(2))
    if code in "fd":
        return pick(rng, [0.0, -0.0, 1.0, -1.0, 0.5, 1e30, -1e30, 1e-30, np.inf, np.nan])
    bits = 8 * struct.calcsize(code)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if code.islower() else (0, (1 << bits) - 1)
    value = [0, 1, 2, 3, 7, 64, 257, 258, 1 << 20, low, high, -1][rng.integers(12)]
    return min(max(value, low), high)


def damage_list(rng: np.random.Generator, items: list) -> list:
    """Entries of a list replaced, repeated, left out or added."""
    items = list(items)
    for _ in range(rng.integers(1, 5)):
        at, what = int(rng.integers(len(items) + 1)), rng.integers(5)
        if what == 0 or not items:
            items.insert(
                at, TEXTS[rng.integers(len(TEXTS))] if not items or isinstance(items[0], str) else -1
            )
        elif what == 1:
            del items[at : at + int(rng.integers(1, 100))]
        elif what == 2:
            items[at % len(items)] = items[int(rng.integers(len(items)))]
        elif what == 3 and isinstance(items[0], str):
            items[at % len(items)] = TEXTS[rng.integers(len(TEXTS))]
        else:
            items = items + items[: int(rng.integers(3000))]
    return items


def damage_gguf(rng: np.random.Generator, raw: Raw) -> None:
    """One thing that is wrong, or some."""
    for _ in range(pick(rng, [1, 1, 1, 2, 3])):
        what, i = rng.integers(10), int(rng.integers(max(1, len(raw.fields))))
        t = raw.tensors[int(rng.integers(len(raw.tensors)))] if raw.tensors else ["x", [1], 0, 0]
        lists = [n for n, (_, kind, v) in enumerate(raw.fields) if kind == ARRAY and v[1]]
        if what < 3 and raw.fields:
            raw.fields[i] = (raw.fields[i][0], *junk(rng))
        elif what == 3 and raw.fields:
            raw.fields.pop(i)
        elif what == 4 and lists:
            n = lists[int(rng.integers(len(lists)))]
            key, kind, (item, items) = raw.fields[n]
            raw.fields[n] = (key, kind, (item, damage_list(rng, items) if item == STRING else items[::-2]))
        elif what == 5:
            t[1] = [(pick(rng, [0, 1, 32, 64, 96, 1 << 40, 1 << 63, -1])) for _ in range(rng.integers(0, 6))]
        elif what == 6:
            t[2] = pick(rng, [*range(0, 44), 255, 1 << 31])
        elif what == 7:
            t[3] = pick(rng, [0, 1, 31, 32, len(raw.data), 1 << 40, (1 << 64) - 32])
        elif what == 8:
            t[0] = pick(rng, [raw.tensors[0][0], "x", "output.weight", "rope_freqs.weight", "", "\0"])
        else:
            name = pick(rng, ["tensors", "fields", "items", t[0], "general.architecture"])
            raw.lies[str(name)] = pick(rng, [0, 1, 5, 1 << 16, 1 << 31, 1 << 40, (1 << 64) - 1])


def load(path: Path) -> None:
    """Load a model and let it speak; show it."""
    from tinychat.hub import store

    os.environ["TINYCHAT_HOME"] = str(path.parent / "home")
    store.show(str(path))
    with tinychat.load(str(path), device="cpu", threads=1) as m:
        list(m.generate("Hi", max_tokens=3, temperature=0))
        if m.template is not None:
            list(m.session("Be brief.").send("Hi", max_tokens=2))


def cases(root: Path) -> dict[str, Case]:
    """A case for each sound model and way of damage."""
    out = {}
    for name, path in sound_models(root).items():
        if path.is_dir():
            for way in (settings, tensors, header, some_bytes):
                out[f"{name} {way.__name__}"] = Case(_folder(path, way), load)
        else:
            raw = Raw(path)
            out[f"{name} fields"] = Case(_gguf(path, raw), load)
            out[f"{name} bytes"] = Case(_gguf_bytes(path), load)
            out[f"{name} blocks"] = Case(_gguf_blocks(path), load)
    return out


def _gguf(path: Path, raw: Raw):
    def make(rng: np.random.Generator, folder: Path) -> Path:
        mine = Raw.__new__(Raw)
        mine.fields, mine.tensors = list(raw.fields), [[n, list(d), k, o] for n, d, k, o in raw.tensors]
        mine.data, mine.version, mine.lies = raw.data, raw.version, {}
        damage_gguf(rng, mine)
        return mine.write(folder / path.name)

    return make


def _gguf_bytes(path: Path):
    content = path.read_bytes()

    def make(rng: np.random.Generator, folder: Path) -> Path:
        (folder / path.name).write_bytes(damage_bytes(rng, content, 9000))
        return folder / path.name

    return make


def _gguf_blocks(path: Path):
    def make(rng: np.random.Generator, folder: Path) -> Path:
        (folder / path.name).write_bytes(damage_blocks(rng, path))
        return folder / path.name

    return make


def _folder(path: Path, way):
    def make(rng: np.random.Generator, folder: Path) -> Path:
        copy = folder / path.name
        shutil.copytree(path, copy)
        way(rng, copy)
        return copy

    return make


def settings(rng: np.random.Generator, folder: Path) -> None:
    """Settings with values of wrong types, and settings files that do not belong there."""
    name = pick(rng, SETTINGS)
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {
        "bits": 4, "group_size": 32, "eos_token_id": 257, "temperature": 0.5, "top_p": 0.9, "top_k": 3,
        "weight_map": {"model.norm.weight": "model.safetensors"}, "model_file_base_name": "model",
    }  # fmt: skip
    file.write_text(json.dumps(damage_json(rng, content)))
    if name.endswith("index.json") and rng.random() < 0.7:
        (folder / "model.safetensors").rename(folder / "part.safetensors")


def tensors(rng: np.random.Generator, folder: Path) -> None:
    """Tensors missing, renamed, of other shapes and types, or full of junk."""
    damage_file(rng, folder / "model.safetensors")


def header(rng: np.random.Generator, folder: Path) -> None:
    """A safetensors header that says something else of the same bytes."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    said, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [n for n in said if n != "__metadata__"]
    for _ in range(rng.integers(1, 4)):
        name, what = names[int(rng.integers(len(names)))], rng.integers(6)
        t = said.get(name)
        if not isinstance(t, dict):
            continue
        if what == 0:
            t["dtype"] = pick(
                rng, ["F64", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "I8", "U32", "X", ""]
            )
        elif what == 1:
            t["shape"] = [(pick(rng, [0, 1, 2, 64, 1 << 31, 1 << 62])) for _ in range(rng.integers(0, 4))]
        elif what == 2:
            t["data_offsets"] = [pick(rng, [0, 1, 2, len(data), 1 << 62]) for _ in range(2)]
        elif what == 3:
            t[(pick(rng, ["dtype", "shape", "data_offsets"]))] = JUNK[int(rng.integers(len(JUNK)))]
        elif what == 4:
            said[name] = JUNK[int(rng.integers(len(JUNK)))]
        else:
            other = names[int(rng.integers(len(names)))]
            said[name], said[other] = said[other], said[name]
    if rng.random() < 0.2:
        said["__metadata__"] = JUNK[int(rng.integers(len(JUNK)))]
    text = json.dumps(said).encode()
    length = len(text) if rng.random() < 0.8 else (pick(rng, [0, 1, len(text) * 2, 1 << 40, (1 << 64) - 1]))
    file.write_bytes(struct.pack("<Q", length) + text + data)


def some_bytes(rng: np.random.Generator, folder: Path) -> None:
    """Bytes overwritten near the beginning of a file."""
    file = folder / pick(rng, ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
    if file.exists():
        file.write_bytes(damage_bytes(rng, file.read_bytes(), 4000))


@pytest.mark.slow
def test_damaged_checkpoints_are_read_or_refused(tmp_path):
    report = run(cases(tmp_path / "sound"), first_seed(), minutes())
    print(report)
    assert not report.faults, report
