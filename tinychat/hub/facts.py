"""What a model's files say of it, in a word or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinychat.base.files import open_regular, read_text


def quantization(path: Path, checkpoint: Any) -> str | None:
    """In a word or two: "Q4_1", "awq 4-bit g128", "bfloat16"."""
    if hasattr(checkpoint, "tensor_bytes"):
        return next(iter(checkpoint.tensor_bytes()), None)
    try:
        config = json.loads(read_text(path / "config.json"))
        q = config.get("quantization_config")
        if not q:
            return config.get("torch_dtype") or config.get("dtype")
        bits, group = q.get("bits") or q.get("w_bit"), q.get("group_size") or q.get("q_group_size")
        return f"{q.get('quant_method')} {bits}-bit g{group}"
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def license_of(path: Path, checkpoint: Any) -> str | None:
    fields = getattr(checkpoint, "fields", None)
    if fields is not None:
        value = fields.get("general.license")
        return value if isinstance(value, str) else None
    try:
        with open_regular(path / "README.md") as f:
            head = f.read(4000).decode("utf-8", "replace")
    except OSError:
        return None
    lines = [line for line in head.splitlines() if line.startswith("license:")]
    return lines[0].partition(":")[2].strip() or None if lines else None


def parameters(cfg: Any) -> int:
    from tinychat.models import FAMILIES

    family = FAMILIES[cfg.family]
    body = 0
    for layer in range(cfg.n_layers):
        body += sum(n * k for n, k in family.linears(cfg, layer).values())
        body += sum(n for (n,) in family.norms(cfg, layer).values())
    tables = cfg.vocab_size * cfg.hidden_size * (1 if cfg.tie_embeddings else 2)
    return body + tables + cfg.hidden_size
