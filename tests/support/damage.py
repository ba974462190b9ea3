"""Sound tiny checkpoints of every kind, and ways to damage them: what the tests of damaged files share."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import packers
from families import CASES, experts_apart, random_model
from family_gguf import write as write_gguf
from safetensors.numpy import save_file

from tinychat.formats import awq, open_checkpoint
from tinychat.formats.hf import read_config
from tinychat.models import FAMILIES
from tinychat.network.weights import quantize_rtn

FOLDERS = {
    "qwen2": (CASES["qwen2 yarn"], "gptq"),
    "gemma3": (CASES["gemma3"], "awq"),
    "phi3": (CASES["phi3 longrope"], "compressed-tensors"),
    "smollm3": (CASES["smollm3"], None),
    "granite": (CASES["granite"], "gemv_fast"),
    "qwen3moe": (CASES["qwen3moe dense layers"], "gptq"),
    "mixtral": (CASES["mixtral"], None),
}
GGUFS = {"qwen3": "qwen3", "gemma3": "gemma3", "phi3 longrope": "phi3", "granite": "granite"} | {
    "mixtral window": "llama",
    "qwen3moe": "qwen3moe",
}
JUNK = [
    None, 0, -1, 1, 7, 1 << 31, 1 << 62, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "1", True,
    False, [], [None], [1] * 5000, {}, {"a": {}}, {"factor": -1}, "sliding_attention", ["full_attention"],
]  # fmt: skip
WEIGHTS = dict(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32)
CONFIGS = {
    "awq": dict(quant_method="awq", bits=4, group_size=32, version="gemm"),
    "gemv_fast": dict(quant_method="awq", bits=4, group_size=32, version="gemv_fast"),
    "gptq": dict(quant_method="gptq", bits=4, group_size=32, desc_act=True),
    "compressed-tensors": dict(
        quant_method="compressed-tensors", format="pack-quantized", config_groups={"g": {"weights": WEIGHTS}}
    ),
}
PACK = {
    "awq": awq.pack,
    "gemv_fast": lambda w: packers.autoawq_gemv_fast(w.codes, w.zeros, w.scales),
    "gptq": lambda w: packers.gptq(w.codes, w.zeros, w.scales, np.arange(w.shape[1]) // 32, 1),
    "compressed-tensors": lambda w: packers.compressed_tensors(w.codes, w.zeros, w.scales),
}


def sound_models(root: Path) -> dict[str, Path]:
    """Folders and files with nothing wrong, written into `root`, by name."""
    from tiny import byte_tokenizer

    root.mkdir(exist_ok=True)
    out: dict[str, Path] = {}
    for name, ((cls, changes), quantization) in FOLDERS.items():
        hf = random_model(cls, **changes)
        folder = out[name] = root / name
        folder.mkdir()
        settings = hf.config.to_dict() | {"architectures": [cls]}
        state = hf.state_dict() if quantization is None else experts_apart(hf.state_dict())
        tensors = {k: t.detach().numpy().copy() for k, t in state.items()}
        if hf.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        if quantization:
            settings["quantization_config"] = CONFIGS[quantization]
            cfg = read_config(settings)
            for linear in FAMILIES[cfg.family].linears(cfg, 1):
                if linear.endswith("mlp.gate"):
                    continue
                w = quantize_rtn(tensors.pop(f"{linear}.weight"), 32)
                tensors |= {f"{linear}.{part}": a for part, a in PACK[quantization](w).items()}
        (folder / "config.json").write_text(json.dumps(settings))
        save_file(tensors, folder / "model.safetensors")
        byte_tokenizer().save(folder)
    for case, arch in GGUFS.items():
        cls, changes = CASES[case]
        out[f"{arch}.gguf"] = root / f"{arch}.gguf"
        write_gguf(out[f"{arch}.gguf"], random_model(cls, **changes), arch)
    for path in out.values():
        read(path)
    return out


def read(path) -> None:
    """Everything that loading asks of a checkpoint."""
    c = open_checkpoint(path)
    cfg = c.config
    c.linear("model.embed_tokens")
    for layer in range(min(cfg.n_layers, 8)):
        for name in FAMILIES[cfg.family].linears(cfg, layer):
            c.linear(name).dequantize()
        for name in FAMILIES[cfg.family].norms(cfg, layer):
            c.vector(name)
    c.vector("model.norm")
    c.fingerprint()
    c.tokenizer()


def damage_json(rng, config: dict) -> dict:
    """A few values of a config, at any depth, replaced, removed or added."""
    config = copy.deepcopy(config)
    for _ in range(rng.integers(1, 4)):
        at = config
        while True:
            key = rng.choice(sorted(map(str, at)) or ["new"])
            if isinstance(at.get(key), dict) and at[key] and rng.random() < 0.6:
                at = at[key]
                continue
            break
        if rng.random() < 0.15:
            at.pop(key, None)
        else:
            at[key] = copy.deepcopy(JUNK[rng.integers(len(JUNK))])
    return config


def damage_tensors(rng, tensors: dict) -> dict:
    """A tensor dropped, renamed, of another shape or dtype, or full of junk."""
    out = dict(tensors)
    for _ in range(rng.integers(1, 3)):
        name = rng.choice(sorted(out))
        a, kind = out.pop(name), rng.integers(5)
        if kind == 1:
            out[name.replace("0", "1")] = a
        elif kind == 2:
            out[name] = np.ascontiguousarray(a.reshape(-1)[: max(1, a.size // 2)])
        elif kind == 3:
            out[name] = a.astype(rng.choice(["int8", "int64", "float64", "float16", "int32", "int16"]))
        elif kind == 4:
            junk = rng.integers(0, 256, a.nbytes, dtype=np.uint8)
            out[name] = junk.view(a.dtype).reshape(a.shape)
    return out


def damage_bytes(rng, content: bytes, within: int) -> bytes:
    """Bytes near the beginning overwritten, or the end cut off."""
    out = bytearray(content)
    for at in rng.integers(0, min(within, len(out)), rng.integers(1, 5)):
        out[at] = rng.integers(256)
    return bytes(out[: rng.integers(len(out))]) if rng.random() < 0.2 else bytes(out)
