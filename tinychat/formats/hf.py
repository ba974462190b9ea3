"""Checkpoints in Hugging Face layout: a folder with config.json and weights, dense or in a 4-bit format."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.base.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from tinychat.base.files import MappedFile
from tinychat.base.identity import Tell, content_hash
from tinychat.formats import experts, nf4, quantized
from tinychat.formats.quantization import SUPPORTED, read_quantization
from tinychat.formats.tensors import FLOATS, PULL_AGAIN, Tensor, Tensors, read_json
from tinychat.models import FAMILIES, PREDICTING
from tinychat.network import further, hf_config
from tinychat.network.config import ModelConfig
from tinychat.network.family import FromHF, in_files, kept, outside, shapes_in_files, turned
from tinychat.network.weight_form import Form
from tinychat.network.weights import DenseLinear, Linear, transposed
from tinychat.text.tokenizer import Tokenizer

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_BASE = "model."  # how the names of all tensors but the head's begin
ARCHITECTURES = {arch: (name, form) for name, family in FAMILIES.items() for arch, form in family.HF.items()}
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")
FLOAT_FORMS = {"F16": Form(16, "fp16"), "BF16": Form(16, "bf16"), "F32": Form(32, "fp32")}


def read_config(settings: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """The config that config.json describes (and generation_config.json, whose stop tokens win).

    Raises UnsupportedModelError for an architecture, option or rope scaling that is not understood, by name,
    and CheckpointError where the file does not describe a model.
    """
    return hf_config.read(settings, generation, ARCHITECTURES)


class HFCheckpoint:
    """Implements `Checkpoint` for a folder in Hugging Face layout.

    Opening reads the JSON files and the weights' headers only; a weight is a view of the mapped file until it
    is used. Raises CheckpointError for a damaged folder and UnsupportedModelError for a kind not read.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder)
        settings = read_json(self.path / "config.json")
        if settings is None:
            raise ModelNotFoundError(
                f"{self.path} has no config.json.", "Give a folder in Hugging Face layout, or a .gguf file."
            )
        self.json: dict[str, Any] = settings
        generation = read_json(self.path / "generation_config.json")
        self.settings = hf_config.text_settings(self.json, ARCHITECTURES)
        self.config = read_config(self.json, generation)
        self.quantization = read_quantization(self.path, self.json)
        self._tensors = Tensors(self.path, self._by_module, self._wanted_file())
        self.config = self._with_further()
        self._shapes = shapes_in_files(self._form, self.config, _expected_shapes(self.config))
        self._refuse_unknown()
        self._tie()

    def has(self, name: str) -> bool:
        whole, _ = in_files(self._form, self.config, name)
        return f"{whole}.weight" in self._tensors or self._quantized(whole)

    def linear(self, name: str) -> Linear:
        """A linear module or the embedding: each is quantized or not as its own tensors are."""
        whole, rows = in_files(self._form, self.config, name)
        stored = self._linear(whole)
        if rows is None:
            return stored
        if heads := turned(self._form, self.config, name):
            return transposed(stored, rows, heads)
        try:
            return stored.reordered(rows)
        except ValueError as e:
            raise UnsupportedModelError(f"{name} cannot be read: {e}.", SUPPORTED) from e

    def _linear(self, name: str) -> Linear:
        """The same with its rows as they are stored."""
        if self._quantized(name):
            shape = self._shapes.get(name)
            bias = None if shape is None else self._bias(name, shape[0])
            return quantized.read_linear(self._tensors, self.quantization, name, shape, bias)
        if f"{name}.weight" not in self._tensors:
            raise CheckpointError(f"{self.path.name} has no weights for {name}.", PULL_AGAIN)
        weight = self._tensors[f"{name}.weight"]
        if weight.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"{name}.weight is stored as {weight.dtype}, which is not supported.", SUPPORTED
            )
        self._tensors.check(f"{name}.weight", self._shapes.get(name, weight.shape))
        array = self._tensors.array(f"{name}.weight")
        return DenseLinear(array, self._bias(name, weight.shape[0]), bf16=weight.dtype == "BF16")

    def stored(self, name: str) -> tuple[Form | str, int]:
        """Form of a linear or the embedding, a name where there are no words, and its bytes."""
        opened = turned(self._form, self.config, name)
        name, rows = in_files(self._form, self.config, name)
        if opened and self._quantized(name) and rows is not None:
            return FLOAT_FORMS["F32"], 4 * len(rows) * self._shapes[name][1]
        if not self._quantized(name):
            dtype = self._tensors[f"{name}.weight"].dtype
            form: Form | str = FLOAT_FORMS.get(dtype, dtype)
        elif self.quantization is None:
            form = "codes that config.json does not describe"
        else:
            shape = self._shapes.get(name)
            form = quantized.look(self._tensors, self.quantization, name, shape).form
        n_bytes = self._tensors.n_bytes(name)
        return form, n_bytes if rows is None else n_bytes * len(rows) // self._shapes[name][0]

    def vector(self, name: str) -> np.ndarray:
        self._tensors.check(f"{name}.weight", self._shapes.get(name, (self.config.hidden_size,)))
        values = self._tensors.float32(f"{name}.weight")
        if not np.isfinite(values).all():
            raise CheckpointError(f"The weights of {name} hold NaN or infinity.", PULL_AGAIN)
        return kept(FAMILIES[self.config.family], name).read(values)

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_hf(self.path, self.config.vocab_size)

    def fingerprint(self, tell: Tell | None = None) -> str:
        """A hash of config.json, of how the weights are quantized, and of the files that hold them."""
        hashes = [content_hash(f, tell) for f in self._tensors.files]
        facts = [self.json, repr(self.quantization), self._tensors.index, hashes]
        return f"folder:{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}"

    def weight_files(self) -> list[MappedFile]:
        """The files that hold the weights."""
        return self._tensors.files

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file with weights was written since it was opened."""
        for f in self._tensors.files:
            f.check_unchanged()

    @property
    def _form(self) -> FromHF:
        return ARCHITECTURES[hf_config.architecture(self.settings)][1]

    def _by_module(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by the names of the family's modules, where its files have others."""
        renamed = {}
        for name, tensor in _prefixed(found).items():
            name = nf4.part_named(name)
            for pattern, module in self._form.tensors:
                name = re.sub(pattern, module, name)
            name = further.in_our_words(name, self.config)
            renamed[name] = _without_inputs(tensor)
        return experts.by_module(renamed, self.config)

    def _with_further(self) -> ModelConfig:
        """The config, with the layer that predicts further if it is there and the family knows it."""
        cfg = self.config
        if cfg.family not in PREDICTING:
            return cfg
        behind = [name for name in self._tensors if (m := _LAYER.match(name)) and int(m[1]) >= cfg.n_layers]
        stored = {name.rpartition(".")[0] for name in behind}
        return further.found(PREDICTING[cfg.family], cfg, stored, lambda name: name)

    def _wanted_file(self) -> str | None:
        """The file of weights that the folder's settings name, if they do (transformers; AutoGPTQ)."""
        name = self.json.get("transformers_weights")
        if name is None and self.quantization is not None:
            name = self.quantization.file
        if name is None or (isinstance(name, str) and Path(name).name == name and "\\" not in name):
            return name
        raise CheckpointError(
            f"The folder's settings name the file {name!r}, which is not a plain file name.",
            "The folder may be hostile; pull it from a source that you trust.",
        )

    def _tie(self) -> None:
        """Head and embedding as transformers ties them: what is there stands in for what is not, and two that
        differ stay two, whatever config.json says."""
        embed, head = EMBEDDING, HEAD
        if not self.config.tie_embeddings or not self.has(head):
            return
        if not self.has(embed):
            self._tensors.rename(head, embed)
        elif not self._same(embed, head):
            self.config = replace(self.config, tie_embeddings=False)

    def _same(self, one: str, other: str) -> bool:
        a, b = f"{one}.weight", f"{other}.weight"
        if self._quantized(one) or self._quantized(other):
            return False
        if (self._tensors[a].dtype, self._tensors[a].shape) != (
            self._tensors[b].dtype,
            self._tensors[b].shape,
        ):
            return False
        pairs = zip(self._tensors.array(a), self._tensors.array(b), strict=True)
        return all(x.tobytes() == y.tobytes() for x, y in pairs)  # a NaN is itself

    def check_complete(self) -> None:
        """Refuse a folder without a tensor that transformers would report as missing, and set at random."""
        biases = FAMILIES[self.config.family].biases(self.config)
        for name, shape in self._shapes.items():
            if name == HEAD and self.config.tie_embeddings:
                continue
            if not self.has(name):
                tied = " (tie_word_embeddings is false)" if name == HEAD else ""
                raise CheckpointError(f"{self.path.name} has no tensor {name}.weight{tied}.", PULL_AGAIN)
            if not self._quantized(name):
                self._tensors.check(f"{name}.weight", shape, None)
            elif self.quantization is not None:
                quantized.look(self._tensors, self.quantization, name, shape)
            if name.endswith(biases):
                self._tensors.check(f"{name}.bias", shape[:1], None)

    def _refuse_unknown(self) -> None:
        """Refuse a tensor that the family does not have: it would change what is computed."""
        for tensor in self._tensors:
            match = _LAYER.match(tensor)
            module, _, part = tensor.rpartition(".")
            if match and int(match[1]) < self.config.n_layers and module not in self._shapes:
                if tensor.endswith("rotary_emb.inv_freq"):  # what old files kept of the rope
                    continue
                if module.endswith(self._form.unread):
                    continue
                if module.endswith(".self_attn") and part in quantized.ACTIVATIONS:
                    continue
                raise UnsupportedModelError(
                    f"The checkpoint has a tensor {tensor}, unknown in a {self.config.family} model.",
                    "The model is of another family, or has parts that are not supported.",
                )
        for name in self._shapes:
            quantized.check_parts(self.quantization, name, self._tensors.parts(name))

    def _quantized(self, name: str) -> bool:
        return quantized.is_quantized(self._tensors.parts(name))

    def _bias(self, name: str, n: int) -> np.ndarray | None:
        wanted = FAMILIES[self.config.family].biases(self.config)
        if f"{name}.bias" not in self._tensors and not name.endswith(wanted):
            return None
        self._tensors.check(f"{name}.bias", (n,))
        return self._tensors.float32(f"{name}.bias")


def _without_inputs(t: Tensor) -> Tensor:
    """A convolution [channels, 1, width], each channel by itself, as [channels, width]."""
    if len(t.shape) != 3 or t.shape[1] != 1 or t.dtype not in FLOATS:
        return t
    return replace(t, shape=(t.shape[0], t.shape[2]), read=lambda: t.read()[:, 0])


def _prefixed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that was saved without its head (`LlamaModel`), by their names in a model
    that has one, as transformers reads them.
    """
    if not found or any(name.startswith((_BASE, "language_model.")) for name in found):
        return found
    return {_BASE + name: tensor for name, tensor in found.items()}


def _expected_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every module of the model and the shape of its weight."""
    table = (cfg.vocab_size, cfg.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: table,
        HEAD: table,
        "model.norm": (cfg.hidden_size,),
    }
    family = FAMILIES[cfg.family]
    for layer in range(cfg.n_layers):
        shapes.update(family.linears(cfg, layer))
        shapes.update(family.norms(cfg, layer))
    shapes |= outside(family, cfg)
    return shapes | further.linears(family, cfg) | further.norms(family, cfg)
