"""Sound tiny checkpoints of every kind, and ways to damage them: what the tests of damaged files share."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import packers
import raw_safetensors
from families import CASES, experts_apart, random_model
from family_gguf import write as write_gguf
from ggml_blocks import HALVES, Kind
from safetensors.numpy import save_file
from scheme_packers import DTYPES, SCHEMES

from tinychat.backends import cpu_pack
from tinychat.backends.exact_form import ExactForm
from tinychat.formats import awq, open_checkpoint
from tinychat.formats.gguf_file import GGUFFile
from tinychat.formats.hf import read_config
from tinychat.models import FAMILIES
from tinychat.network.weight_policy import WeightPolicy
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
    hf = random_model("LlamaForCausalLM", num_hidden_layers=2, tie_word_embeddings=True)
    for scheme in SCHEMES:
        out[scheme] = root / scheme
        _in_scheme(hf, out[scheme], scheme)
    for case, arch in GGUFS.items():
        cls, changes = CASES[case]
        out[f"{arch}.gguf"] = root / f"{arch}.gguf"
        write_gguf(out[f"{arch}.gguf"], random_model(cls, **changes), arch)
    out |= quantized_models(root)
    for path in out.values():
        read(path)
    return out


def quantized_models(root: Path) -> dict[str, Path]:
    """GGUF files whose tensors take all types in turn: one of a Llama, one with experts."""
    wide = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    experts = dict(num_local_experts=2, num_experts_per_tok=1, num_hidden_layers=1)
    models = {
        "types.gguf": random_model("LlamaForCausalLM", **wide),
        "expert types.gguf": random_model("MixtralForCausalLM", **wide | experts),
    }
    for name, hf in models.items():
        kinds = itertools.cycle(HALVES)
        if "expert" in name:  # those that the other one has in small tensors
            kinds = itertools.cycle([Kind.Q3_K, Kind.MXFP4, Kind.IQ4_XS, Kind.NVFP4, Kind.Q2_K])
        write_gguf(root / name, hf, "llama", lambda n, k=kinds: None if "gate_inp" in n else next(k))
    return {name: root / name for name in models}


def damage_blocks(rng, path: Path) -> bytes:
    """Content of a GGUF with some bytes of one tensor overwritten: all bits set, no numbers, or any."""
    out, tensors = bytearray(path.read_bytes()), list(GGUFFile(path).tensors.values())
    tensor = tensors[rng.integers(len(tensors))]
    start, size = tensor.start, tensor.n_bytes
    n = min(size, int(rng.choice([1, 2, 4, 600])))
    for at in rng.integers(0, size - n + 1, rng.integers(1, 4)):
        junk = rng.choice([0xFF, 0x7F, 0x7C, 0xFC]) if rng.random() < 0.7 else rng.integers(256, size=n)
        out[start + at : start + at + n] = bytes(np.broadcast_to(junk, n).astype(np.uint8))
    return bytes(out)


def _in_scheme(hf, folder: Path, scheme: str) -> None:
    """The model with the linears of one layer in a scheme of quantized folders."""
    from tiny import byte_tokenizer

    (said, make), rng = SCHEMES[scheme], np.random.default_rng(0)
    tensors = {k: t.detach().numpy() for k, t in hf.state_dict().items() if k != "lm_head.weight"}
    dtypes: dict[str, str] = {}
    for name in [n for n in tensors if "layers.1." in n and n.endswith("_proj.weight")]:
        linear = name.removesuffix(".weight")
        parts = make(rng, *tensors.pop(name).shape)
        tensors |= {f"{linear}.{part}": a for part, a in parts.items()}
        dtypes |= {f"{linear}.{part}": d for part, d in DTYPES.get(scheme, {}).items()}
    folder.mkdir()
    settings = hf.config.to_dict() | {"architectures": [type(hf).__name__]} | said
    (folder / "config.json").write_text(json.dumps(settings))
    raw_safetensors.write(folder / "model.safetensors", tensors, dtypes)
    byte_tokenizer().save(folder)


def read(path) -> None:
    """Everything that loading asks of a checkpoint."""
    c, policy = open_checkpoint(path), WeightPolicy()
    cfg = c.config
    ExactForm.of(policy.embedding(c, "model.embed_tokens"), cpu_pack.KERNELS, "model.embed_tokens")
    for layer in range(min(cfg.n_layers, 8)):
        for name in FAMILIES[cfg.family].linears(cfg, layer):
            w = policy.router(c, name) if name.endswith("mlp.gate") else policy.linear(c, name)
            assert np.isfinite(w.dequantize()).all()
            ExactForm.of(w, cpu_pack.KERNELS, name)
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


def damage_file(rng, file: Path) -> None:
    """Tensors of a safetensors file damaged."""
    tensors, dtypes = raw_safetensors.load(file)
    raw_safetensors.write(file, damage_tensors(rng, tensors), dtypes)


def damage_tensors(rng, tensors: dict) -> dict:
    """A tensor dropped, renamed, of another shape or dtype, or full of junk."""
    out = dict(tensors)
    for _ in range(rng.integers(1, 3)):
        name = rng.choice(sorted(out))
        a, kind = out.pop(name), rng.integers(5)
        if "quant_state" in name and rng.random() < 0.6:
            text = json.dumps(damage_json(rng, json.loads(a.tobytes())))
            out[name] = np.frombuffer(text.encode(), np.uint8)
        elif kind == 1:
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
