"""Modules as the formats' own libraries store them (`tests/data/make_schemes.py` says which versions)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import raw_safetensors

from tinychat.formats.hf import HFCheckpoint

DATA = Path(__file__).parents[1] / "data/schemes.npz"
NAME = "model.layers.0.mlp.up_proj"


@functools.cache
def _all() -> tuple[dict[str, dict], dict[str, dict[str, np.ndarray]], dict[str, str]]:
    with np.load(DATA) as held:
        facts = json.loads(held["facts"].tobytes())
        parts: dict[str, dict[str, np.ndarray]] = {}
        for name in held.files:
            case, _, part = name.partition("/")
            if part:
                parts.setdefault(case, {})[part] = held[name]
    return facts["configs"], parts, facts["dtypes"]


def names() -> list[str]:
    """The names of all cases."""
    return list(_all()[0])


def module(case: str) -> tuple[dict[str, np.ndarray], dict[str, str], np.ndarray]:
    """The tensors of a module by part, their dtypes, and its weight in float32."""
    _, parts, dtypes = _all()
    own = dict(parts[case])
    expected = own.pop("expected")
    return own, {part: dtypes[f"{case}/{part}"] for part in own}, expected


def settings(case: str) -> dict[str, Any]:
    """What config.json says of the quantization."""
    said = json.loads(json.dumps(_all()[0][case]))
    return {"quantization": said["mlx"]} if "mlx" in said else {"quantization_config": said}


def config(n: int, k: int, **more: Any) -> dict[str, Any]:
    """config.json of a Llama whose `mlp.up_proj` is [n, k]."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": k,
        "intermediate_size": n,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 40,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    } | more


def folder(path: Path, case: str, said: dict[str, Any] | None = None, **changes: Any) -> HFCheckpoint:
    """A folder that has nothing but the case's module.

    said     its settings, if not the case's own
    changes  tensors in place of its own; None leaves one out. A pair is an array and its dtype
    """
    parts, dtypes, expected = module(case)
    for part, a in changes.items():
        parts.pop(part, None)
        if isinstance(a, tuple):
            parts[part], dtypes[part] = a
        elif a is not None:
            parts[part] = a
    path.mkdir(exist_ok=True)
    text = json.dumps(config(*expected.shape, **(settings(case) if said is None else said)))
    (path / "config.json").write_text(text)
    named = {f"{NAME}.{part}": a for part, a in parts.items()}
    kinds = {f"{NAME}.{part}": d for part, d in dtypes.items()}
    raw_safetensors.write(path / "model.safetensors", named, kinds)
    return HFCheckpoint(path)
