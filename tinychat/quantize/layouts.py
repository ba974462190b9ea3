"""How a finished block is stored in a format's own tensors, and read again when a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tinychat.formats import awq, gguf_metadata, gptq
from tinychat.formats.gguf_pack import PACK
from tinychat.models import FAMILIES
from tinychat.network.config import ModelConfig
from tinychat.network.weights import DenseLinear, QuantizedLinear
from tinychat.quantize.forward import apart, network
from tinychat.quantize.nodes import BlockWeights
from tinychat.quantize.target import Target

if TYPE_CHECKING:
    from tinychat.quantize.block import QuantizedBlock

Tensors = dict[str, np.ndarray]


def packed(block: QuantizedBlock, cfg: ModelConfig, target: Target) -> Tensors:
    """A block's tensors as its family's files have them: fused linears in one, norms without their offset."""
    import torch

    prefix = f"model.layers.{block.layer}."
    out: Tensors = {}
    of = network(cfg).parts(block.layer)
    for name in (whole.removeprefix(prefix) for whole in FAMILIES[cfg.family].linears(cfg, block.layer)):
        parts = tuple(of[name]) or (name,)
        rounded = block.linear[parts[0]].stacked([block.linear[p] for p in parts[1:]])
        bias = torch.cat([block.bias[p] for p in parts]) if parts[0] in block.bias else None
        linear = rounded.canonical(bias)
        gguf = target.format == "gguf"
        own = _blocks(linear, prefix + name, cfg, target) if gguf else _PACK[target.format](linear)
        out |= {f"{prefix}{name}.{part}": a for part, a in own.items()}
    for name, v in block.norm.items():
        out[f"{prefix}{name}.weight"] = v.numpy() if target.format == "gguf" else as_stored(v.numpy(), cfg)
    return out


def as_stored(norm: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """A norm in float16, less what its family adds to what files hold."""
    with np.errstate(over="ignore"):
        return (norm - np.float32(FAMILIES[cfg.family].NORM_OFFSET)).astype(np.float16)


def unpacked(tensors: Tensors, cfg: ModelConfig, layer: int, target: Target) -> BlockWeights:
    """The block that `packed` gave these tensors of."""
    import torch

    w, prefix = BlockWeights({}, layer=layer), f"model.layers.{layer}."
    for key, a in tensors.items():
        name, _, part = key.removeprefix(prefix).rpartition(".")
        if part in CODES:
            own = f"{prefix}{name}."
            parts = {k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)}
            linear = _floats(parts, own[:-1], cfg) if target.format == "gguf" else _unpack(parts, target)
            w.linear |= apart(cfg, layer, name, torch.from_numpy(linear.dequantize()))
            if linear.bias is not None:
                w.bias |= apart(cfg, layer, name, torch.from_numpy(linear.bias))
        elif part == "weight":
            offset = np.float32(0 if target.format == "gguf" else FAMILIES[cfg.family].NORM_OFFSET)
            w.norm[name] = torch.from_numpy(a.astype(np.float32) + offset)
    return w


def _blocks(linear: QuantizedLinear, name: str, cfg: ModelConfig, target: Target) -> Tensors:
    """A linear's rows as GGUF's blocks, by the name of their type, and its bias."""
    kind = target.type_of(linear.shape[1])
    order = gguf_metadata.in_file_order(gguf_metadata.architecture(cfg)[1], cfg, name)
    parts = {kind: PACK[kind](linear)}
    if linear.bias is not None:
        parts["bias"] = linear.bias.astype(np.float32)
    return parts if order is None else {part: a[order] for part, a in parts.items()}


def _floats(parts: Tensors, name: str, cfg: ModelConfig) -> DenseLinear:
    """The weight that `_blocks` gave these parts of."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    (kind,) = parts.keys() & PACK.keys()
    weight, bias = dequantize(parts[kind], GGMLQuantizationType[kind]), parts.get("bias")
    order = gguf_metadata.in_file_order(gguf_metadata.architecture(cfg)[1], cfg, name)
    if order is None:
        return DenseLinear(weight, bias)
    back = np.argsort(order)
    return DenseLinear(weight[back], None if bias is None else bias[back])


_PACK = {"awq": awq.pack, "gptq": gptq.pack, "compressed-tensors": gptq.pack_compressed}


CODES = ("qweight", "weight_packed", *PACK)  # a module that has one of these parts is quantized


def _unpack(parts: Tensors, target: Target) -> QuantizedLinear:
    bias = parts["bias"].astype(np.float32) if "bias" in parts else None
    if target.format == "awq":
        return awq.unpack(parts["qweight"], parts["qzeros"], parts["scales"], bias)
    if target.format == "gptq":
        codes = parts["qweight"], parts["qzeros"], parts["scales"]
        return gptq.unpack(*codes, parts["g_idx"], version=1, bias=bias, bits=target.bits)
    zeros, g_idx = parts.get("weight_zero_point"), parts.get("weight_g_idx")
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    return gptq.unpack_compressed(packed, scales, zeros, g_idx, bias, target.bits)
