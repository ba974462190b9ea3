"""How a finished block is stored, and read again when a run goes on: AutoAWQ's `gemm`, or GPTQ version 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tinychat.formats import awq, gptq
from tinychat.models import FAMILIES
from tinychat.network.config import ModelConfig
from tinychat.network.weights import QuantizedLinear
from tinychat.quantize.forward import apart, network
from tinychat.quantize.nodes import BlockWeights

if TYPE_CHECKING:
    from tinychat.quantize.block import QuantizedBlock

Tensors = dict[str, np.ndarray]


def quantization_config(job: dict[str, Any]) -> dict[str, Any]:
    """Entry in config.json of the folder that `job` makes."""
    if job["method"] == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": job["group_size"],
            "desc_act": job["act_order"],
            "sym": False,
            "checkpoint_format": "gptq",
            "true_sequential": True,
            "lm_head": False,
        }
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": job["group_size"],
        "zero_point": True,
        "modules_to_not_convert": None,
    }


def packed(block: QuantizedBlock, cfg: ModelConfig, method: str) -> Tensors:
    """A block's tensors as its family's files have them: fused linears in one, norms without their offset."""
    import torch

    pack = gptq.pack if method == "gptq" else awq.pack
    prefix = f"model.layers.{block.layer}."
    out: Tensors = {}
    of = network(cfg).parts(block.layer)
    for name in (whole.removeprefix(prefix) for whole in FAMILIES[cfg.family].linears(cfg, block.layer)):
        parts = tuple(of[name]) or (name,)
        rounded = block.linear[parts[0]].stacked([block.linear[p] for p in parts[1:]])
        bias = torch.cat([block.bias[p] for p in parts]) if parts[0] in block.bias else None
        out |= {f"{prefix}{name}.{part}": a for part, a in pack(rounded.canonical(bias)).items()}
    for name, v in block.norm.items():
        out[f"{prefix}{name}.weight"] = as_stored(v.numpy(), cfg)
    return out


def as_stored(norm: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """A norm in float16, less what its family adds to what files hold."""
    with np.errstate(over="ignore"):
        return (norm - np.float32(FAMILIES[cfg.family].NORM_OFFSET)).astype(np.float16)


def unpacked(tensors: Tensors, cfg: ModelConfig, layer: int, method: str) -> BlockWeights:
    """The block that `packed` gave these tensors of."""
    import torch

    w, prefix = BlockWeights({}, layer=layer), f"model.layers.{layer}."
    for key, a in tensors.items():
        name, _, part = key.removeprefix(prefix).rpartition(".")
        if part == "qweight":
            own = f"{prefix}{name}."
            parts = {k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)}
            linear = _unpack(parts, method)
            w.linear |= apart(cfg, layer, name, torch.from_numpy(linear.dequantize()))
            if linear.bias is not None:
                w.bias |= apart(cfg, layer, name, torch.from_numpy(linear.bias))
        elif part == "weight":
            offset = np.float32(FAMILIES[cfg.family].NORM_OFFSET)
            w.norm[name] = torch.from_numpy(a.astype(np.float32) + offset)
    return w


def _unpack(parts: Tensors, method: str) -> QuantizedLinear:
    bias, codes = parts.get("bias"), (parts["qweight"], parts["qzeros"], parts["scales"])
    if method != "gptq":
        return awq.unpack(*codes, bias)
    bias = None if bias is None else bias.astype(np.float32)
    return gptq.unpack(*codes, parts["g_idx"], version=1, bias=bias)
