"""Targets: what may be asked for (bits, format, groups), and which grid each linear gets for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinychat.base.errors import UnsupportedModelError, UsageError
from tinychat.network.config import ModelConfig
from tinychat.network.weight_form import ROW, SUPER
from tinychat.quantize.grids import Grid, Offsets, SixBit, Symmetric
from tinychat.quantize.linears import quantized

METHODS = ("awq", "gptq", "rtn", "smoothquant")
BITS = {"awq": (4,), "gptq": (2, 3, 4, 8), "compressed-tensors": (2, 3, 4, 8), "gguf": (4, 8)}
GROUPS = (128, 64, 32)
GGUF_TYPES = {4: ("Q4_K", "Q4_1", "Q4_0"), 8: ("Q8_0",)}
GGUF_GRIDS: dict[str, Grid] = {
    "Q4_0": Symmetric(4, 32, signed=True),
    "Q4_1": Offsets(4, 32),
    "Q4_K": SixBit(),
    "Q5_0": Symmetric(5, 32, signed=True),
    "Q8_0": Symmetric(8, 32, cropped=True),
}
SUBSTITUTE = "Q5_0"  # for Q4_K where 256 does not divide the inputs, as llama.cpp has it


@dataclass(frozen=True)
class Target:
    """What is written.

    format     "awq", "gptq", "compressed-tensors" or "gguf"
    bits       of a code
    group      inputs that share a scale, or ROW for all of them
    symmetric  zero in the middle, none stored
    act_order  gptq's: inputs with large activations first, from wherever they stand
    type       of tensors in a GGUF
    inputs     bits of activations, which the format then promises to round for each token; 0: none
    """

    format: str
    bits: int
    group: int
    symmetric: bool = False
    act_order: bool = False
    type: str = ""
    inputs: int = 0

    @property
    def layout(self) -> str:
        """Word for the tensors of a module: the format's own, or "int-quantized"."""
        return "int-quantized" if self.inputs else self.format

    def grid(self, k: int) -> Grid:
        """The grid of a linear of k inputs."""
        if self.format == "gguf":
            return GGUF_GRIDS[self.type_of(k)]
        group = self.group or k
        if self.symmetric:
            return Symmetric(self.bits, group, cropped=bool(self.inputs))
        return Grid(self.bits, group, lowest=1 if self.format == "gptq" else 0)

    def type_of(self, k: int) -> str:
        """The GGUF type of a linear of k inputs."""
        return SUBSTITUTE if self.type == "Q4_K" and k % SUPER else self.type

    def substitutes(self, cfg: ModelConfig) -> dict[str, int]:
        """How many linears have another GGUF type than the one that was asked for, by that type."""
        if self.format != "gguf":
            return {}
        layers = (quantized(cfg, i) for i in range(cfg.n_layers))
        types = [self.type_of(k) for linears in layers for _, k in linears.values()]
        return {t: types.count(t) for t in dict.fromkeys(types) if t != self.type}

    def facts(self) -> dict[str, Any]:
        """What of it decides the result."""
        facts: dict[str, Any] = {"format": self.format, "bits": self.bits, "group_size": self.group or -1}
        if self.format == "gguf":
            return facts | {"type": self.type}
        facts |= {"symmetric": self.symmetric, "act_order": self.act_order}
        return facts | ({"activation_bits": self.inputs} if self.inputs else {})

    def quantization_config(self, left: Sequence[str]) -> dict[str, Any]:
        """Entry in config.json of a folder. left: modules that stay in 16 bits, by the names in its files."""
        return _CONFIGS[self.format](self, list(left))


def choose(
    cfg: ModelConfig,
    method: str = "awq",
    bits: int | None = None,
    format: str | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    act_order: bool = False,
    type: str | None = None,
) -> Target:
    """The target of these wishes; what is left open is chosen: 4 bits, and what the method needs.
    group_size: -1 for the row.

    Raises UsageError for wishes that do not go together, naming those that do, and UnsupportedModelError for
    a model whose widths the format cannot hold.
    """
    if method not in METHODS:
        raise UsageError(f"The method {method!r} is not known.", f"Use {' or '.join(METHODS)}.")
    if method == "smoothquant":
        return _w8a8(cfg, bits, format, group_size, act_order)
    if bits is None:
        bits = next((width for width, types in GGUF_TYPES.items() if type in types), 4)
    if format is None:
        format = "gguf" if type else "awq" if bits == 4 and method != "gptq" and not symmetric else "gptq"
    if format not in BITS:
        raise UsageError(f"The format {format!r} is not known.", f"Use {_or(BITS)}.")
    if bits not in BITS[format]:
        able = [f for f, widths in BITS.items() if bits in widths]
        hint = f"Use --format {_or(able)}, or --bits {_or(BITS[format])}." if able else None
        raise UsageError(
            f"The format {format} does not hold {bits} bits.", hint or f"Use --bits {_or(BITS[format])}."
        )
    if act_order and (method != "gptq" or format not in ("gptq", "compressed-tensors")):
        what = f"method {method!r}" if method != "gptq" else f"format {format}"
        raise UsageError(
            f"The {what} has no act-order.", "Use --method gptq with --format gptq or compressed-tensors."
        )
    if symmetric and format in ("awq", "gguf"):
        raise UsageError(
            f"The format {format} cannot be asked for symmetric codes.",
            "Use --format gptq or compressed-tensors.",
        )
    if type and (format != "gguf" or type not in GGUF_TYPES[bits]):
        types = GGUF_TYPES.get(bits, ()) if format == "gguf" else ()
        hint = f"Use {_or(types)}." if types else "Use it with --format gguf, or leave it out."
        raise UsageError(f"{type} is no type of {format} with {bits} bits.", hint)
    _check_widths(cfg, format, bits)
    if format == "gguf":
        if group_size not in (None, 32):
            raise UsageError(
                "Groups in a GGUF have 32 inputs.", "Leave --group-size out, or use another --format."
            )
        choose_group(cfg, None)  # refuses inputs that 32 does not divide
        return Target(format, bits, 32, type=type or GGUF_TYPES[bits][0])
    group = choose_group(cfg, group_size)
    return Target(format, bits, group, symmetric, act_order)


def _w8a8(
    cfg: ModelConfig, bits: int | None, format: str | None, group_size: int | None, act_order: bool
) -> Target:
    """SmoothQuant's one target. Raises UsageError where something else was wished for."""
    wishes = {
        "--bits": bits in (None, 8),
        "--format": format in (None, "compressed-tensors"),
        "--group-size": group_size in (None, -1),
        "--act-order": not act_order,
    }
    for option, fits in wishes.items():
        if not fits:
            raise UsageError(
                f"smoothquant has one form, which is not the one that {option} asks for.",
                f"Leave {option} out: 8 bits, one scale a row, format compressed-tensors.",
            )
    choose_group(cfg, None)  # backends run widths that are multiples of 32
    return Target("compressed-tensors", 8, ROW, symmetric=True, inputs=8)


def _each_kind(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Linears of the first layer of each kind."""
    kinds = {(type(layer.mixer), layer.mlp): i for i, layer in reversed(list(enumerate(cfg.layers)))}
    return {name: shape for i in sorted(kinds.values()) for name, shape in quantized(cfg, i).items()}


def _or(words: Any) -> str:
    return " or ".join(map(str, words))


def _check_widths(cfg: ModelConfig, format: str, bits: int) -> None:
    """Raises UnsupportedModelError where the outputs do not fit in the format's words."""
    whole = {"awq": 8, "gptq": 32 if bits == 3 else 32 // bits}.get(format, 1)
    for name, (n, _) in _each_kind(cfg).items():
        if n % whole:
            raise UnsupportedModelError(
                f"{name} has {n} outputs, not a multiple of {whole}, which the format {format} needs.",
                "Use --format compressed-tensors.",
            )


def choose_group(cfg: ModelConfig, wanted: int | None) -> int:
    """The group size: `wanted` (-1: ROW), or the largest of 128, 64, 32 that divides the inputs of every
    linear.

    Raises UsageError when `wanted` does not divide them, naming those that do; UnsupportedModelError when
    none does.
    """
    shapes = _each_kind(cfg)
    fit = [g for g in GROUPS if all(k % g == 0 for _, k in shapes.values())]
    if not fit:
        inputs = sorted({k for _, k in shapes.values()})
        raise UnsupportedModelError(
            f"No group size divides linears with {', '.join(map(str, inputs))} inputs.",
            "Widths must be multiples of 32; run the model unquantized.",
        )
    if wanted is None:
        return fit[0]
    if wanted == -1:
        return ROW
    if wanted not in fit:
        name, k = next(((n, k) for n, (_, k) in shapes.items() if wanted <= 0 or k % wanted), ("", 0))
        why = f"does not divide the {k} inputs of {name}" if name else "is not a size that backends run"
        raise UsageError(
            f"Group size {wanted} {why}.", f"Use {' or '.join(map(str, fit))} (or leave it out: {fit[0]})."
        )
    return wanted


def _awq(t: Target, left: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": t.bits,
        "group_size": t.group or -1,
        "zero_point": True,
        "modules_to_not_convert": left or None,
    }


def _gptq(t: Target, left: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": t.bits,
        "group_size": t.group or -1,
        "desc_act": t.act_order,
        "sym": t.symmetric,
        "checkpoint_format": "gptq",
        "true_sequential": True,
        "lm_head": False,
    }


def _compressed(t: Target, left: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": t.bits,
        "type": "int",
        "symmetric": t.symmetric,
        "strategy": "group" if t.group else "channel",
        "group_size": t.group or None,
        "actorder": "group" if t.act_order else None,
        "dynamic": False,
    }
    inputs = {"num_bits": t.inputs, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if t.inputs else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if t.inputs else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head", *left],
        "kv_cache_scheme": None,
    }


_CONFIGS = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}
