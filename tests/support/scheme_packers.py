"""Modules in every scheme of quantized folders, filled at random: what loads, runs, and is damaged in tests.

What the numbers mean is compared with the formats' own libraries elsewhere (`test_schemes.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from tinychat.formats import nibbles
from tinychat.network.weight_form import TABLES

Parts = dict[str, np.ndarray]
U8 = np.uint8


def words(rng, rows: int, count: int, bits: int, dtype=np.int32) -> np.ndarray:
    return nibbles.pack(rng.integers(0, 1 << bits, (rows, count)).astype(U8), bits).view(dtype)


def scales(rng, shape, spread: float, k: int) -> np.ndarray:
    """Scales for codes of that spread, so that weights are as large as those of a fresh linear."""
    return (rng.uniform(0.5, 1.5, shape) * 1.2 / np.sqrt(k) / spread).astype(np.float32)


def integer_spread(bits: int) -> float:
    return max(1.0, (1 << bits) / np.sqrt(12))


def gptq(bits: int):
    def make(rng, n, k) -> Parts:
        zeros = np.full((k // 32, n), (1 << (bits - 1)) - 1, U8)
        return {
            "qweight": np.ascontiguousarray(words(rng, n, k, bits).T),
            "qzeros": nibbles.pack(zeros, bits),
            "scales": scales(rng, (k // 32, n), integer_spread(bits), k).astype(np.float16),
        }

    return make


def awq(bits: int):
    def make(rng, n, k) -> Parts:
        return {
            "qweight": words(rng, k, n, bits),
            "qzeros": nibbles.pack(np.full((k // 32, n), 1 << (bits - 1), U8), bits),
            "scales": scales(rng, (k // 32, n), integer_spread(bits), k).astype(np.float16),
        }

    return make


def packed(bits: int, group: int):
    def make(rng, n, k) -> Parts:
        return {
            "weight_packed": words(rng, n, k, bits),
            "weight_scale": scales(rng, (n, k // group), integer_spread(bits), k),
            "weight_shape": np.array([n, k], np.int64),
        }

    return make


def int8(rng, n, k) -> Parts:
    codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
    return {"weight": codes, "weight_scale": scales(rng, (n, 1), 73, k).astype(np.float16)}


def llm_int8(rng, n, k) -> Parts:
    codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
    order = np.zeros((), U8)
    return {"weight": codes, "SCB": scales(rng, n, 73 / 127, k), "weight_format": order}


def e4m3(rng, n, k) -> np.ndarray:
    return rng.integers(0x28, 0x48, (n, k)).astype(U8) | (rng.integers(0, 2, (n, k)) << 7).astype(U8)


def fp8(rng, n, k) -> Parts:
    shape = (-(-n // 48), -(-k // 48))
    return {"weight": e4m3(rng, n, k), "weight_scale_inv": scales(rng, shape, 1.5, k)}


def fp8_rows(rng, n, k) -> Parts:
    return {
        "weight": e4m3(rng, n, k),
        "weight_scale": scales(rng, (n, 1), 1.5, k),
        "input_scale": np.ones(1, np.float32),
    }


def fp4(rng, n, k) -> np.ndarray:
    return rng.integers(0, 256, (n, k // 2)).astype(U8)


def powers(rng, n, k) -> np.ndarray:
    return (rng.integers(126, 128, (n, k // 32)) - np.rint(np.log2(np.sqrt(k) * 2))).astype(U8)


def mxfp4(rng, n, k) -> Parts:
    return {"weight_packed": fp4(rng, n, k), "weight_scale": powers(rng, n, k)}


def nvfp4(rng, n, k) -> Parts:
    codes = rng.integers(0x70, 0x7E, (n, k // 16)).astype(U8)  # 128 to 448
    return {
        "weight": fp4(rng, n, k),
        "weight_scale": codes,
        "weight_scale_2": np.array(1.2 / np.sqrt(k) / 3 / 250, np.float32),
    }


def nf4(rng, n, k) -> Parts:
    blocks = -(-n * k // 64)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [n, k]}
    state |= {"nested_blocksize": 256, "nested_offset": 0.05, "nested_dtype": "float32"}
    text = json.dumps(state).encode()
    return {
        "weight": rng.integers(0, 256, (n * k // 2, 1)).astype(U8),
        "weight.absmax": rng.integers(0, 256, blocks).astype(U8),
        "weight.nested_absmax": np.full(-(-blocks // 256), 2.0 / np.sqrt(k), np.float32),
        "weight.nested_quant_map": np.linspace(0.2, 1, 256).astype(np.float32),
        "weight.quant_map": TABLES["nf4"],
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(text, U8),
    }


def mlx(bits: int):
    def make(rng, n, k) -> Parts:
        s = scales(rng, (n, k // 32), integer_spread(bits), k)
        s = (s.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16
        biases = -(s.astype(np.uint32) << 16).view(np.float32) * np.float32(1 << (bits - 1))
        low = (biases.view(np.uint32) >> 16).astype(np.uint16)
        return {"weight": words(rng, n, k, bits, np.uint32), "scales": s, "biases": low}

    return make


def mlx_mxfp4(rng, n, k) -> Parts:
    return {"weight": words(rng, n, k, 4, np.uint32), "scales": powers(rng, n, k)}


# dtypes that the arrays do not tell, by part
DTYPES = {
    "fp8": {"weight": "F8_E4M3"},
    "fp8 rows": {"weight": "F8_E4M3"},
    "nvfp4": {"weight_scale": "F8_E4M3"},
}


def compressed(layout: str, **weights) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    said = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
    return {"quantization_config": said}


def quantization(method: str, **said) -> dict:
    return {"quantization_config": {"quant_method": method} | said}


# name → what config.json says, and what makes a module [n, k]
SCHEMES: dict[str, tuple[dict, Callable[..., Parts]]] = {
    "gptq 2": (quantization("gptq", bits=2, group_size=32), gptq(2)),
    "gptq 3": (quantization("gptq", bits=3, group_size=32), gptq(3)),
    "gptq 8": (quantization("gptq", bits=8, group_size=32), gptq(8)),
    "awq 3": (
        quantization("awq", bits=3, group_size=32, version="gemm", meta={"quantizer": "gptqmodel:7.7.0"}),
        awq(3),
    ),
    "auto-round 5": (
        quantization("auto-round", bits=5, group_size=32, packing_format="auto_round:auto_gptq"),
        gptq(5),
    ),
    "packed 6": (compressed("pack-quantized", num_bits=6, strategy="group", group_size=32), packed(6, 32)),
    "int8": (compressed("int-quantized", num_bits=8, strategy="channel"), int8),
    "llm.int8": (quantization("bitsandbytes", load_in_8bit=True), llm_int8),
    "fp8": (quantization("fp8", weight_block_size=[48, 48]), fp8),
    "fp8 rows": (compressed("float-quantized", num_bits=8, type="float", strategy="channel"), fp8_rows),
    "mxfp4": (
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        mxfp4,
    ),
    "nvfp4": (quantization("modelopt", quant_algo="NVFP4"), nvfp4),
    "nf4": (quantization("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"), nf4),
    "mlx 3": ({"quantization": {"group_size": 32, "bits": 3}}, mlx(3)),
    "mlx mxfp4": ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, mlx_mxfp4),
}
