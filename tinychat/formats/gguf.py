"""GGUF files (llama.cpp's format), whole or in parts, read module by module from a memory map."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from tinychat.base.errors import UnsupportedModelError
from tinychat.base.files import MappedFile
from tinychat.base.identity import Tell, content_hash
from tinychat.formats.gguf_blocks import UNPACK
from tinychat.formats.gguf_config import FURTHER, ROPE_TENSORS, TOP, read_config
from tinychat.formats.gguf_file import BF16, F16, F32, FORMS, Tensor, type_of
from tinychat.formats.gguf_parts import open_parts
from tinychat.models import FAMILIES, PREDICTING
from tinychat.network import further
from tinychat.network.config import DenseConfig, ExpertsConfig, LayerConfig, ModelConfig
from tinychat.network.family import in_files, outside, shapes_in_files, turned
from tinychat.network.weight_form import Coded, Form, Numbers
from tinychat.network.weights import DenseLinear, Linear, joined, transposed
from tinychat.text.tokenizer import Tokenizer

UNREAD = ("attn_rot_embd", "rotary_emb.inv_freq")  # ends of the names of tensors that change nothing
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
_STACKED = re.compile(r"^(model\.\w+)\.(\d{1,3})$")
_FUSED = re.compile(r"mlp\.experts\.\d{1,6}\.(gate_proj|up_proj)$")
_EXPERT = re.compile(r"mlp\.experts\.(\d{1,6})\.")


class GGUFCheckpoint:
    """A GGUF as a `Checkpoint`. `path` may lead to any part of one in parts."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.file, self._files = open_parts(self.path)
        self.fields = self.file.fields
        self.form, self.config = read_config(self.file)
        self._name_tensors()
        self.config = self._with_further()
        self._hash: str | None = None
        self._check_tensors()

    def has(self, name: str) -> bool:
        """Whether the module exists (a tied model has no `lm_head`)."""
        name = self._where(name)[0]
        return all(self._name(part) + ".weight" in self.file.tensors for part in self._joined(name) or [name])

    def linear(self, name: str) -> Linear:
        """A linear module or the embedding, in Hugging Face's row order.

        Types with a function in `gguf_blocks` → QuantizedLinear, exactly; others → DenseLinear.
        """
        whole, rows = self._where(name)
        if parts := self._joined(whole):
            return joined([self.linear(part) for part in parts])
        if rows is not None and (heads := turned(self.form, self.config, name)):
            return transposed(self._linear(whole, None), rows, heads)
        return self._linear(whole, rows)

    def _linear(self, name: str, rows: np.ndarray | None) -> Linear:
        """These rows of a module of the file; None: all."""
        tensor = self._tensor(name)
        bias = None
        if self._name(name) + ".bias" in self.file.tensors:
            bias = self._dense(self._tensor(name, ".bias"), rows).reshape(-1).astype(np.float32)
        n, k = tensor.shape
        if tensor.kind in (F32, F16, BF16):
            dtype = {F32: "<f4", F16: "<f2", BF16: "<u2"}[tensor.kind]
            weight = self.file.data(tensor, dtype).reshape(n, k)
            return DenseLinear(weight[rows] if rows is not None else weight, bias, bf16=tensor.kind == BF16)
        type_name, block, block_bytes = type_of(tensor.kind)
        if type_name in UNPACK:
            blocks = self.file.data(tensor).reshape(n, k // block, block_bytes)
            w = UNPACK[type_name](blocks[rows] if rows is not None else blocks)
            return replace(w, scales=self._with_tensor_scale(name, w.scales), bias=bias)
        return DenseLinear(self._dense(tensor, rows), bias)

    def _with_tensor_scale(self, name: str, scales: Numbers) -> Numbers:
        """NVFP4's scales times that of the whole tensor, or of the expert, which is a tensor of its own."""
        tensor = self.file.tensors.get(self._name(name) + ".scale")
        if tensor is None or not isinstance(scales, Coded):
            return scales
        expert = _EXPERT.search(name)
        times = self._dense(tensor, None).astype(np.float32)[int(expert[1]) if expert else 0]
        return replace(scales, times=times.reshape(1, 1))

    def stored(self, name: str) -> tuple[Form | str, int]:
        """Form of a linear or the embedding, the name of its type where there are no words, and its bytes."""
        if parts := self._joined(name):
            each = [self.stored(part) for part in parts]
            forms = {form for form, _ in each}
            words = forms.pop() if len(forms) == 1 else " and ".join(sorted(map(str, forms)))
            return words, sum(n_bytes for _, n_bytes in each)
        opened = turned(self.form, self.config, name)
        name, rows = self._where(name)
        tensor = self._tensor(name)
        if opened and rows is not None and tensor.kind not in (F32, F16, BF16):
            return Form(32, "fp32"), 4 * len(rows) * tensor.shape[1]
        type_name, share = type_of(tensor.kind)[0], 1.0 if rows is None else len(rows) / tensor.shape[0]
        return FORMS.get(type_name, type_name), round(tensor.n_bytes * share)

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight: float32 [n]."""
        read = next((f for end, f in self.form.vectors.items() if name.endswith(end)), lambda a: a)
        return read(self._dense(self._tensor(name), None).reshape(-1).astype(np.float32))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer with its special tokens, stop tokens and chat template."""
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        from tinychat.formats.gguf_tokenizer import from_gguf

        tokenizer = from_gguf(self.fields)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise self.file.damaged(
                f"it has {tokenizer.vocab_size} tokens and embeddings for {self.config.vocab_size}"
            )
        return tokenizer

    def fingerprint(self, tell: Tell | None = None) -> str:
        """A hash of the content, computed once; `tell` hears of it where that takes long."""
        if self._hash is None:
            hashes = [content_hash(file, tell) for file in self._files]
            self._hash = hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()
        return f"gguf:{self._hash}"

    def weight_files(self) -> list[MappedFile]:
        """The file itself, or all parts."""
        return self._files

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file was written since it was opened."""
        for file in self._files:
            file.check_unchanged()

    def tensor_bytes(self) -> dict[str, int]:
        """Bytes stored in each type (`{"Q4_1": …, "F32": …}`), largest first."""
        sums: dict[str, int] = {}
        for t in self.file.tensors.values():
            name = type_of(t.kind)[0]
            sums[name] = sums.get(name, 0) + t.n_bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def _name_tensors(self) -> None:
        """Give tensors that the architecture names in its own way the names of the others."""
        for pattern, name in self.form.tensors:
            for given in [n for n in self.file.tensors if re.search(pattern, n)]:
                usual = re.sub(pattern, name, given)
                self.file.tensors[usual] = replace(self.file.tensors.pop(given), name=usual)

    def _with_further(self) -> ModelConfig:
        """The config, with the layer that predicts further if it is there and the family knows it."""
        cfg, told = self.config, self.fields.get(f"{self.fields['general.architecture']}.{FURTHER}")
        if cfg.family not in PREDICTING or told != 1:
            return cfg
        blk = f"blk.{cfg.n_layers}."
        stored = {name.rpartition(".")[0] for name in self.file.tensors if name.startswith(blk)}
        return further.found(PREDICTING[cfg.family], cfg, stored, self._name)

    def _check_tensors(self) -> None:
        """All that the model needs is there in its shape, and nothing that would change what it computes."""
        cfg = self.config
        family, table = FAMILIES[cfg.family], (cfg.vocab_size, cfg.hidden_size)
        needed: dict[str, tuple[int, ...]] = {"model.embed_tokens": table, "model.norm": (cfg.hidden_size,)}
        if not cfg.tie_embeddings:
            needed["lm_head"] = table
        for i in range(cfg.n_layers):
            needed.update(family.linears(cfg, i))
            needed.update(family.norms(cfg, i))
        needed |= outside(family, cfg) | further.linears(family, cfg) | further.norms(family, cfg)
        allowed = set(ROPE_TENSORS)
        for name, shape in self._apart(shapes_in_files(self.form, cfg, needed)).items():
            tensor = self._tensor(name)
            if tensor.shape != shape:
                raise self.file.damaged(
                    f"the tensor {tensor.name!r} has the shape {list(tensor.shape)}, expected {list(shape)}"
                )
            allowed.add(tensor.name)
            bias = self.file.tensors.get(self._name(name) + ".bias")
            if bias is not None and len(shape) == 2:
                if self._tensor(name, ".bias").shape != shape[:1]:
                    raise self.file.damaged(f"the tensor {bias.name!r} has the shape {list(bias.shape)}")
                allowed.add(bias.name)
            elif bias is None and name.endswith(family.biases(cfg)):
                raise self.file.damaged(f"the tensor {self._name(name) + '.bias'!r} is missing")
            allowed |= self._tensor_scales(name, tensor)
        told = self.fields.get(f"{self.fields['general.architecture']}.{FURTHER}")
        for name in self.file.tensors:
            behind = (layer := _BLOCK.match(name)) and int(layer[1]) >= cfg.n_layers
            if name not in allowed and told and behind:
                continue
            if name not in allowed and not name.endswith(UNREAD + self.form.unread):
                raise UnsupportedModelError(
                    f"The GGUF has a tensor {name!r} that a {cfg.family} model does not have.",
                    "The model is of another family or has parts that are not supported.",
                )

    def _tensor_scales(self, name: str, tensor: Tensor) -> set[str]:
        """Names of the scales that NVFP4 has beside a tensor: of the weights, and of activations, which this
        program does not round to 4 bits.
        """
        if type_of(tensor.kind)[0] != "NVFP4":
            return set()
        scale = self.file.tensors.get(self._name(name) + ".scale")
        experts = self._layer(name).mlp if _EXPERT.search(name) else None
        n = experts.n if isinstance(experts, ExpertsConfig) else 1
        if scale is not None and (scale.shape != (n,) or scale.kind != F32):
            raise self.file.damaged(f"the tensor {scale.name!r} has the shape {list(scale.shape)}")
        return {self._name(name) + ".scale", self._name(name) + ".input_scale"}

    def _joined(self, name: str) -> list[str]:
        """Names of the linears that a linear is put together of; none, where it is one itself."""
        layer, _, module = name.removeprefix("model.layers.").partition(".")
        return [f"model.layers.{layer}.{part}" for part in self.form.joined.get(module, ())]

    def _apart(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of modules, of those that are put together the parts, which are as large as each other."""
        out: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            parts = self._joined(name)
            out |= {part: (shape[0] // len(parts), *shape[1:]) for part in parts} or {name: shape}
        return out

    def _name(self, name: str) -> str:
        """`model.layers.3.mlp.up_proj` → `blk.3.ffn_up`; an unknown name stays as it is and is not found."""
        if top := self.form.names.get(name, TOP.get(name)):
            return top
        layer, dot, module = _EXPERT.sub("mlp.experts.", name.removeprefix("model.layers.")).partition(".")
        names = self.form.names if module in self.form.names else further.GGUF_NAMES
        return f"blk.{layer}.{names[module]}" if dot and module in names else name

    def _tensor(self, name: str, suffix: str = ".weight") -> Tensor:
        tensor = self.file.tensors.get(self._name(name) + suffix)
        if tensor is None and (stacked := _STACKED.match(name)):  # one of several outside of blocks
            whole, i = self._tensor(stacked[1], suffix), int(stacked[2])
            n = whole.shape[0] if len(whole.shape) == 3 else 0
            if i >= n:
                raise self.file.damaged(f"the tensor {whole.name!r} has the shape {list(whole.shape)}")
            size = whole.n_bytes // n
            return replace(whole, shape=whole.shape[1:], start=whole.start + i * size, n_bytes=size)
        if tensor is None and (fused := _FUSED.search(name)):  # gate and up of an expert in one
            whole = self._tensor(name[: fused.start(1)] + "gate_up_proj", suffix)
            half, size = whole.shape[0] // 2, whole.n_bytes // 2
            start = whole.start + size * (fused[1] == "up_proj")
            return replace(whole, shape=(half, *whole.shape[1:]), start=start, n_bytes=size)
        if tensor is None:
            raise self.file.damaged(f"the tensor {self._name(name) + suffix!r} is missing")
        if expert := _EXPERT.search(name):
            dimensions = 3 if suffix == ".weight" else 2
            return self._one_of(tensor, self._layer(name).mlp, int(expert[1]), dimensions)
        if suffix == ".weight" and name.endswith(self.form.heaped) and len(tensor.shape) == 3:
            return replace(tensor, shape=(tensor.shape[0] * tensor.shape[1], tensor.shape[2]))
        if suffix == ".weight" and name.endswith(self.form.flat) and len(tensor.shape) == 1:
            return replace(tensor, shape=(1, *tensor.shape))
        if name.endswith(self.form.flattened):
            return replace(tensor, shape=(math.prod(tensor.shape),))
        return tensor

    def _one_of(
        self, tensor: Tensor, mlp: DenseConfig | ExpertsConfig, expert: int, dimensions: int
    ) -> Tensor:
        """One expert's part of a tensor [experts, out, in], or of biases [experts, out]."""
        n = mlp.n if isinstance(mlp, ExpertsConfig) else 0
        if len(tensor.shape) != dimensions or tensor.shape[0] != n:
            raise self.file.damaged(
                f"the tensor {tensor.name!r} has the shape {list(tensor.shape)} for {n} experts"
            )
        size = tensor.n_bytes // n
        return replace(tensor, shape=tensor.shape[1:], start=tensor.start + expert * size, n_bytes=size)

    def _dense(self, tensor: Tensor, rows: np.ndarray | None) -> np.ndarray:
        """float32 in the tensor's shape, rows reordered."""
        out = self.file.floats(tensor)
        return out[rows] if rows is not None else out

    def _where(self, name: str) -> tuple[str, np.ndarray | None]:
        """Name of the module that holds a linear in the file, and its rows there, in our order: llama.cpp
        interleaves heads of q and k (its row 2i is ours i, its 2i + 1 ours i + d/2).
        """
        return in_files(self.form, self.config, name)

    def _layer(self, name: str) -> LayerConfig:
        """The layer that a module belongs to."""
        return self.config.all_layers[int(name.split(".")[2])]
