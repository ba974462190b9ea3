"""The GGUF file that quantization writes: whole or not there at all, blocks kept beside it while it grows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinychat.base.errors import TinychatError
from tinychat.base.files import read_text
from tinychat.formats import gguf_metadata
from tinychat.formats.gguf_config import ROPE_TENSORS
from tinychat.formats.gguf_pack import PACK
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import ModelConfig
from tinychat.network.weights import Q8_GROUP, quantize_int8
from tinychat.quantize.calibration import DEFAULT
from tinychat.quantize.folder import Entry, Output
from tinychat.quantize.forward import finite
from tinychat.quantize.target import Target

if TYPE_CHECKING:
    from gguf import GGUFWriter

MADE = "tinychat.quantize"  # the field that says how the file was made, and so that it is ours to replace
PROBED = 40_000  # characters of the calibration text that tokenizers are compared on
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 14}  # llama.cpp's LLAMA_FTYPE_MOSTLY_…


class OutputFile(Output):
    """The file `out`, made by `job`."""

    def __init__(self, out: Path, job: dict[str, Any], fields: gguf_metadata.Fields):
        """fields: its metadata but those that say how it is quantized."""
        super().__init__(out, job)
        self.fields = fields

    def write(
        self, path: Path, checkpoint: Checkpoint, target: Target, rest: list[Entry], record: dict[str, Any]
    ) -> None:
        from gguf import GGUFValueType as T
        from gguf import GGUFWriter

        writer = GGUFWriter(path, self.fields["general.architecture"].value)
        for key, field in self.fields.items():
            if key != "general.architecture":
                writer.add_key_value(key, field.value, field.type, field.item)
        writer.add_key_value("general.file_type", FILE_TYPES[target.type], T.UINT32)
        writer.add_key_value("general.quantization_version", 2, T.UINT32)
        writer.add_key_value(MADE, json.dumps({**self.job, **record}), T.STRING)
        try:
            _write(writer, checkpoint.config, [*rest, *self._block_entries(checkpoint.config.n_layers)])
        finally:
            writer.close()

    def is_ours(self) -> bool:
        """Whether the file that is there was made by quantizing."""
        from tinychat.formats.gguf_file import GGUFFile

        try:
            return self.out.is_file() and MADE in GGUFFile(self.out).fields
        except (TinychatError, OSError):
            return False

    def replace(self, new: Path) -> None:
        os.replace(new, self.out)

    def size(self) -> int:
        """Bytes of the file."""
        return self.out.stat().st_size


def _write(writer: GGUFWriter, cfg: ModelConfig, entries: Iterable[Entry]) -> None:
    """The tensors, one by one."""
    from gguf import GGMLQuantizationType

    _, form = gguf_metadata.architecture(cfg)
    entries = heaped(entries)
    for e in entries:
        module, _, part = e.name.rpartition(".")
        if module.endswith(ROPE_TENSORS) or e.name in ROPE_TENSORS:
            name = e.name
        else:
            name = gguf_metadata.tensor_name(form, module) + (".bias" if part == "bias" else ".weight")
        shape = e.shape[-1:] if module.endswith(form.flat or ("\0",)) else e.shape
        dtype = {"U8": np.uint8, "F16": np.float16, "F32": np.float32}[e.dtype]
        kind = GGMLQuantizationType[part] if part in PACK else None
        writer.add_tensor_info(name, shape, np.dtype(dtype), e.n_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for e in entries:
        writer.write_tensor_data(np.ascontiguousarray(e.read()))
    writer.flush()
    for file in writer.fout or ():
        os.fsync(file.fileno())


def heaped(entries: Iterable[Entry]) -> list[Entry]:
    """The tensors, those of a layer's experts as one: a linear of each, in their order, [experts, …]."""
    found: dict[str, dict[int, Entry]] = {}
    for e in entries:
        name, expert = gguf_metadata.of_experts(e.name) or (e.name, 0)
        found.setdefault(name, {})[expert] = e
    return [
        own[0] if name == own[0].name else _heap(name, [own[i] for i in range(len(own))])
        for name, own in found.items()
    ]


def _heap(name: str, own: list[Entry]) -> Entry:
    return Entry(name, own[0].dtype, (len(own), *own[0].shape), partial(_stack, own))


def _stack(entries: list[Entry]) -> np.ndarray:
    return np.stack([e.read() for e in entries])


def prepared(checkpoint: Checkpoint) -> tuple[gguf_metadata.Fields, list[Entry]]:
    """Metadata, and the tensors that are no block's: embedding and head in 8 bits, norms and ropes in floats.

    Raises UnsupportedModelError for a network or a tokenizer that GGUF has no words for.
    """
    cfg = checkpoint.config
    if gguf_metadata.is_carried(checkpoint):
        fields = gguf_metadata.carried(checkpoint.path)
        file = checkpoint.file  # type: ignore[attr-defined]
        ropes = {name: file.floats(file.tensors[name]) for name in ROPE_TENSORS if name in file.tensors}
    else:
        from tinychat.formats import gguf_vocabulary

        fields, ropes = gguf_metadata.said(cfg, checkpoint.path.name)
        fields |= gguf_vocabulary.fields_of(
            checkpoint.tokenizer(), cfg.vocab_size, read_text(DEFAULT)[:PROBED]
        )
    names = ["model.embed_tokens"] + ([] if cfg.tie_embeddings else ["lm_head"])
    entries = [_table(checkpoint, name) for name in names]
    norm = finite(checkpoint.vector("model.norm").astype(np.float32), "model.norm")
    entries.append(Entry.of("model.norm.weight", norm))
    return fields, [*entries, *(Entry.of(name, a) for name, a in ropes.items())]


def _table(checkpoint: Checkpoint, name: str) -> Entry:
    """The embedding or the head: int8 in groups of 32 where that divides them, else 16 bits."""
    n, k = checkpoint.linear(name).shape
    if k % Q8_GROUP:
        return Entry(f"{name}.weight", "F16", (n, k), partial(_half, checkpoint, name))
    return Entry(f"{name}.Q8_0", "U8", (n, k // Q8_GROUP * (Q8_GROUP + 2)), partial(_int8, checkpoint, name))


def _half(checkpoint: Checkpoint, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return finite(checkpoint.linear(name).dequantize().astype(np.float16), name)


def _int8(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return PACK["Q8_0"](quantize_int8(finite(checkpoint.linear(name).dequantize(), name)))
