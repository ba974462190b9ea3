"""How a finished block is stored in a format's own tensors, and read again when a run goes on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from tinychat.formats import awq, gguf_metadata, gptq
from tinychat.formats.gguf_blocks import UNPACK
from tinychat.formats.gguf_pack import PACK
from tinychat.models import FAMILIES
from tinychat.network.config import ModelConfig
from tinychat.network.family import FromGGUF, FromHF, Kept, in_file_order, kept
from tinychat.network.weights import QuantizedLinear
from tinychat.quantize.forward import apart, network
from tinychat.quantize.linears import apart as apart_again
from tinychat.quantize.linears import in_one, quantized, staying
from tinychat.quantize.nodes import BlockWeights
from tinychat.quantize.target import Target

if TYPE_CHECKING:
    from tinychat.quantize.block import QuantizedBlock

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class StoredBlock:
    """A block as files have it, by the names inside it: fused linears in one; norms float32, as they are
    multiplied by; whole: what stays as it is stored, float32, in 16 bits where these hold it.
    """

    layer: int
    linear: dict[str, QuantizedLinear]
    norm: dict[str, np.ndarray]
    whole: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, block: QuantizedBlock, cfg: ModelConfig) -> StoredBlock:
        """The block that a quantizer has made."""
        import torch

        linear, of = {}, network(cfg).parts(block.layer)
        for name in _names(cfg, block.layer):
            parts = tuple(of[name]) or (name,)
            rounded = block.linear[parts[0]].stacked([block.linear[p] for p in parts[1:]])
            bias = torch.cat([block.bias[p] for p in parts]) if parts[0] in block.bias else None
            linear[name] = rounded.canonical(bias)
        stay = staying(cfg, block.layer)
        norms = {name: v.numpy() for name, v in block.norm.items() if name not in stay}
        return cls(block.layer, linear, norms, {name: block.norm[name].numpy() for name in stay})

    def tensors(self, cfg: ModelConfig, target: Target) -> Tensors:
        """The tensors of its family's files; in a folder norms are without their offset."""
        gguf, prefix, out = target.format == "gguf", f"model.layers.{self.layer}.", Tensors()
        for name, linear in self.linear.items():
            whole = prefix + name
            order = in_file_order(_form(cfg, gguf), cfg, whole)
            linear = linear if order is None else linear.reordered(order)
            own = _blocks(linear, target) if gguf else _PACK[target.layout](linear)
            out |= {f"{whole}.{part}": a for part, a in own.items()}
        for name, v in self.norm.items():
            out |= {f"{prefix}{name}.weight": v} if gguf else as_stored(prefix + name, v, cfg)
        for name, v in in_one(cfg, self.layer, self.whole).items():
            out[f"{prefix}{name}.weight"] = v if gguf else _in_few_bits(v)
        return out

    @classmethod
    def read(cls, tensors: Tensors, cfg: ModelConfig, layer: int, target: Target) -> StoredBlock:
        """The block that `tensors` gave these of."""
        gguf, prefix, out = target.format == "gguf", f"model.layers.{layer}.", cls(layer, {}, {})
        for name in _names(cfg, layer):
            own = f"{prefix}{name}."
            parts = {k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)}
            linear = _of_blocks(parts) if gguf else _unpack(parts, target)
            order = in_file_order(_form(cfg, gguf), cfg, own[:-1])
            out.linear[name] = linear if order is None else linear.reordered(np.argsort(order))
        for name, shape in FAMILIES[cfg.family].norms(cfg, layer).items():
            form = Kept() if gguf else kept(FAMILIES[cfg.family], name)
            stored = tensors[form.tensor(name)].astype(np.float32).reshape(shape)
            out.norm[name.removeprefix(prefix)] = form.read(stored)
        held = {k.removeprefix(prefix).removesuffix(".weight"): v for k, v in tensors.items()}
        out.whole.update(apart_again(cfg, layer, held))
        return out

    def weights(self, cfg: ModelConfig) -> BlockWeights:
        """Dequantized, for the forward pass."""
        import torch

        w = BlockWeights({}, layer=self.layer)
        for name, linear in self.linear.items():
            w.linear |= apart(cfg, self.layer, name, torch.from_numpy(linear.dequantize()))
            if linear.bias is not None:
                w.bias |= apart(cfg, self.layer, name, torch.from_numpy(linear.bias))
        w.norm = {name: torch.from_numpy(v) for name, v in {**self.norm, **self.whole}.items()}
        return w


def packed(block: QuantizedBlock, cfg: ModelConfig, target: Target) -> Tensors:
    """A block's tensors as its family's files have them."""
    return StoredBlock.of(block, cfg).tensors(cfg, target)


def unpacked(tensors: Tensors, cfg: ModelConfig, layer: int, target: Target) -> BlockWeights:
    """The block that `packed` gave these tensors of."""
    return StoredBlock.read(tensors, cfg, layer, target).weights(cfg)


def as_stored(name: str, norm: np.ndarray, cfg: ModelConfig) -> Tensors:
    """A norm, or what else a block has beside linears, as its family's folders hold it, in float16."""
    own = kept(FAMILIES[cfg.family], name)
    with np.errstate(over="ignore"):
        return {own.tensor(name): own.write(norm).astype(np.float16)}


def _names(cfg: ModelConfig, layer: int) -> list[str]:
    """The linears of a block by their names inside it."""
    prefix = f"model.layers.{layer}."
    return [name.removeprefix(prefix) for name in quantized(cfg, layer)]


def _in_few_bits(a: np.ndarray) -> np.ndarray:
    """float32 as float16, where that holds it exactly."""
    with np.errstate(over="ignore"):
        half = a.astype(np.float16)
    return half if np.array_equal(half, a) else a


def _int_quantized(weight: QuantizedLinear) -> Tensors:
    """compressed-tensors' `int-quantized`: weight int8 [N, K], weight_scale float16 [N, 1], bias."""
    codes = weight.codes if weight.zeros is None else (weight.codes ^ 0x80).view(np.int8)  # less 128
    out = {"weight": codes, "weight_scale": np.asarray(weight.scales)}
    return out if weight.bias is None else out | {"bias": weight.bias.astype(np.float16)}


def _form(cfg: ModelConfig, gguf: bool) -> FromHF | FromGGUF:
    """How the family's files hold its linears."""
    return gguf_metadata.architecture(cfg)[1] if gguf else next(iter(FAMILIES[cfg.family].HF.values()))


def _blocks(linear: QuantizedLinear, target: Target) -> Tensors:
    """A linear's rows as GGUF's blocks, by the name of their type, and its bias."""
    kind = target.type_of(linear.shape[1])
    parts = {kind: PACK[kind](linear)}
    if linear.bias is not None:
        parts["bias"] = linear.bias.astype(np.float32)
    return parts


def _of_blocks(parts: Tensors) -> QuantizedLinear:
    """The linear that `_blocks` gave these parts of."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    ((kind, rows),) = ((part, a) for part, a in parts.items() if part in PACK)
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    linear = UNPACK[kind](rows.reshape(len(rows), -1, size))
    return replace(linear, bias=parts.get("bias"))


_PACK = {
    "awq": awq.pack,
    "gptq": gptq.pack,
    "compressed-tensors": gptq.pack_compressed,
    "int-quantized": _int_quantized,
}


def _unpack(parts: Tensors, target: Target) -> QuantizedLinear:
    bias = parts["bias"].astype(np.float32) if "bias" in parts else None
    if target.layout == "int-quantized":
        return QuantizedLinear(parts["weight"], parts["weight_scale"], bias=bias, bits=8)
    if target.layout == "awq":
        return awq.unpack(parts["qweight"], parts["qzeros"], parts["scales"], bias)
    if target.layout == "gptq":
        codes = parts["qweight"], parts["qzeros"], parts["scales"]
        return gptq.unpack(*codes, parts["g_idx"], version=1, bias=bias, bits=target.bits)
    zeros, g_idx = parts.get("weight_zero_point"), parts.get("weight_g_idx")
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    return gptq.unpack_compressed(packed, scales, zeros, g_idx, bias, target.bits)
