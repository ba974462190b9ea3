"""Quantization: a float checkpoint in, one of 2, 3, 4 or 8 bits out, in a format that others read.

`target` says what may be asked for, `grids` which levels a weight then has; `calibration` gives the text,
`nodes` writes a family's forward pass down, `forward` runs a block of it, `block` scales and fits its
linears, `rounding` rounds one of them; `gptq` does both as its paper says; `smooth` moves loud channels into
8-bit weights, and `folding` their scales into what lies before; `experts` says which tokens an expert is
fitted to; `walk` goes from block to block; `layouts` packs a block; `tune` distils what stands beside the
codes of all; `settings` names what config.json says; `folder` and `gguf_output` write the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinychat.base.errors import CheckpointError, MemoryBudgetError, UnsupportedModelError, UsageError
from tinychat.base.extras import import_torch
from tinychat.base.terminal import bar
from tinychat.network.config import ModelConfig

if TYPE_CHECKING:
    from tinychat.network.checkpoint import Checkpoint
    from tinychat.quantize.folder import Entry, Output
    from tinychat.quantize.target import Target
    from tinychat.quantize.walk import Walk

RECIPE = 4  # raised when the same job would give another result
RANGES = ("searched", "whole")
SMOOTHED = 16  # windows for SmoothQuant: maxima of activations need no more
Progress = Callable[[int, int, str], None]


def quantize_model(model: str, out: Path, **wishes: Any) -> dict[str, Any]:
    """`quantize` for a model by name (alias, repo id, folder, .gguf), with a progress bar on stderr."""
    from tinychat.base.machine import cpu_count
    from tinychat.formats import open_checkpoint
    from tinychat.hub import store

    torch = import_torch("Quantizing")
    checkpoint = open_checkpoint(store.resolve(model))
    torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))  # torch does not know of cgroups
    with _bar() as progress:
        return quantize(checkpoint, out, progress=progress, **wishes)


def quantize(
    checkpoint: Checkpoint,
    out_dir: Path,
    *,
    method: str = "awq",
    bits: int | None = None,
    format: str | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    act_order: bool = False,
    ranges: str = "searched",
    gguf_type: str | None = None,
    tune: bool = False,
    calib_file: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint's weights (dequantized, where stored so) with few bits each: a folder, or a GGUF.

    method      "awq": activation-aware scales and rounding fitted to calibration text; "gptq": rounding
                alone, as its paper says; "rtn": round to nearest; "smoothquant": W8A8
    bits        of a weight: 2, 3, 4 or 8; None: 4, or the method's own
    format      "awq" (AutoAWQ's `gemm`, 4 bits), "gptq", "compressed-tensors", "gguf" (4 or 8 bits); None: by
                the name of `out_dir`, else the method's own, where it holds so many bits
    group_size  inputs that share a scale; -1: all of a row; None: the largest of 128, 64, 32 that fits
    symmetric   zero in the middle (gptq, compressed-tensors)
    gguf_type   "Q4_K" (Q5_0 where 256 does not divide the inputs), "Q4_1", "Q4_0" or "Q8_0"; None: by `bits`
    act_order   gptq: round the inputs with the largest activations first (`desc_act`)
    ranges      "searched": the range of a group is chosen by the error that it leaves on calibration text;
                "whole": from its smallest to its largest weight, as the papers of GPTQ and RTN have it
    tune        at last, distil scales, offsets and norms against the float model's distributions; codes stay
    calib_file  text to calibrate on instead of the default (plain UTF-8, or .jsonl)
    seed        decides which calibration documents are used, and their order
    progress    called with (blocks done, blocks, what is being done)

    Embedding, norms and output head stay in 16 bits (in a GGUF: 8, and norms in 32). One block is in memory
    at a time, and all codes while tuning. A run that was killed goes on when the same call is made again.
    Returns facts: path, method, bits, seconds and more. Raises UsageError (wishes that do not go together),
    CheckpointError (NaN weights), UnsupportedModelError, MemoryBudgetError, TinychatError (the disk is full).
    """
    import_torch("Quantizing")
    started = time.monotonic()
    wishes: dict[str, Any] = dict(bits=bits, format=format, group_size=group_size, symmetric=symmetric)
    wishes |= dict(method=method, act_order=act_order, type=gguf_type)
    target = _check(checkpoint, out_dir, ranges, tune, **wishes)
    report, layers = progress or (lambda done, total, what: None), checkpoint.config.n_layers
    report(0, layers, "reading")
    tokens = _calibration(checkpoint, method, ranges, calib_file, seed)
    more = _tuning_text(checkpoint, target, calib_file, seed) if tune else None
    job = _job(checkpoint, method, ranges, target, tokens, more)
    record: dict[str, Any] = {"calibration_tokens": 0 if tokens is None else int(tokens.size), "seed": seed}
    output, rest = _output(checkpoint, out_dir, target, job)
    with output:
        report(0, layers, _estimate(checkpoint.config, method, tokens, tune))
        _blocks(checkpoint, output, target, lambda: _walk(checkpoint, job, target, tokens), report)
        record |= _tune(checkpoint, output, target, more, report)
        output.finish(checkpoint, target, rest, record)
    facts = {"path": str(output.out), "method": method, **target.facts(), **record}
    facts |= {"size_bytes": output.size(), "substitutes": target.substitutes(checkpoint.config)}
    return facts | {"seconds": round(time.monotonic() - started, 1)}


def _blocks(
    checkpoint: Checkpoint,
    output: Output,
    target: Target,
    begin: Callable[[], Walk],
    report: Progress,
) -> None:
    """Quantize the blocks that `output` does not have yet."""
    import torch

    from tinychat.quantize import layouts

    cfg = checkpoint.config
    with torch.inference_mode():
        walk = begin()
        for layer in range(cfg.n_layers):
            report(layer, cfg.n_layers, f"block {layer + 1} of {cfg.n_layers}")
            done = output.block(layer)
            if done is not None:
                walk.skip(layer, done)
            else:
                output.write_block(layer, layouts.packed(walk.quantize(layer), cfg, target))
        report(cfg.n_layers, cfg.n_layers, "writing")


def _tune(
    checkpoint: Checkpoint, output: Output, target: Target, tokens: np.ndarray | None, report: Progress
) -> dict[str, Any]:
    """Tune the finished blocks, and say under `tuned` what that did (see `Tuner`). tokens: int64 [windows,
    length]; None: nothing is tuned.
    """
    if tokens is None:
        return {}
    import torch

    from tinychat.quantize.layouts import StoredBlock
    from tinychat.quantize.tune import TunedBlock, Tuner

    def say(done: int, steps: int, kl: float) -> None:
        report(done, steps, f"tuning, divergence {kl:.4f}")

    cfg, blocks = checkpoint.config, []
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        for layer in range(cfg.n_layers):
            tensors = output.block(layer)
            assert tensors is not None  # written a moment ago
            blocks.append(TunedBlock(StoredBlock.read(tensors, cfg, layer, target)))
        tuned = Tuner(checkpoint, blocks)(tokens, say)
        for block in blocks:
            output.write_block(block.layer, block.stored().tensors(cfg, target), tuned=True)
    return {"tuned": tuned}


def _tuning_text(checkpoint: Checkpoint, target: Target, file: Path | None, seed: int) -> np.ndarray:
    """Token ids to tune on: int64 [windows, length], in another order than those to calibrate on."""
    from tinychat.quantize import calibration, tune

    length = min(tune.LENGTH, checkpoint.config.context_length)
    count = tune.PLAN.windows
    tokens = calibration.windows(checkpoint.tokenizer(), file=file, count=count, length=length, seed=seed + 1)
    need = tune.needed(checkpoint.config, target.group, tokens.size)
    _check_free(need, "Tuning", "Close other programs, or leave --tune out.")
    return tokens


def _calibration(
    checkpoint: Checkpoint, method: str, ranges: str, file: Path | None, seed: int
) -> np.ndarray | None:
    """Token ids to calibrate on: int64 [windows, length]; None where nothing looks at a text."""
    if method == "rtn" and ranges == "whole":
        return None
    from tinychat.quantize import calibration, estimate

    length = min(calibration.LENGTH, checkpoint.config.context_length)
    count = SMOOTHED if method == "smoothquant" else calibration.COUNT
    tokens = calibration.windows(checkpoint.tokenizer(), file=file, count=count, length=length, seed=seed)
    todo = "Close other programs, or use --method rtn --ranges whole, which needs one block only."
    _check_free(estimate.memory(checkpoint.config, tokens.size, method), "Quantizing", todo)
    return tokens


def _estimate(cfg: ModelConfig, method: str, tokens: np.ndarray | None, tune: bool) -> str:
    """What the blocks will take, in words."""
    from tinychat.base.machine import human_bytes
    from tinychat.quantize import estimate

    n, length = (0, 0) if tokens is None else (tokens.size, tokens.shape[1])
    bytes_ = human_bytes(estimate.memory(cfg, n, method))
    said = estimate.in_words(bytes_, estimate.seconds(cfg, n, length, method))
    return said + (", before tuning" if tune else "")


def _job(
    checkpoint: Checkpoint,
    method: str,
    ranges: str,
    target: Target,
    tokens: np.ndarray | None,
    more: np.ndarray | None,
) -> dict[str, Any]:
    """Facts that decide the result: a run that was killed goes on if it is the same."""
    tuning = {} if more is None else {"tuning": hashlib.sha256(more.tobytes()).hexdigest()}
    return tuning | {
        "recipe": RECIPE,
        "source": checkpoint.fingerprint(),
        "method": method,
        "ranges": ranges,
        **target.facts(),
        "calibration": None if tokens is None else hashlib.sha256(tokens.tobytes()).hexdigest(),
    }


def _check(
    checkpoint: Checkpoint,
    out: Path,
    ranges: str,
    tune: bool,
    *,
    format: str | None,
    type: str | None,
    **wishes: Any,
) -> Target:
    """The target; raises for what cannot be done, before anything is read."""
    from tinychat.models import FAMILIES
    from tinychat.quantize import settings
    from tinychat.quantize.forward import network
    from tinychat.quantize.target import choose

    cfg = checkpoint.config
    if ranges not in RANGES:
        raise UsageError(f"The ranges {ranges!r} are not known.", f"Use {' or '.join(RANGES)}.")
    if tune and wishes["method"] == "smoothquant":
        raise UsageError("smoothquant has nothing to tune.", "Leave --tune out.")
    latent = cfg.attentions[0].latent is not None
    if any(form.parts for form in FAMILIES[cfg.family].HF.values()) and not latent:
        raise UnsupportedModelError(
            f"Files hold projections of a {cfg.family} model together; quantizers do not write that yet.",
            'It runs with quantize="rtn", or as someone quantized it.',
        )
    if out.suffix == ".gguf" and format is None:
        format = "gguf"
    target = choose(cfg, format=format, type=type, **wishes)
    if (target.format == "gguf") != (out.suffix == ".gguf"):
        what = "a file, whose name ends in .gguf" if target.format == "gguf" else "a folder"
        raise UsageError(
            f"{out} does not fit: the format {target.format} is {what}.", "Change --out or --format."
        )
    if target.format == "gguf" and any(form.flattened for form in FAMILIES[cfg.family].GGUF.values()):
        raise UnsupportedModelError(
            f"GGUF holds tensors of a {cfg.family} model in other shapes; quantizers do not write that yet.",
            "Use another --format.",
        )
    if target.format == "gguf" and latent:
        raise UnsupportedModelError(
            "GGUF holds latent attention's matrices in another way; quantizers do not write that yet.",
            "Use another --format.",
        )
    network(cfg)  # refuses a family whose blocks cannot be quantized one by one
    if cfg.tie_embeddings is False and not checkpoint.has("lm_head"):
        raise CheckpointError(f"{checkpoint.path} has no output head.", "Pull the model again.")
    if target.format != "gguf" and getattr(checkpoint, "json", None) is None:
        settings.hf_config(cfg)  # refuse now what could not be written at the end
    return target


def _walk(checkpoint: Checkpoint, job: dict[str, Any], target: Target, tokens: np.ndarray | None) -> Walk:
    from tinychat.quantize.walk import AWQWalk, GPTQWalk, NearestWalk, SmoothWalk, WeighedWalk

    search = job["ranges"] == "searched"
    if tokens is None:
        return NearestWalk(checkpoint, target)
    if job["method"] == "smoothquant":
        return SmoothWalk(checkpoint, target, tokens)
    if job["method"] == "rtn":
        return WeighedWalk(checkpoint, target, tokens)
    if job["method"] == "gptq":
        return GPTQWalk(checkpoint, target, tokens, search)
    return AWQWalk(checkpoint, target, tokens, search)


def _output(
    checkpoint: Checkpoint, out: Path, target: Target, job: dict[str, Any]
) -> tuple[Output, list[Entry]]:
    """Where blocks go, and the tensors that are no block's."""
    from tinychat.quantize import folder, gguf_output

    if target.format != "gguf":
        return folder.OutputFolder(out, job), folder.rest(checkpoint)
    fields, rest = gguf_output.prepared(checkpoint)
    return gguf_output.OutputFile(out, job, fields), rest


def _check_free(need: int, what: str, todo: str) -> None:
    """Raises MemoryBudgetError where fewer bytes are free."""
    from tinychat.base.machine import available_memory, human_bytes

    if need > (free := available_memory()):
        raise MemoryBudgetError(
            f"{what} this model needs {human_bytes(need)} and {human_bytes(free)} are free.", todo
        )


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    """A bar on a terminal's stderr; and one line that stays, once what can be refused has not been."""
    with contextlib.ExitStack() as shown:
        said: list[str] = []
        update: Callable[..., None] | None = None

        def say(done: int, total: int, what: str) -> None:
            nonlocal update
            if what != "reading" and not said:
                said.append(what)
                shown.close()  # a bar in the way
                update = None
                print(f"Quantizing {total} blocks: {what}", file=sys.stderr, flush=True)
                return
            if sys.stderr.isatty():
                update = update or shown.enter_context(bar("Quantizing"))
                update(done, total, what)

        yield say
