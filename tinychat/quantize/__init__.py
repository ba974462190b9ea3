"""Quantization: a float checkpoint in, a 4-bit AutoAWQ or GPTQ checkpoint out.

`calibration` gives the text, `nodes` writes a family's forward pass down, `forward` runs a block of it,
`block` scales and fits its linears, `rounding` rounds one of them; `gptq` does both as its paper says; `walk`
goes from block to block; `layouts` packs a block, `settings` names what config.json says, `folder` writes the
result.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinychat.base.errors import CheckpointError, MemoryBudgetError, UnsupportedModelError, UsageError
from tinychat.base.extras import import_torch
from tinychat.base.terminal import bar
from tinychat.network.config import ModelConfig

if TYPE_CHECKING:
    from tinychat.network.checkpoint import Checkpoint
    from tinychat.quantize.walk import Walk

GROUPS = (128, 64, 32)
METHODS = ("awq", "gptq", "rtn")
RECIPE = 2  # raised when the same job would give another result
Progress = Callable[[int, int, str], None]


def quantize_model(
    model: str,
    out: Path,
    *,
    method: str = "awq",
    group_size: int | None = None,
    act_order: bool = False,
    calib_file: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """`quantize` for a model by name (alias, repo id, folder, .gguf), with a progress bar on stderr."""
    from tinychat.base.machine import cpu_count
    from tinychat.formats import open_checkpoint
    from tinychat.hub import store

    torch = import_torch("Quantizing")
    checkpoint = open_checkpoint(store.resolve(model))
    torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))  # torch does not know of cgroups
    with _bar() as progress:
        return quantize(
            checkpoint,
            out,
            method=method,
            group_size=group_size,
            act_order=act_order,
            calib_file=calib_file,
            seed=seed,
            progress=progress,
        )


def quantize(
    checkpoint: Checkpoint,
    out_dir: Path,
    *,
    method: str = "awq",
    group_size: int | None = None,
    act_order: bool = False,
    calib_file: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a 4-bit folder of the checkpoint's weights (dequantized, where stored so).

    method      "awq": activation-aware scales and rounding fitted to calibration text; "gptq": rounding
                alone, as its paper says; "rtn": round to nearest. Stored in AutoAWQ's `gemm` layout, or in
                GPTQ's
    act_order   gptq: round the inputs with the largest activations first (`desc_act`)
    group_size  inputs that share a scale; None: the largest of 128, 64, 32 that divides every linear
    calib_file  text to calibrate on instead of the default (plain UTF-8, or .jsonl)
    seed        decides the order of the calibration documents, and which are used
    progress    called with (blocks done, blocks, what is being done)

    Embedding, norms and output head stay in 16 bits. One block is in memory at a time. A run that was killed
    goes on when the same call is made again. Returns facts: path, method, group_size, calibration_tokens,
    seconds, size_bytes. Raises UsageError (a group size that does not divide; `out_dir` taken),
    CheckpointError (NaN weights), UnsupportedModelError, MemoryBudgetError, and TinychatError when the disk
    is full.
    """
    torch = import_torch("Quantizing")
    from tinychat.quantize import folder, layouts

    started, cfg = time.monotonic(), checkpoint.config
    group = _check(checkpoint, method, group_size, act_order)
    report = progress or (lambda done, total, what: None)
    report(0, cfg.n_layers, "reading")
    tokens = None if method == "rtn" else _calibration(checkpoint, method, calib_file, seed)
    rest = _rest(checkpoint)
    job = _job(checkpoint, method, group, tokens, act_order)
    with folder.OutputFolder(out_dir, job) as target, torch.inference_mode():
        walk = _walk(checkpoint, method, group, tokens, act_order)
        for layer in range(cfg.n_layers):
            report(layer, cfg.n_layers, f"block {layer + 1} of {cfg.n_layers}")
            done = target.block(layer)
            if done is not None:
                walk.skip(layer, done)
            else:
                target.write_block(layer, layouts.packed(walk.quantize(layer), cfg, method))
        report(cfg.n_layers, cfg.n_layers, "writing")
        record = {"calibration_tokens": 0 if tokens is None else int(tokens.size), "seed": seed}
        target.finish(checkpoint, rest, record)
        return {
            "path": str(target.out),
            "method": method,
            "bits": 4,
            "group_size": group,
            "calibration_tokens": record["calibration_tokens"],
            "seconds": round(time.monotonic() - started, 1),
            "size_bytes": sum(f.stat().st_size for f in target.out.iterdir()),
        }


def _calibration(checkpoint: Checkpoint, method: str, file: Path | None, seed: int) -> np.ndarray:
    """Token ids to calibrate on: int64 [windows, length]."""
    from tinychat.quantize import calibration

    length = min(calibration.LENGTH, checkpoint.config.context_length)
    tokens = calibration.windows(checkpoint.tokenizer(), file=file, length=length, seed=seed)
    _check_memory(checkpoint.config, tokens.size, method)
    return tokens


def _job(
    checkpoint: Checkpoint, method: str, group: int, tokens: np.ndarray | None, act_order: bool
) -> dict[str, Any]:
    """Facts that decide the result: a run that was killed goes on if it is the same."""
    return {
        "recipe": RECIPE,
        "source": checkpoint.fingerprint(),
        "method": method,
        "group_size": group,
        "calibration": None if tokens is None else hashlib.sha256(tokens.tobytes()).hexdigest(),
    } | ({"act_order": act_order} if method == "gptq" else {})


def _check(checkpoint: Checkpoint, method: str, group_size: int | None, act_order: bool) -> int:
    """The group size; raises for what cannot be done, before anything is read."""
    from tinychat.quantize import settings
    from tinychat.quantize.forward import network

    cfg = checkpoint.config
    if method not in METHODS:
        raise UsageError(f"The method {method!r} is not known.", f"Use {' or '.join(METHODS)}.")
    if act_order and method != "gptq":
        raise UsageError(f"The method {method!r} has no act-order.", "Use it with gptq.")
    if cfg.n_experts:
        raise UnsupportedModelError(
            f"{checkpoint.path.name} is a mixture of experts, which cannot be quantized yet.",
            'It runs with quantize="rtn", or as someone quantized it.',
        )
    network(cfg)  # refuses a family whose blocks cannot be quantized one by one
    if cfg.tie_embeddings is False and not checkpoint.has("lm_head"):
        raise CheckpointError(f"{checkpoint.path} has no output head.", "Pull the model again.")
    if getattr(checkpoint, "json", None) is None:
        settings.hf_config(cfg)  # refuse now what could not be written at the end
    return choose_group(cfg, group_size)


def _walk(
    checkpoint: Checkpoint, method: str, group: int, tokens: np.ndarray | None, act_order: bool
) -> Walk:
    from tinychat.quantize.walk import AWQWalk, GPTQWalk, NearestWalk

    if tokens is None:
        return NearestWalk(checkpoint, group)
    if method == "gptq":
        return GPTQWalk(checkpoint, group, tokens, act_order)
    return AWQWalk(checkpoint, group, tokens)


def choose_group(cfg: ModelConfig, wanted: int | None) -> int:
    """The group size: `wanted`, or the largest of 128, 64, 32 that divides the inputs of every linear.

    Raises UsageError when `wanted` does not divide them, naming those that do; UnsupportedModelError when
    none does, or the outputs are not a multiple of 8, which the format's packing needs.
    """
    from tinychat.models import FAMILIES

    shapes = FAMILIES[cfg.family].linears(cfg, 0)
    fit = [g for g in GROUPS if all(k % g == 0 for _, k in shapes.values())]
    odd = next((name for name, (n, _) in shapes.items() if n % 8), None)
    if odd is not None:
        raise UnsupportedModelError(
            f"{odd} has {shapes[odd][0]} outputs, not a multiple of 8.", "AutoAWQ's layout cannot hold it."
        )
    if not fit:
        inputs = sorted({k for _, k in shapes.values()})
        raise UnsupportedModelError(
            f"No group size divides linears with {', '.join(map(str, inputs))} inputs.",
            "Widths must be multiples of 32; run the model unquantized.",
        )
    if wanted is None:
        return fit[0]
    if wanted not in fit:
        name, k = next(((n, k) for n, (_, k) in shapes.items() if wanted <= 0 or k % wanted), ("", 0))
        why = f"does not divide the {k} inputs of {name}" if name else "is not a size that backends run"
        raise UsageError(
            f"Group size {wanted} {why}.", f"Use {' or '.join(map(str, fit))} (or leave it out: {fit[0]})."
        )
    return wanted


def _rest(checkpoint: Checkpoint) -> list:
    """Weights that stay in 16 bits: embedding, final norm, and the head where it is not the embedding."""
    from tinychat.quantize.folder import Entry
    from tinychat.quantize.forward import finite
    from tinychat.quantize.layouts import as_stored

    def half(name: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            return finite(checkpoint.linear(name).dequantize().astype(np.float16), name)

    cfg = checkpoint.config
    names = ["model.embed_tokens"] + ([] if cfg.tie_embeddings else ["lm_head"])
    entries = []
    for name in names:
        shape = tuple(checkpoint.linear(name).shape)
        entries.append(
            Entry(
                name + ".weight",
                "F16",
                shape,
                partial(half, name),
            )
        )
    norm = finite(as_stored(checkpoint.vector("model.norm"), cfg), "model.norm")
    return [*entries, Entry.of("model.norm.weight", norm)]


def _check_memory(cfg: ModelConfig, n_tokens: int, method: str) -> None:
    """Raises MemoryBudgetError when one block and the calibration activations do not fit."""
    from tinychat.base.machine import available_memory, human_bytes

    a, h, f = cfg.layers[0].mixer, cfg.hidden_size, max(layer.mlp.size for layer in cfg.layers)
    block = 4 * (h * a.head_dim * (2 * a.n_heads + 2 * a.n_kv_heads) + 3 * h * f)
    kept = 2 * h + f if method == "gptq" else 3 * h  # activations of a token
    need = 4 * block + 4 * kept * n_tokens + 8 * 4 * max(h, f) ** 2 + 4 * cfg.vocab_size * h
    free = available_memory()
    if need > free:
        raise MemoryBudgetError(
            f"Quantizing this model needs {human_bytes(need)} and {human_bytes(free)} are free.",
            "Close other programs, or use --method rtn, which needs one block only.",
        )


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    """A bar on a terminal's stderr; on any other one line, once what can be refused has not been."""
    if not sys.stderr.isatty():
        said: list[str] = []

        def say(done: int, total: int, what: str) -> None:
            if what != "reading" and not said:
                said.append(what)
                print(f"Quantizing {total} blocks", file=sys.stderr, flush=True)

        yield say
        return
    with bar("Quantizing") as update:
        yield update
