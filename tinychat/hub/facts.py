"""Facts that a model's files tell: for `show`, and for a listing in a word or two."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinychat.backends.plan import plan
from tinychat.base.files import open_regular, read_text
from tinychat.network.weight_policy import WeightPolicy


def described(path: Path, checkpoint: Any) -> dict[str, Any]:
    """Facts of the network, its weights and its tokenizer, by the names that `show` prints."""
    from tinychat.network.config import ExpertsConfig

    cfg, tokenizer = checkpoint.config, checkpoint.tokenizer()
    mlps = [layer.mlp for layer in cfg.layers]
    experts = [f"{m.taken} of {m.n}" for m in mlps if isinstance(m, ExpertsConfig)]
    return {
        "family": cfg.family,
        "quantization": quantization(path, checkpoint),
        "weights": checkpoint.tensor_bytes() if hasattr(checkpoint, "tensor_bytes") else None,
        **weights(checkpoint),
        "parameters": parameters(cfg),
        "layers": cfg.n_layers,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": max(layer.mlp.size for layer in cfg.layers),
        "heads": _in_layers(a.n_heads for a in cfg.attentions),
        "kv_heads": _in_layers(a.n_kv_heads for a in cfg.attentions),
        "head_dim": _in_layers(a.head_dim for a in cfg.attentions),
        "experts": next(iter(experts), None),
        "vocab_size": cfg.vocab_size,
        "context_length": cfg.context_length,
        "rope_theta": cfg.rope and cfg.rope.theta,
        "rope_scaling": cfg.rope and cfg.rope.kind,
        "tied_embeddings": cfg.tie_embeddings,
        "chat_template": tokenizer.chat_template is not None,
        "stop_tokens": [
            tokenizer.token_bytes(i).decode("utf-8", "replace") for i in sorted(tokenizer.eos_ids)
        ],
    }


def _in_layers(values: Iterable[int]) -> int | str:
    """A number that layers have, or all that they have."""
    found = sorted(set(values))
    return found[0] if len(found) == 1 else " or ".join(map(str, found))


def weights(checkpoint: Any) -> dict[str, Any]:
    """What weights are stored as and what the CPU runs them as, with the settings that nobody gave.

    modules  {"attention": {"6-bit, groups of 16, 8-bit scale × fp16": {"bits": 6.5625, "bytes": 1234, …}}}:
             of each kind and form bits a weight and bytes as stored, runs_as and runs_bytes, and whether that
             is rounded
    token    bytes that decoding a token reads, stored_bytes and runs_bytes
    """
    from tinychat.backends.cpu_pack import KERNELS

    found: dict[str, dict[str, dict[str, Any]]] = {}
    sizes: dict[tuple[str, str], int] = {}
    token = {"stored_bytes": 0.0, "runs_bytes": 0.0}
    for w in plan(checkpoint, WeightPolicy(), KERNELS):
        form, n = str(w.form), w.shape[0] * w.shape[1]
        new = {"bits": 0.0, "bytes": 0, "runs_as": str(w.runs), "runs_bytes": 0, "rounded": w.rounded}
        entry = found.setdefault(w.kind, {}).setdefault(form, new)
        entry["bytes"] += w.stored_bytes
        entry["runs_bytes"] += w.runs_bytes
        sizes[w.kind, form] = sizes.get((w.kind, form), 0) + n
        entry["bits"] = round(8 * entry["bytes"] / sizes[w.kind, form], 4)
        token["stored_bytes"] += w.stored_bytes * w.share
        token["runs_bytes"] += w.runs_bytes * w.share
    return {"modules": found, "token": {name: round(value) for name, value in token.items()}}


def quantization(path: Path, checkpoint: Any) -> str | None:
    """Quantization in a word or two: "Q4_1", "awq 4-bit g128", "bfloat16"."""
    if hasattr(checkpoint, "tensor_bytes"):
        return next(iter(checkpoint.tensor_bytes()), None)
    said = getattr(checkpoint, "quantization", None)
    if said is not None:
        grid = next(iter(said.grids), None)
        if grid is None:
            return _method(said.method, said.schemes)
        return f"{said.method} {grid.bits}-bit" + (f" g{grid.group}" if grid.group > 0 else "")
    try:
        config = json.loads(read_text(path / "config.json"))
        return config.get("torch_dtype") or config.get("dtype")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _method(method: str, schemes: tuple[str, ...]) -> str:
    """A method whose codes are no integers, with what it stores where its name does not say so."""
    return method if schemes[0].startswith(method) else f"{method} {schemes[0]}"


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
    from tinychat.network.family import outside

    family = FAMILIES[cfg.family]
    body = 0
    for layer in range(cfg.n_layers):
        body += sum(n * k for n, k in family.linears(cfg, layer).values())
        body += sum(map(math.prod, family.norms(cfg, layer).values()))
    tables = cfg.vocab_size * cfg.hidden_size * (1 if cfg.tie_embeddings else 2)
    body += sum(map(math.prod, outside(family, cfg).values()))
    return body + tables + cfg.hidden_size
