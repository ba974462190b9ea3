"""GGUF files (llama.cpp's format) of the Llama family, read module by module from a memory map.

The container is parsed here and not with the `gguf` package's reader, which trusts every count and size in
the file: a damaged one makes it allocate without end or fail in the middle of numpy. The package's
dequantizers are used for the types that have no exact counterpart in `tinychat.weights`.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.config import ModelConfig, RopeConfig
from tinychat.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from tinychat.models import llama
from tinychat.tokenizer import TURN_ENDS, Tokenizer
from tinychat.weights import DenseLinear, Int8Linear, Linear, QuantizedLinear

MAGIC = b"GGUF"
# ggml type number → name, weights in a block, bytes in a block; the gguf package knows the others
F32, F16, Q4_0, Q4_1, Q8_0, Q4_K, BF16 = 0, 1, 2, 3, 8, 12, 30
TYPES = {
    F32: ("F32", 1, 4),
    F16: ("F16", 1, 2),
    BF16: ("BF16", 1, 2),
    Q4_0: ("Q4_0", 32, 18),
    Q4_1: ("Q4_1", 32, 20),
    Q8_0: ("Q8_0", 32, 34),
    Q4_K: ("Q4_K", 256, 144),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_COUNT, _MAX_KEY, _MAX_STRING = 1 << 16, 1 << 16, 1 << 26


@dataclass(frozen=True)
class Tensor:
    """One tensor: `shape` is [out, in], the reverse of GGUF's own order; `start` is a file offset."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    n_bytes: int


class GGUFFile:
    """The container: `fields` (metadata) and `tensors`, every size in it checked against the file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as f:
                size = f.seek(0, 2)
                self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except FileNotFoundError:
            raise ModelNotFoundError(f"{path} does not exist.", "Give the path of a .gguf file.") from None
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read: {e.strerror}.", "Check its permissions.") from e
        self.size = size
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._at = 0
        try:
            self._parse()
        except struct.error:  # every fixed-size read past the end
            raise self.damaged("it ends in the middle of its header") from None

    def damaged(self, what: str) -> CheckpointError:
        """The file contradicts itself."""
        return CheckpointError(f"{self.path} is damaged: {what}.", "Download or convert it again.")

    def data(self, tensor: Tensor, dtype: Any = np.uint8) -> np.ndarray:
        """The tensor's bytes, as a flat read-only view of the file."""
        count = tensor.n_bytes // np.dtype(dtype).itemsize
        return np.frombuffer(self.map, dtype, count, tensor.start)

    def _parse(self) -> None:
        if self.map[:4] != MAGIC:
            raise CheckpointError(
                f"{self.path} is not a GGUF file: it begins with {bytes(self.map[:4])!r}.",
                "Give a .gguf file, or a Hugging Face folder with *.safetensors.",
            )
        self._at = 4
        version = self._scalar("I")
        if version & 0xFFFF == 0 and version:
            raise UnsupportedModelError(f"{self.path} is a big-endian GGUF.", "Convert it to little-endian.")
        if version not in (2, 3):
            raise UnsupportedModelError(
                f"{self.path} is GGUF version {version}.", "Versions 2 and 3 are read; convert it again."
            )
        n_tensors, n_fields = self._scalar("Q"), self._scalar("Q")
        if n_tensors > _MAX_COUNT or n_fields > _MAX_COUNT:
            raise self.damaged(f"it claims {n_tensors} tensors and {n_fields} metadata fields")
        for _ in range(n_fields):
            key = self._string(_MAX_KEY)
            if key in self.fields:
                raise self.damaged(f"the field {key!r} appears twice")
            self.fields[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(n_tensors)]
        align = self.fields.get("general.alignment", 32)
        if not isinstance(align, int) or not 8 <= align <= 1 << 16 or align & (align - 1):
            raise self.damaged(f"its alignment is {align!r}")
        base = -(-self._at // align) * align
        for name, shape, kind, offset in infos:
            self._place(name, shape, kind, base, offset, align)

    def _place(
        self, name: str, shape: tuple[int, ...], kind: int, base: int, offset: int, align: int
    ) -> None:
        if name in self.tensors:
            raise self.damaged(f"the tensor {name!r} appears twice")
        type_name, block, block_bytes = type_of(kind, name)
        if not shape or shape[-1] % block or any(not 0 < d < 1 << 40 for d in shape):
            raise self.damaged(f"the tensor {name!r} has the shape {list(shape)} in {type_name}")
        n_bytes = math.prod(shape) // block * block_bytes
        if offset % align or base + offset + n_bytes > self.size:
            raise self.damaged(
                f"the tensor {name!r} should end at byte {base + offset + n_bytes} of a file of {self.size}"
            )
        self.tensors[name] = Tensor(name, shape, kind, base + offset, n_bytes)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.map, self._at)
        self._at += struct.calcsize(code)
        return value

    def _string(self, limit: int = _MAX_STRING) -> str:
        n = self._scalar("Q")
        if n > limit or n > self.size - self._at:
            raise self.damaged(f"it claims a string of {n} bytes at byte {self._at}")
        text = self.map[self._at : self._at + n].decode("utf-8", "replace")
        self._at += n
        return text

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self.damaged(f"a metadata field has the unknown type {kind}")
        item, n = self._scalar("I"), self._scalar("Q")
        smallest = 8 if item == _STRING else struct.calcsize(_SCALARS.get(item, "B"))
        if (item != _STRING and item not in _SCALARS) or n * smallest > self.size - self._at:
            raise self.damaged(f"it claims a list of {n} items of type {item} at byte {self._at}")
        if item == _STRING:
            return [self._string() for _ in range(n)]
        values = np.frombuffer(self.map, "<" + _SCALARS[item].replace("?", "b"), n, self._at)
        self._at += values.nbytes
        return values

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(_MAX_KEY)
        n_dims = self._scalar("I")
        if not 1 <= n_dims <= 4:
            raise self.damaged(f"the tensor {name!r} has {n_dims} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(n_dims))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")


def type_of(kind: int, tensor: str = "") -> tuple[str, int, int]:
    """(name, weights in a block, bytes in a block) of a ggml type number."""
    if kind in TYPES:
        return TYPES[kind]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
        return (known.name, *GGML_QUANT_SIZES[known])
    except (ValueError, KeyError):
        raise UnsupportedModelError(
            f"The tensor {tensor!r} has the unknown type {kind}.",
            "The file is damaged, or newer than the gguf package: pip install -U gguf.",
        ) from None


class GGUFCheckpoint:
    """A Llama-family GGUF as a `Checkpoint`."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.file = GGUFFile(self.path)
        self.fields = self.file.fields
        self._refuse_unsupported()
        self.config = self._config()
        self._check_tensors()

    def has(self, name: str) -> bool:
        """Whether the module exists (a tied model has no `lm_head`)."""
        return _gguf_name(name) + ".weight" in self.file.tensors

    def linear(self, name: str) -> Linear:
        """A linear module or the embedding, in Hugging Face's row order.

        Q4_0, Q4_1, Q4_K → QuantizedLinear and Q8_0 → Int8Linear, all exactly; other types → DenseLinear.
        """
        tensor = self._tensor(name)
        rows = self._row_order(name)
        bias = None
        if _gguf_name(name) + ".bias" in self.file.tensors:
            bias = self._dense(self._tensor(name, ".bias"), rows).reshape(-1).astype(np.float32)
        n, k = tensor.shape
        if tensor.kind in (F32, F16, BF16):
            dtype = {F32: "<f4", F16: "<f2", BF16: "<u2"}[tensor.kind]
            weight = self.file.data(tensor, dtype).reshape(n, k)
            return DenseLinear(weight[rows] if rows is not None else weight, bias, bf16=tensor.kind == BF16)
        if tensor.kind in (Q4_0, Q4_1, Q8_0, Q4_K):
            _, block, block_bytes = TYPES[tensor.kind]
            blocks = self.file.data(tensor).reshape(n, k // block, block_bytes)
            return _UNPACK[tensor.kind](blocks[rows] if rows is not None else blocks, bias)
        return DenseLinear(self._dense(tensor, rows), bias)

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight: float32 [n]."""
        return self._dense(self._tensor(name), None).reshape(-1).astype(np.float32)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer with its special tokens, stop tokens and chat template."""
        from tinychat.formats.gguf_tokenizer import from_gguf

        tokenizer = from_gguf(self.fields)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise self.file.damaged(
                f"it has {tokenizer.vocab_size} tokens and embeddings for {self.config.vocab_size}"
            )
        return tokenizer

    def fingerprint(self) -> str:
        """The content hash recorded when the file was pulled, else path, size and modification time."""
        manifest = self.path.parent / "manifest.json"
        try:
            recorded = json.loads(manifest.read_text(encoding="utf-8"))
            if recorded["file"] == self.path.name and recorded["size"] == self.file.size:
                return f"sha256:{recorded['sha256']}"
        except (OSError, ValueError, KeyError, TypeError):
            pass
        stat = self.path.stat()
        key = f"{self.path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
        return "stat:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()

    def tensor_bytes(self) -> dict[str, int]:
        """Bytes stored in each type (`{"Q4_1": …, "F32": …}`), largest first."""
        sums: dict[str, int] = {}
        for t in self.file.tensors.values():
            name = type_of(t.kind)[0]
            sums[name] = sums.get(name, 0) + t.n_bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def _refuse_unsupported(self) -> None:
        def get(key: str, default: Any = None) -> Any:
            value = self.fields.get(key, default)
            if isinstance(value, list | np.ndarray):
                raise self.file.damaged(f"the field {key} is a list")
            return value

        arch = get("general.architecture")
        if arch != "llama":
            raise UnsupportedModelError(
                f"The GGUF architecture {arch!r} is not supported.", "Supported: 'llama'."
            )
        if get("general.type", "model") != "model":
            raise UnsupportedModelError(
                f"{self.path} holds a {get('general.type')}, not a model.",
                "Give the GGUF of the model itself.",
            )
        if get("split.count", 1) not in (0, 1):
            raise UnsupportedModelError(
                f"{self.path} is one of {get('split.count')} parts.",
                "Join them with llama-gguf-split --merge.",
            )
        if get("llama.expert_count"):
            raise UnsupportedModelError(
                f"The GGUF has {get('llama.expert_count')} experts; mixtures of experts are not supported.",
                "Give a dense model of the Llama family.",
            )
        for key in ("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "logit_scale",
                    "embedding_scale", "residual_scale"):  # fmt: skip
            if get(f"llama.{key}"):
                raise UnsupportedModelError(
                    f"The GGUF sets llama.{key}, which is not supported.",
                    "A setting that is ignored gives garbage, so it is refused.",
                )

    def _number(self, key: str, default: Any = None) -> Any:
        value = self.fields.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            what = "is missing" if value is None else f"is a {type(value).__name__}, not a number"
            raise self.file.damaged(f"the field llama.{key} {what}")
        return value

    def _config(self) -> ModelConfig:
        embedding = self._tensor("model.embed_tokens")
        heads = self._number("attention.head_count")
        hidden = self._number("embedding_length")
        if not heads:
            raise self.file.damaged("it has no attention heads")
        head_dim = self._number("attention.key_length", hidden // heads)
        if self._number("attention.value_length", head_dim) != head_dim:
            raise UnsupportedModelError(
                "The GGUF has keys and values of different lengths.", "Such models are not supported."
            )
        context, window = self._number("context_length"), self._number("attention.sliding_window", 0)
        names = self.file.tensors
        return ModelConfig(
            family="llama",
            hidden_size=hidden,
            intermediate_size=self._number("feed_forward_length"),
            n_layers=self._number("block_count"),
            n_heads=heads,
            n_kv_heads=self._number("attention.head_count_kv", heads),
            head_dim=head_dim,
            vocab_size=embedding.shape[0],
            context_length=min(context, window) if window else context,
            norm_eps=float(self._number("attention.layer_norm_rms_epsilon")),
            rope=self._rope(head_dim),
            tie_embeddings="output.weight" not in names,
            attention_bias="blk.0.attn_q.bias" in names,
            mlp_bias="blk.0.ffn_down.bias" in names,
            bos_id=self._token_id("bos"),
            eos_ids=self._eos_ids(),
        )

    def _rope(self, head_dim: int) -> RopeConfig:
        dim = self._number("rope.dimension_count", head_dim)
        if dim != head_dim:
            raise UnsupportedModelError(
                f"The GGUF rotates {dim} of {head_dim} dimensions of a head.",
                "Partial rotation is not supported.",
            )
        base = dict(theta=float(self._number("rope.freq_base", 10000.0)), dim=dim)
        legacy = float(self._number("rope.scale_linear", 1.0))
        kind = self.fields.get("llama.rope.scaling.type")
        if kind is None:
            kind = "linear" if legacy != 1.0 else "none"
        factor = float(self._number("rope.scaling.factor", legacy))
        if not isinstance(kind, str) or kind not in ("none", "linear"):
            raise UnsupportedModelError(
                f"The rope scaling {kind!r} is not supported.", "Supported in GGUF: none, linear, rope_freqs."
            )
        if not (math.isfinite(factor) and factor >= 0):
            raise self.file.damaged(f"its rope scaling factor is {factor}")
        scaled = kind == "linear" and factor not in (0.0, 1.0)
        freqs = self.file.tensors.get("rope_freqs.weight")
        if freqs is None:
            return RopeConfig(kind="linear", factor=factor, **base) if scaled else RopeConfig(**base)
        factors = self._dense(freqs, None).reshape(-1)
        if factors.size != dim // 2 or not (np.isfinite(factors).all() and (factors > 0).all()):
            raise self.file.damaged(f"rope_freqs.weight does not hold {dim // 2} positive numbers")
        if scaled:
            raise UnsupportedModelError(
                "The GGUF has both a linear rope scaling and rope_freqs.weight.",
                "Only one of them is supported.",
            )
        return RopeConfig(kind="factors", factors=tuple(factors.tolist()), **base)

    def _token_id(self, name: str) -> int | None:
        value = self.fields.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def _eos_ids(self) -> tuple[int, ...]:
        ids = {self._token_id("eos"), self._token_id("eot"), self._token_id("eom")} - {None}
        tokens = self.fields.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list):
            ends = set(TURN_ENDS)
            ids |= {i for i, text in enumerate(tokens) if text in ends}
        return tuple(sorted(ids))

    def _check_tensors(self) -> None:
        """All that the model needs is there in its shape, and nothing that would change what it computes."""
        cfg = self.config
        if cfg.head_dim % 2:
            raise self.file.damaged(f"its heads have {cfg.head_dim} dimensions, an odd number")
        needed: dict[str, tuple[int, ...]] = {"model.embed_tokens": (cfg.vocab_size, cfg.hidden_size)}
        needed["model.norm"] = (cfg.hidden_size,)
        if not cfg.tie_embeddings:
            needed["lm_head"] = (cfg.vocab_size, cfg.hidden_size)
        for i in range(cfg.n_layers):
            p = f"model.layers.{i}."
            needed |= {
                p + "input_layernorm": (cfg.hidden_size,),
                p + "post_attention_layernorm": (cfg.hidden_size,),
            }
            needed |= llama.linears(cfg, i)
        allowed = {"rope_freqs.weight"}
        for name, shape in needed.items():
            tensor = self._tensor(name)
            if tensor.shape != shape:
                raise self.file.damaged(
                    f"the tensor {tensor.name!r} has the shape {list(tensor.shape)}, expected {list(shape)}"
                )
            allowed.add(tensor.name)
            bias = self.file.tensors.get(_gguf_name(name) + ".bias")
            if bias is not None and len(shape) == 2:
                if bias.shape != shape[:1]:
                    raise self.file.damaged(f"the tensor {bias.name!r} has the shape {list(bias.shape)}")
                allowed.add(bias.name)
        for name in self.file.tensors:
            if name not in allowed and not name.endswith(("attn_rot_embd", "rotary_emb.inv_freq")):
                raise UnsupportedModelError(
                    f"The GGUF has a tensor {name!r} that a Llama model does not have.",
                    "The model is of another family or has parts that are not supported.",
                )

    def _tensor(self, name: str, suffix: str = ".weight") -> Tensor:
        tensor = self.file.tensors.get(_gguf_name(name) + suffix)
        if tensor is None:
            raise self.file.damaged(f"the tensor {_gguf_name(name) + suffix!r} is missing")
        if name == "model.embed_tokens" and len(tensor.shape) != 2:
            raise self.file.damaged(f"the tensor {tensor.name!r} has the shape {list(tensor.shape)}")
        return tensor

    def _dense(self, tensor: Tensor, rows: np.ndarray | None) -> np.ndarray:
        """float32 in the tensor's shape, rows reordered."""
        if tensor.kind == F32:
            out = self.file.data(tensor, "<f4").reshape(tensor.shape)
        else:
            out = self._dequantized(tensor)
        return out[rows] if rows is not None else out

    def _dequantized(self, tensor: Tensor) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        name, block, block_bytes = type_of(tensor.kind, tensor.name)
        rows = self.file.data(tensor).reshape(-1, tensor.shape[-1] // block * block_bytes)
        try:
            out = dequantize(rows, GGMLQuantizationType(tensor.kind))
        except NotImplementedError:
            raise UnsupportedModelError(
                f"The tensor {tensor.name!r} is stored as {name}, which is not supported.",
                "Give a GGUF in another quantization, such as Q4_0, Q4_K_M or Q8_0.",
            ) from None
        return out.astype(np.float32, copy=False).reshape(tensor.shape)

    def _row_order(self, name: str) -> np.ndarray | None:
        """Undo llama.cpp's interleaving of q and k heads (its row 2i is ours i, its 2i + 1 ours i + d/2)."""
        module = name.rpartition(".")[2]
        heads = {"q_proj": self.config.n_heads, "k_proj": self.config.n_kv_heads}.get(module)
        if heads is None:
            return None
        d = self.config.head_dim
        return np.arange(heads * d).reshape(heads, d // 2, 2).swapaxes(1, 2).reshape(-1)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., b] to [..., 2b]: all low nibbles, then all high nibbles."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _fp16(two_bytes: np.ndarray) -> np.ndarray:
    """uint8 [n, blocks, 2] to float16 [n, blocks]."""
    return np.ascontiguousarray(two_bytes).view("<f2")[..., 0]


def _q4_0(blocks: np.ndarray, bias: np.ndarray | None) -> QuantizedLinear:
    scales = _fp16(blocks[..., :2])
    codes = _nibbles(blocks[..., 2:]).reshape(len(blocks), -1)
    return QuantizedLinear(codes, scales, zeros=np.full(scales.shape, 8, np.uint8), bias=bias)


def _q4_1(blocks: np.ndarray, bias: np.ndarray | None) -> QuantizedLinear:
    codes = _nibbles(blocks[..., 4:]).reshape(len(blocks), -1)
    return QuantizedLinear(codes, _fp16(blocks[..., :2]), offsets=_fp16(blocks[..., 2:4]), bias=bias)


def _q8_0(blocks: np.ndarray, bias: np.ndarray | None) -> Int8Linear:
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(len(blocks), -1)
    return Int8Linear(codes, _fp16(blocks[..., :2]), bias)


def _q4_k(blocks: np.ndarray, bias: np.ndarray | None) -> QuantizedLinear:
    """A block: fp16 d and dmin, eight 6-bit s and m in 12 bytes, 256 codes q; w = d·s·q - dmin·m."""
    n = len(blocks)
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    # groups 0…3 are the low 6 bits of the first bytes; groups 4…7 have their upper 2 bits in the top of those
    s = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1).astype(np.float32)
    m = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1).astype(np.float32)
    scales = _fp16(blocks[..., 0:2]).astype(np.float32)[..., None] * s
    offsets = -(_fp16(blocks[..., 2:4]).astype(np.float32)[..., None] * m)
    codes = _nibbles(blocks[..., 16:].reshape(n, -1, 4, 32)).reshape(n, -1)
    return QuantizedLinear(codes, scales.reshape(n, -1), offsets=offsets.reshape(n, -1), bias=bias)


_UNPACK = {Q4_0: _q4_0, Q4_1: _q4_1, Q8_0: _q8_0, Q4_K: _q4_k}

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj` → `blk.3.ffn_up`; an unknown name stays as it is and is not found."""
    if name in _TOP:
        return _TOP[name]
    layer, dot, module = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[module]}" if dot and module in _NAMES else name
