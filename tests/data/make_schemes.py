"""Writes schemes.npz: modules as the formats' own libraries store them, and the weights that these read.

    python tests/data/make_schemes.py SOURCES

wants torch, transformers 5.23, compressed-tensors 0.20.1, bitsandbytes 0.50.2, mlx 0.32.4 (with mlx-cpu), and
in SOURCES the unpacked wheels auto_gptq 0.7.1, auto_round 0.16.1 and nvidia_modelopt 0.47.0 and the source
of gptqmodel 7.7.0, of which single files are run. Arrays are `CASE/PART`; `dtypes` has safetensors' words.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

N, K = 32, 64
SOURCES = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.uint32: "U32",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
arrays: dict[str, np.ndarray] = {}
dtypes: dict[str, str] = {}
configs: dict[str, dict] = {}


def keep(case: str, config: dict, parts: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    """One module: its settings, its tensors, the weight in float32."""
    for part, t in parts.items():
        t = t.detach()
        name = f"{case}/{part}"
        dtypes[name] = DTYPES[t.dtype]
        raw = t.flatten().clone().view(torch.uint8)
        width = {
            "F32": "<f4",
            "F16": "<f2",
            "BF16": "<u2",
            "I32": "<i4",
            "I64": "<i8",
            "U32": "<u4",
            "I8": "i1",
        }
        arrays[name] = raw.numpy().copy().view(width.get(dtypes[name], "u1")).reshape(tuple(t.shape))
    arrays[f"{case}/expected"] = weight.detach().float().numpy()
    configs[case] = config


def package(name: str, path: Path, **members) -> types.ModuleType:
    """A package whose own __init__ is not run."""
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    module.__dict__.update(members)
    sys.modules[name] = module
    return module


def file(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def integers(bits: int, group: int, seed: int, n: int = N, k: int = K, low: int = 0):
    """Codes, zeros, scales and the weight that they are."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), generator=g)
    zeros = torch.randint(low, 1 << bits, (n, k // group), generator=g)
    scales = (torch.rand(n, k // group, generator=g) * 0.1 + 1e-3).half()
    spread = [a.repeat_interleave(group, 1) for a in (zeros, scales.float())]
    return codes, zeros, scales, (codes - spread[0]) * spread[1]


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight.clone()
    return module


def gptq() -> None:
    """AutoGPTQ's own packer, inputs in any order; zeros stay above 0, which version 1 keeps as -1."""
    path = SOURCES / "auto_gptq/auto_gptq/nn_modules/qlinear/qlinear_cuda.py"
    QuantLinear = file("qlinear_cuda", path).QuantLinear
    for bits in (2, 3, 4, 8):
        codes, zeros, scales, _ = integers(bits, 32, bits, low=1)
        groups = torch.arange(K).div(32, rounding_mode="floor")[torch.randperm(K)]
        weight = (codes - zeros[:, groups]) * scales.float()[:, groups]
        q = QuantLinear(bits, 32, K, N, bias=False)
        q.pack(linear(weight), scales.float(), zeros.float(), groups.int())
        parts = {"qweight": q.qweight, "qzeros": q.qzeros, "scales": q.scales, "g_idx": q.g_idx}
        said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "desc_act": True}
        keep(f"gptq {bits}", said, parts, weight)


def auto_round() -> None:
    """Its packing for GPTQ (zero - 1), its own (zeros as they are), and that for AWQ."""
    root = SOURCES / "auto_round"
    package("auto_round", root / "auto_round")
    package("auto_round.utils", root / "auto_round/utils", get_packing_device=lambda device=None: "cpu")
    package("auto_round_extension", root / "auto_round_extension")
    package("auto_round_extension.torch", root / "auto_round_extension/torch")
    ours = importlib.import_module("auto_round_extension.torch.qlinear_torch").QuantLinear
    minus = importlib.import_module("auto_round_extension.torch.qlinear_torch_zp").QuantLinear
    package("auto_round.export", root / "auto_round/export")
    package("auto_round.export.export_to_awq", root / "auto_round/export/export_to_awq")
    awq = importlib.import_module("auto_round.export.export_to_awq.utils").WQLinear_GEMM
    said = {"quant_method": "auto-round", "group_size": 32, "data_type": "int", "iters": 200}
    for bits in (2, 3, 4, 5, 6, 8):
        for name, cls, low in (("auto_round:auto_gptq", minus, 1), ("auto_round:exllamav2", ours, 0)):
            _, zeros, scales, weight = integers(bits, 32, 10 + bits, low=low)
            q = cls(bits, 32, K, N, bias=False)
            q.device = "cpu"
            q.pack(linear(weight), scales.float(), zeros.clone().float(), None, device="cpu")
            parts = {"qweight": q.qweight, "qzeros": q.qzeros, "scales": q.scales}
            keep(f"{name} {bits}", said | {"bits": bits, "packing_format": name}, parts, weight)
    for bits in (4, 5, 6):
        _, zeros, scales, weight = integers(bits, 32, 20 + bits)
        q = awq.from_linear(linear(weight), bits, 32, scales=scales.float().T, zeros=zeros.T, device="cpu")
        parts = {"qweight": q.qweight, "qzeros": q.qzeros, "scales": q.scales}
        packing = "auto_round:auto_awq"
        keep(f"{packing} {bits}", said | {"bits": bits, "packing_format": packing}, parts, weight)


def gptqmodel_awq() -> None:
    pack = file(
        "packing_utils", SOURCES / "gptqmodel-7.7.0/gptqmodel/quantization/awq/utils/packing_utils.py"
    ).pack_awq
    for bits in (2, 3, 4, 8):
        codes, zeros, scales, weight = integers(bits, 32, 30 + bits)
        qweight, qzeros = pack(codes.T.contiguous(), zeros.T.contiguous(), bits)
        said = {"quant_method": "awq", "bits": bits, "group_size": 32, "version": "gemm", "zero_point": True}
        said["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
        keep(f"awq {bits}", said, {"qweight": qweight, "qzeros": qzeros, "scales": scales.T}, weight)


def compressed_tensors() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    def run(case: str, layout: str, weights: dict, state: dict, **inputs) -> None:
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        compressor = BaseCompressor.get_value_from_registry(layout)
        parts = compressor.compress(state, scheme)
        opened = {p: t.float() if t.dtype == torch.bfloat16 else t for p, t in parts.items()}
        if "fp4" in layout:  # it decompresses to bfloat16
            packed, scales = parts["weight_packed"], parts["weight_scale"]
            powers = layout.startswith("mx")
            scales = (scales.float() - 127).exp2() if powers else scales.float()
            codes = unpack_fp4_from_uint8(packed, N, K, dtype=torch.float32)
            whole = parts.get("weight_global_scale")
            truth = dequantize(codes, scales, args=scheme.weights, global_scale=whole, dtype=torch.float32)
        else:
            truth = compressor.decompress(opened, scheme)["weight"]
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs or None}
        said = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
        keep(case, said | {"quantization_status": "compressed", "ignore": ["lm_head"]}, parts, truth)

    for bits in (2, 3, 4, 5, 6, 8):
        for symmetric in (True, False):
            for group in (32, -1):
                seed = 40 + bits + 100 * symmetric + (group == -1) * 1000
                size = K if group == -1 else group
                codes, zeros, scales, _ = integers(bits, size, seed)
                middle = 1 << (bits - 1)
                zeros = torch.full_like(zeros, middle) if symmetric else zeros
                weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
                weights |= (
                    {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
                )
                scales = scales.bfloat16()
                spread = [a.repeat_interleave(size, 1) for a in (zeros, scales.float())]
                state = {"weight": (codes - spread[0]) * spread[1], "weight_scale": scales}
                state["weight_zero_point"] = (zeros - middle).to(torch.int8)
                words = f"{'symmetric' if symmetric else 'zeros'} {'channel' if group == -1 else 'group'}"
                run(f"pack-quantized {bits} {words}", "pack-quantized", weights, state)

    g = torch.Generator().manual_seed(7)
    weight = torch.randn(N, K, generator=g)
    kinds = {
        "tensor": ({"strategy": "tensor"}, (1,)),
        "channel": ({"strategy": "channel"}, (N, 1)),
        "group": ({"strategy": "group", "group_size": 32}, (N, K // 32)),
        "block": ({"strategy": "block", "block_structure": [24, 48]}, (2, 2)),
    }
    activations = {"num_bits": 8, "dynamic": True, "strategy": "token", "type": "int"}
    for name, (strategy, shape) in kinds.items():
        scales = torch.rand(shape, generator=g) * 0.02 + 0.01
        for symmetric in (True, False):
            if name == "block":
                break
            zeros = torch.zeros(shape) if symmetric else torch.randint(-100, 100, shape, generator=g)
            state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros.to(torch.int8)}
            weights = {"num_bits": 8, "type": "int", "symmetric": symmetric} | strategy
            words = f"{name} {'symmetric' if symmetric else 'zeros'}"
            run(f"int-quantized {words}", "int-quantized", weights, state, **activations)
        state = {"weight": weight, "weight_scale": scales.bfloat16()}
        weights = {"num_bits": 8, "type": "float", "symmetric": True} | strategy
        run(f"float-quantized {name}", "float-quantized", weights, state, **activations | {"type": "float"})
        run(f"naive-quantized {name}", "naive-quantized", weights, state)
    group = {"type": "float", "symmetric": True}
    scales = 2.0 ** torch.randint(-9, -3, (N, K // 32), generator=g)
    mx = group | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    state = {"weight": weight, "weight_scale": scales}
    run("mxfp4-pack-quantized", "mxfp4-pack-quantized", mx | {"num_bits": 4}, state)
    run("mxfp8-quantized", "mxfp8-quantized", mx | {"num_bits": 8}, state)
    nv = group | {"strategy": "tensor_group", "group_size": 16, "num_bits": 4}
    scales = (torch.rand(N, K // 16, generator=g) * 400 + 10).to(torch.float8_e4m3fn).float()
    state = {"weight": weight, "weight_scale": scales, "weight_global_scale": torch.tensor([1234.5])}
    state["input_global_scale"] = torch.tensor([17.0])
    run("nvfp4-pack-quantized", "nvfp4-pack-quantized", nv, state)


def transformers_floats() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    g = torch.Generator().manual_seed(8)
    codes = torch.randn(N, K, generator=g).to(torch.float8_e4m3fn)
    opened = Fp8Dequantize(None)._dequantize_one
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        scales = torch.rand(N // 16, K // 32, generator=g).to(dtype)
        parts = {"weight": codes, "weight_scale_inv": scales}
        said = fp8 | {"weight_block_size": [16, 32], "modules_to_not_convert": ["lm_head"]}
        keep(f"fp8 {name}", said, parts, opened(codes, scales, output_dtype=torch.float32))
    one = torch.tensor(0.0123)
    parts = {"weight": codes, "weight_scale_inv": one, "activation_scale": torch.tensor(0.5)}
    said = fp8 | {"weight_block_size": None, "activation_scheme": "static"}
    keep("fp8 tensor", said, parts, opened(codes, one.reshape(1, 1), output_dtype=torch.float32))
    powers = torch.randint(110, 126, (N, K // 32), generator=g, dtype=torch.uint8)
    for name, scales in (("uint8", powers), ("e8m0", powers.view(torch.float8_e8m0fnu))):
        said = fp8 | {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
        truth = opened(codes, scales, output_dtype=torch.float32)
        keep(f"mxfp8 {name}", said, {"weight": codes, "weight_scale_inv": scales}, truth)
    rows = torch.rand(N, 1, generator=g)
    parts = {"weight": codes, "weight_scale": rows, "input_scale_ub": torch.tensor([1200.0])}
    keep(
        "fbgemm_fp8",
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        parts,
        codes.float() * rows,
    )
    blocks = torch.randint(0, 256, (1, N, K // 32, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(110, 140, (1, N, K // 32), generator=g, dtype=torch.uint8)
    truth = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T
    keep("mxfp4 blocks", {"quant_method": "mxfp4"}, {"blocks": blocks[0], "scales": scales[0]}, truth)


def modelopt() -> None:
    """Its dequantization, which is a method of a class that wants the whole package; its table by hand."""
    g = torch.Generator().manual_seed(9)
    codes = torch.randn(N, K, generator=g).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": torch.tensor(0.02), "input_scale": torch.tensor(0.1)}
    said = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    }
    keep("modelopt FP8", said, parts, codes.float() * parts["weight_scale"])
    root = SOURCES / "nvidia_modelopt/modelopt"
    for name in ("modelopt", "modelopt.torch", "modelopt.torch.quantization"):
        package(name, root / Path(*name.split(".")[1:]))
    at = "modelopt.torch.quantization"
    package(f"{at}.backends", root / "x")
    package(f"{at}.backends.utils", root / "x", fp4_compatible=lambda: False)
    none = dict.fromkeys(["reduce_amax", "reduce_block_amax", "reduce_block_padding"])
    package(f"{at}.utils", root / "torch/quantization/utils", **none)
    package(f"{at}.qtensor", root / "torch/quantization/qtensor")
    base = type("BaseQuantizedTensor", (), {"__init__": lambda self, s, d, q: self.__dict__.update(
        metadata={"shape": s, "dtype": d}, _quantized_data=q)})  # fmt: skip
    package(f"{at}.qtensor.base_qtensor", root / "x", BaseQuantizedTensor=base)
    cls = importlib.import_module(f"{at}.qtensor.nvfp4_tensor").NVFP4QTensor
    packed = torch.randint(0, 256, (N, K // 2), generator=g, dtype=torch.uint8)
    scales = (torch.rand(N, K // 16, generator=g) * 400).to(torch.float8_e4m3fn)
    whole = torch.tensor(0.00123)
    q = cls((N, K), torch.float32, packed)
    truth = q.dequantize(scale=scales, double_scale=whole, block_sizes={-1: 16})
    parts = {
        "weight": packed,
        "weight_scale": scales,
        "weight_scale_2": whole,
        "input_scale": torch.tensor(0.1),
    }
    keep("modelopt NVFP4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, parts, truth)


def bitsandbytes() -> None:
    import bitsandbytes.functional as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    g = torch.Generator().manual_seed(11)
    for case, shape, nested in (("nested", (N, K), True), ("plain", (N, K), False), ("rows", (34, 96), True)):
        weight = torch.randn(shape, generator=g).half()
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
        parts = {"weight": packed} | {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
        sizes = state.absmax
        if nested:
            sizes = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        # what CUDA computes too; its kernel for the CPU begins a block with each row
        flat = packed.reshape(-1)
        truth = _dequantize_4bit_compute(flat, sizes.float(), state.code, 64, shape, torch.float32)
        said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        keep(f"nf4 {case}", said | {"bnb_4bit_use_double_quant": nested}, parts, truth)
    weight = torch.randn(N, K, generator=g).half()
    codes, rows, _ = bnb.int8_vectorwise_quant(weight)
    parts = {"weight": codes, "SCB": rows, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    truth = bnb.int8_vectorwise_dequant(codes, rows)
    keep("llm.int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, parts, truth)


def mlx() -> None:
    import mlx.core as mx

    def torched(a) -> torch.Tensor:
        if a.dtype == mx.bfloat16:
            return torch.from_numpy(np.array(a.view(mx.uint16)).astype(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.array(a))

    rng = np.random.default_rng(12)
    weight = mx.array(rng.normal(size=(N, K)).astype(np.float32))
    for bits in (2, 3, 4, 5, 6, 8):
        for dtype in (mx.float16, mx.bfloat16):
            w, scales, biases = mx.quantize(weight.astype(dtype), 32, bits)
            wide = [a.astype(mx.float32) for a in (scales, biases)]
            truth = torched(mx.dequantize(w, *wide, 32, bits))
            parts = {"weight": torched(w), "scales": torched(scales), "biases": torched(biases)}
            name = f"mlx {bits} {str(dtype).rpartition('.')[2]}"
            keep(name, {"mlx": {"group_size": 32, "bits": bits}}, parts, truth)
    for mode, bits, group in (("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)):
        w, scales = mx.quantize(weight, group, bits, mode=mode)
        truth = torched(mx.dequantize(w, scales, None, group, bits, mode=mode).astype(mx.float32))
        said = {"mlx": {"group_size": group, "bits": bits, "mode": mode}}
        keep(f"mlx {mode}", said, {"weight": torched(w), "scales": torched(scales)}, truth)


if __name__ == "__main__":
    for make in (gptq, auto_round, gptqmodel_awq, compressed_tensors):
        make()
    for make in (transformers_floats, modelopt, bitsandbytes, mlx):
        make()
    text = json.dumps({"dtypes": dtypes, "configs": configs}).encode()
    np.savez_compressed(
        Path(__file__).with_name("schemes.npz"), facts=np.frombuffer(text, np.uint8), **arrays
    )
    print(len(configs), "cases")
