"""What a folder's settings say of its quantized modules: `quantization_config`, and the files that older or
other programs put it into.

Settings decide the method, and what tensors cannot show. Everything else is decided by the tensors of each
module: a folder may hold several schemes, and lists of modules (`ignore`, `targets`, `extra_config`,
`dynamic`, `modules_to_not_convert`) say again what is seen there, as patterns that a stranger wrote.
What they say of activations (`activation_scheme`, `input_activations`) and of a KV cache is how these are
rounded where a model computes in 8 bits: the weights are the same, and finer activations are nearer to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.formats.scheme import ROWS, WHOLE, Grid, Quantization
from tinychat.formats.tensors import LLM_AWQ, PULL_AGAIN, llm_awq_file, read_json
from tinychat.network.weight_form import CODE_BITS

SUPPORTED = (
    "Supported: AWQ, GPTQ, AutoRound, compressed-tensors (pack-quantized, int-quantized, float-quantized, "
    "nvfp4, mxfp4), fp8, modelopt (FP8, NVFP4), mxfp4, bitsandbytes (nf4, int8), MLX; unquantized weights."
)
AWQ = ("gemv_fast", "awq")
GPTQ_LAYOUTS = {"gptq": 1, "gptq_v2": 2}
# compressed-tensors and modelopt: formats whose tensors tell all
COMPRESSED = {
    "pack-quantized": ("pack-quantized",),
    "int-quantized": ("int8",),
    "float-quantized": ("fp8",),
    "naive-quantized": ("int8", "fp8"),
    "nvfp4-pack-quantized": ("nvfp4",),
    "mxfp4-pack-quantized": ("mxfp4",),
    "mxfp8-quantized": ("fp8",),
}
MODELOPT = {
    "FP8": ("fp8",),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8",),
    "MXFP8": ("fp8",),
    "NVFP4": ("modelopt nvfp4",),
    "W4A16_NVFP4": ("modelopt nvfp4",),
    "MIXED_PRECISION": ("fp8", "modelopt nvfp4"),
}
MX = (1, 32)


def read_quantization(folder: Path, config: dict[str, Any]) -> Quantization | None:
    """How the folder's quantized modules are stored; None when nothing says that any is.

    Raises UnsupportedModelError for another method, layout, width or option, by name.
    """
    q = config.get("quantization_config")
    mlx = config.get("quantization")  # mlx-lm writes both, the same
    if isinstance(mlx, dict) and "group_size" in mlx and (not isinstance(q, dict) or "quant_method" not in q):
        return _mlx(mlx)
    if q is None and (old := read_json(folder / "quant_config.json")) is not None:  # AutoAWQ before 0.1.6
        q = {"quant_method": "awq", "bits": old.get("w_bit"), "group_size": old.get("q_group_size")}
        q |= {key: old[key] for key in ("version", "zero_point") if key in old}
    if q is None and (old := read_json(folder / "quantize_config.json")) is not None:  # AutoGPTQ before 0.7
        return _auto_gptq(old)
    if q is None and (old := read_json(folder / "hf_quant_config.json")) is not None:  # modelopt before 0.29
        return _modelopt(_object(old, "quantization"))
    if q is None:
        file = llm_awq_file(folder)
        said = file and LLM_AWQ.search(file.name)
        return Quantization("awq", AWQ, (Grid(4, int(said[1]), True),)) if said else None
    if not isinstance(q, dict):
        raise CheckpointError(f"quantization_config is {q!r}, not an object.", PULL_AGAIN)
    method = str(q.get("quant_method", "(none)")).lower()
    if method not in _METHODS:
        raise UnsupportedModelError(f"The quantization method {method!r} is not supported.", SUPPORTED)
    return _METHODS[method](q)


def _awq(q: dict[str, Any]) -> Quantization:
    version = str(q.get("version") or q.get("format") or q.get("checkpoint_format") or "gemm").lower()
    if version not in ("gemm", "gemv", "gemv_fast", "llm-awq"):
        raise _unsupported(f"The AWQ layout {version!r}")
    bits = _bits("AWQ", q.get("bits", q.get("w_bit", 4)))
    order = bits == 4
    if bits != 4 and not (version == "gemm" and _packer(q).startswith("gptqmodel")):
        raise _unsupported(f"AWQ with {bits} bits that gptqmodel has not packed")
    group = _group(q.get("group_size", q.get("q_group_size", 128)))
    return Quantization("awq", AWQ, (Grid(bits, group, bool(q.get("zero_point", True))),), order=order)


def _packer(q: dict[str, Any]) -> str:
    """The program that packed the folder, where its settings tell."""
    meta = q.get("meta")
    said = meta.get("quantizer") if isinstance(meta, dict) else ""
    return str(said[0] if isinstance(said, list) and said else said)


def _gptq(q: dict[str, Any]) -> Quantization:
    layout = str(q.get("checkpoint_format") or q.get("format") or "gptq").lower()
    if layout not in GPTQ_LAYOUTS:
        raise _unsupported(f"The GPTQ layout {layout!r}")
    rules = q.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise CheckpointError(f"The quantization rules are {rules!r}, not an object.", PULL_AGAIN)
    grids = _grids("GPTQ", q, [rule for name, rule in rules.items() if not str(name).startswith("-:")])
    return Quantization("gptq", ("gptq",), grids, version=GPTQ_LAYOUTS[layout])


def _auto_gptq(old: dict[str, Any]) -> Quantization:
    """AutoGPTQ's own file. It is silent about the method where the method is GPTQ, and names the weights'
    file without its ending.
    """
    if old.get("is_marlin_format"):
        raise _unsupported("The GPTQ layout 'marlin'")
    method = str(old.get("quant_method") or "gptq").lower()
    if method not in ("gptq", "awq"):
        raise _unsupported(f"The quantization method {method!r}")
    name = old.get("model_file_base_name")
    return replace(_METHODS[method](old), file=f"{name}.safetensors" if name else None)


def _auto_round(q: dict[str, Any]) -> Quantization:
    """AutoRound says how it packed in `packing_format`, before version 0.4 in `backend`."""
    said = str(q.get("packing_format") or q.get("backend") or "auto_round:auto_gptq").lower()
    words = [w.removeprefix("auto_") for w in said.replace("autoround", "auto_round").split(":")]
    extra = q.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise CheckpointError(f"The quantization's extra_config is {extra!r}, not an object.", PULL_AGAIN)
    if str(q.get("data_type") or "int") not in ("int", "int_asym", "int_sym"):
        raise _unsupported(f"AutoRound with the data type {q['data_type']!r}")
    grids = _grids("AutoRound", q, extra.values())
    if "awq" in words:
        if any(g.bits not in (4, 5, 6) for g in grids):
            raise _unsupported("AutoRound's packing for AWQ with other than 4, 5 or 6 bits")
        return Quantization("auto-round", AWQ, tuple(replace(g, zeros=True) for g in grids))
    if "gptq" in words:
        return Quantization("auto-round", ("gptq",), grids)
    if words[0] == "round" and set(words[1:]) <= {"exllamav2", "tritonv2", "triton", "torch", "gptqmodel"}:
        return Quantization(
            "auto-round", ("gptq",), grids, version=2
        )  # its own packing has zeros as they are
    raise _unsupported(f"AutoRound's packing {said!r}")


def _compressed(q: dict[str, Any]) -> Quantization:
    transforms = q.get("transform_config")
    if transforms and transforms != {"config_groups": {}}:
        raise _unsupported("compressed-tensors with a transform_config")
    sparsity = q.get("sparsity_config") or {"format": "dense"}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise _unsupported("compressed-tensors with a sparsity_config")
    groups = q.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    if not found or not all(isinstance(s, dict) and isinstance(s.get("weights"), dict) for s in found):
        raise CheckpointError("quantization_config has no config_groups with weights.", PULL_AGAIN)
    whole = q.get("format")
    schemes: list[str] = []
    grids: list[Grid] = []
    blocks: list[tuple[int, int]] = []
    for s in found:
        layout = s.get("format") or whole
        if not isinstance(layout, str) or layout not in COMPRESSED:
            raise _unsupported(f"The compressed-tensors format {layout!r}")
        schemes += COMPRESSED[layout]
        grid, block = _weights(s["weights"], layout)
        grids += grid
        blocks += block
    return Quantization("compressed-tensors", _once(schemes), _once(grids), _once(blocks))


def _weights(w: dict[str, Any], layout: str) -> tuple[list[Grid], list[tuple[int, int]]]:
    """Grids and blocks that modules of a scheme of compressed-tensors may have."""
    kind, strategy = w.get("type", "int"), w.get("strategy")
    if strategy is None:
        strategy = "tensor" if w.get("group_size") is None else "group"
    if strategy not in ("tensor", "channel", "group", "block", "tensor_group"):
        raise _unsupported(f"The compressed-tensors strategy {strategy!r}")
    if kind not in ("int", "float"):
        raise _unsupported(f"compressed-tensors of type {kind!r}")
    group = _group(w.get("group_size")) if strategy.endswith("group") else -1
    if strategy == "block":
        block = _block(w.get("block_structure"))
    else:
        block = WHOLE if strategy == "tensor" else ROWS if group == -1 else (1, group)
    bits, symmetric = w.get("num_bits"), w.get("symmetric", True)
    if layout != "pack-quantized":
        if bits != (4 if "fp4" in layout else 8):
            raise _unsupported(f"compressed-tensors {layout} with {bits!r} bits")
        return [Grid(8, group, not symmetric)] if kind == "int" else [], [block]
    if kind != "int" or strategy in ("tensor", "block"):
        raise _unsupported(f"compressed-tensors pack-quantized of type {kind!r} by {strategy}")
    return [Grid(_bits("compressed-tensors", bits), group, not symmetric)], []


def _fp8(q: dict[str, Any]) -> Quantization:
    for option, known in (("fmt", "e4m3"), ("expert_dtype", "fp8")):
        if str(q.get(option) or known).lower() not in (known, "float8_e4m3fn"):
            raise _unsupported(f"FP8 with the {option} {q[option]!r}")
    size = q.get("weight_block_size")
    if size is None:
        powers = str(q.get("quant_method")).lower() == "mxfp8"
        return Quantization("fp8", ("fp8",), blocks=(MX,) if powers else (WHOLE, ROWS))
    return Quantization("fp8", ("fp8",), blocks=(_block(size),))


def _modelopt(q: dict[str, Any]) -> Quantization:
    q = q["quantization"] if isinstance(q.get("quantization"), dict) else q
    algorithm = str(q.get("quant_algo"))
    if algorithm not in MODELOPT:
        raise _unsupported(f"modelopt's {algorithm!r}")
    blocks = {"FP8": (WHOLE,), "FP8_PER_CHANNEL_PER_TOKEN": (ROWS,), "MXFP8": (MX,)}
    return Quantization("modelopt", MODELOPT[algorithm], blocks=blocks.get(algorithm, (WHOLE, ROWS, MX)))


def _bitsandbytes(q: dict[str, Any]) -> Quantization:
    if q.get("load_in_8bit") or q.get("_load_in_8bit"):
        return Quantization("bitsandbytes", ("llm.int8",))
    kind = str(q.get("bnb_4bit_quant_type") or "fp4").lower()
    if kind != "nf4":
        raise _unsupported(f"bitsandbytes with the type {kind!r}")
    return Quantization("bitsandbytes", ("nf4",))


def _mlx(q: dict[str, Any]) -> Quantization:
    mode = str(q.get("mode") or "affine").lower()
    if mode not in ("affine", "mxfp4", "nvfp4", "mxfp8"):
        raise _unsupported(f"MLX in the mode {mode!r}")
    grids = _grids("MLX", q, [rule for rule in q.values() if isinstance(rule, dict)])
    return Quantization("mlx", ("mlx affine", "mlx floats"), grids)


_METHODS: dict[str, Callable[[dict[str, Any]], Quantization]] = {
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "auto_round": _auto_round,
    "intel/auto-round": _auto_round,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "mxfp8": _fp8,
    "fbgemm_fp8": lambda q: Quantization("fbgemm_fp8", ("fp8",), blocks=(ROWS,)),
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "mxfp4": lambda q: Quantization("mxfp4", ("mxfp4 blocks",)),
    "bitsandbytes": _bitsandbytes,
}


def _grids(what: str, q: dict[str, Any], rules: Iterable[Any]) -> tuple[Grid, ...]:
    """The grid of most modules, and those of the rules for some, which are silent about what stays."""
    bits, group = _bits(what, q.get("bits")), _group(q.get("group_size", 128))
    found = [Grid(bits, group)]
    for rule in rules:
        if not isinstance(rule, dict):
            raise CheckpointError(f"A rule of the quantization is {rule!r}, not an object.", PULL_AGAIN)
        own = rule.get("bits", bits)
        if own is not None and own != 16:  # left as it was
            found.append(Grid(_bits(what, own), _group(rule.get("group_size", group))))
    return _once(found)


def _once(items: Iterable[Any]) -> tuple[Any, ...]:
    """The items in their order, each once."""
    return tuple(dict.fromkeys(items))


def _object(q: dict[str, Any], name: str) -> dict[str, Any]:
    value = q.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"hf_quant_config.json has no object {name!r}.", PULL_AGAIN)
    return value


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{what} is not supported.", SUPPORTED)


def _bits(what: str, bits: Any) -> int:
    if isinstance(bits, bool) or bits not in CODE_BITS:
        raise _unsupported(f"{what} with {bits!r} bits")
    return int(bits)


def _group(group: Any) -> int:
    if not isinstance(group, int) or isinstance(group, bool) or not (group == -1 or 1 <= group <= 1 << 20):
        raise CheckpointError(f"The quantization group size {group!r} makes no sense.", PULL_AGAIN)
    return group


def _block(size: Any) -> tuple[int, int]:
    if not isinstance(size, list | tuple) or len(size) != 2 or any(_group(s) < 1 for s in size):
        raise CheckpointError(f"The quantization block {size!r} makes no sense.", PULL_AGAIN)
    return size[0], size[1]
