"""Contract of a family's file in `models/`, and the small classes that it uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tinychat.network.checks import check_number
from tinychat.network.config import (
    MOST_LAYERS,
    AttentionConfig,
    DenseConfig,
    ExpertsConfig,
    LayerConfig,
    ModelConfig,
)
from tinychat.network.ops import Handle, Ops
from tinychat.network.recurrence import Recurrence

Settings = dict[str, Any]
"""config.json."""


class Metadata(Protocol):
    """The fields of a GGUF that belong to its architecture: `arch.key` is asked for as `key`."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value. Raises CheckpointError for a list."""
        ...

    def number(self, key: str, default: Any = None) -> Any:
        """The value. Raises CheckpointError where it is no number, or missing without a default."""
        ...

    def flags(self, key: str, n: int, otherwise: Callable[[int], bool]) -> Callable[[int], bool]:
        """What a list of n truth values says of layer i; `otherwise` where there is none. Raises
        CheckpointError for anything else.
        """
        ...

    def each(self, key: str, n: int) -> list[int]:
        """A value for each of n layers, from a list or a single number. Raises CheckpointError."""
        ...

    def numbers(self, key: str, n: int) -> list[float]:
        """A list of n numbers, infinite ones too. Raises CheckpointError."""
        ...

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor of the file, by its name there; () where there is none."""
        ...


@dataclass(frozen=True)
class Stack:
    """Facts about layers that any family's file has; the family makes its layers of it.

    n          how many layers
    attention  a layer's heads, with the rope and the window that the file names (0: none, or one that holds
               the whole context)
    mlp        a layer's MLP
    """

    n: int
    attention: AttentionConfig
    mlp: DenseConfig

    def __post_init__(self) -> None:
        check_number("n_layers", self.n, MOST_LAYERS)

    def layers(
        self,
        mixer: Callable[[int], AttentionConfig | Recurrence | None] | None = None,
        mlp: Callable[[int], DenseConfig | ExpertsConfig] | None = None,
    ) -> tuple[LayerConfig, ...]:
        """All layers; `mixer` and `mlp` say what layer i has where they are not all alike."""
        return tuple(
            LayerConfig(mixer(i) if mixer else self.attention, mlp(i) if mlp else self.mlp)
            for i in range(self.n)
        )


@dataclass(frozen=True)
class Kept:
    """How a folder holds what a block has beside linears and norms: vectors, convolutions, gates.

    read, write  from the file to the network, and back; a convolution is read as [channels, width]
    part         how the tensor's name goes on behind the module's
    module       the last part of the module's name in files, where it is another one
    """

    read: Callable[[np.ndarray], np.ndarray] = lambda a: a
    write: Callable[[np.ndarray], np.ndarray] = lambda a: a
    part: str = ".weight"
    module: str = ""

    def tensor(self, name: str) -> str:
        """The file's name of the tensor that holds the module `name`."""
        return (f"{name.rpartition('.')[0]}.{self.module}" if self.module else name) + self.part


@dataclass(frozen=True)
class Part:
    """A module that files hold among the rows of a larger one.

    whole   the larger one, as it is called inside a block
    rows    of the whole, in the order that they have here: int64 [out], for a layer
    turned  of how many matrices one below the other these rows are, each of which is stored transposed; None:
            they are one, as it is used
    """

    whole: str
    rows: Callable[[LayerConfig], np.ndarray]
    turned: Callable[[LayerConfig], int] | None = None


@dataclass(frozen=True)
class FromHF:
    """How config.json reads for one entry of `architectures`, and what its tensors are called.

    defaults      what transformers' config class takes where the file is silent
    options       settings of `hf_config.OPTIONS` that it has; `layers` and `constants` read them
    windows       whether it may have layers of the type sliding_attention
    partial_rope  whether a part of a head may be rotated
    activation    the setting that names it, and what it must be
    layers        the layers of a model
    constants     what ModelConfig has besides
    mixers        types of layers, as `layer_types` names them, that it has beside those with attention
    vectors       those of `norms` that are no norms, by the ends of their names
    tensors       how its files call modules, as pairs of a regular expression and what is put in its place to
                  get the names of `linears` and `norms`
    written       the other way round, where quantized folders that others read have names of their own
    rope_fields   fields of a rope scaling that it has beside those that all have
    interleaved   whether its files hold rows of q and k for rotating neighbours (x[2i], x[2i + 1])
    parts         modules that its files hold among the rows of others, by their names inside a block
    varied        whether `intermediate_size` may be a list; `layers` reads it then
    unread        ends of the names of modules that files may have in layers that do not use them
    head_dim      the setting that has the size of heads, or of what is rotated of them
    model_type    its name in the `text_config` of wrappers
    said          the settings by the names that they have in others' files, where it has names of its own
    wrappers      architectures of models of several inputs whose `text_config` may describe such a model
    """

    defaults: Settings = field(default_factory=dict)
    options: tuple[str, ...] = ()
    windows: bool = False
    partial_rope: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    layers: Callable[[Settings, Stack], tuple[LayerConfig, ...]] | None = None
    constants: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    mixers: tuple[str, ...] = ()
    vectors: Mapping[str, Kept] = field(default_factory=dict)
    tensors: tuple[tuple[str, str], ...] = ()
    written: tuple[tuple[str, str], ...] = ()
    rope_fields: tuple[str, ...] = ()
    interleaved: bool = False
    parts: Mapping[str, Part] = field(default_factory=dict)
    varied: bool = False
    unread: tuple[str, ...] = ()
    head_dim: str = "head_dim"
    model_type: str = ""
    said: Callable[[Settings], Settings] = lambda settings: settings
    wrappers: tuple[str, ...] = ()


@dataclass(frozen=True)
class FromGGUF:
    """How the metadata reads for one `general.architecture`, and what its tensors are called.

    names        a block's modules: the names of `linears` and `norms` → GGUF's
    when         what tells it from another family of the same architecture
    interleaved  whether rows of q and k are stored for rotating neighbours (x[2i], x[2i + 1])
    flat         ends of the names of linears with one output that are stored as vectors
    heaped       ends of the names of linears that are stored as a matrix for each head
    options      those of `gguf_config.OPTIONS` that it has; `layers` and `constants` read them
    layers       the layers of a model
    constants    what ModelConfig has besides
    tensors      tensors with names of another kind than the rest: what they would be called else
    parts        modules that files hold among the rows of others, by their names inside a block
    varied       whether heads and MLPs may differ by layer in what all files name alike; `layers` asks for
                 each layer's then, and a Stack has those of the first
    unread       ends of the names of tensors that files may have in blocks that do not use them
    joined       linears whose rows files hold in several tensors, by their names inside a block
    flattened    ends of the names of vectors that are stored in several dimensions
    vectors      how vectors are read that files hold otherwise than the network has them, by the ends of
                 their names
    """

    names: Mapping[str, str]
    when: Callable[[Metadata], bool] | None = None
    interleaved: bool = False
    flat: tuple[str, ...] = ()
    heaped: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    layers: Callable[[Metadata, Stack], tuple[LayerConfig, ...]] = lambda metadata, stack: stack.layers()
    constants: Callable[[Metadata], dict[str, Any]] = lambda metadata: {}
    tensors: tuple[tuple[str, str], ...] = ()
    parts: Mapping[str, Part] = field(default_factory=dict)
    varied: bool = False
    unread: tuple[str, ...] = ()
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flattened: tuple[str, ...] = ()
    vectors: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)


def in_files(form: FromHF | FromGGUF, cfg: ModelConfig, name: str) -> tuple[str, np.ndarray | None]:
    """Name of the module that holds the linear `name` in its family's files, and which of its rows that are,
    in our order: int64 [out]; None: all of them as they are.
    """
    layer, _, module = name.removeprefix("model.layers.").partition(".")
    if part := form.parts.get(module):
        return f"model.layers.{layer}.{part.whole}", part.rows(cfg.all_layers[int(layer)])
    order = in_file_order(form, cfg, name)
    return name, None if order is None else np.argsort(order)


def turned(form: FromHF | FromGGUF, cfg: ModelConfig, name: str) -> int:
    """Of how many matrices, each of which files hold transposed, the linear `name` is; 0: of none."""
    layer, _, module = name.removeprefix("model.layers.").partition(".")
    part = form.parts.get(module)
    return part.turned(cfg.all_layers[int(layer)]) if part and part.turned else 0


def shapes_in_files(
    form: FromHF | FromGGUF, cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of modules by the names that these have in the family's files, parts joined."""
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        whole, _ = in_files(form, cfg, name)
        if n := turned(form, cfg, name):
            shape = (n * shape[1], shape[0] // n)
        out[whole] = (out[whole][0] + shape[0], *shape[1:]) if whole in out else shape
    return out


def in_file_order(form: FromHF | FromGGUF, cfg: ModelConfig, name: str) -> np.ndarray | None:
    """Rows of the linear `name` in the order of its family's files: int64 [out], the places that they have
    here; None: as they are.
    """
    module = name.rpartition(".")[2]
    if module not in ("q_proj", "k_proj") or not form.interleaved:
        return None
    a = cfg.all_layers[int(name.split(".")[2])].attention
    return a.neighbours(a.n_heads if module == "q_proj" else a.n_kv_heads)


def kept(family: Family, name: str) -> Kept:
    """How a folder of that family holds one of its `norms`."""
    vectors = next(iter(family.HF.values())).vectors
    offset = np.float32(family.NORM_OFFSET)
    norm = Kept(lambda a: a + offset, lambda a: a - offset)
    return next((own for end, own in vectors.items() if name.endswith(end)), norm)


def outside(family: Family, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Modules that a family has outside of its blocks beside embedding, head and last norm, and their shapes:
    linears and embeddings [out, in], vectors [n]. Most have none, and say nothing of it.
    """
    own: Callable[[ModelConfig], dict[str, tuple[int, ...]]] = getattr(family, "outside", lambda cfg: {})
    return own(cfg)


class WeightSource(Protocol):
    """A backend's loader: gives the handle of each weight by its name, `model.layers.0.mlp.up_proj`."""

    def embedding(self, name: str) -> Handle:
        """The embedding: rows are token ids."""
        ...

    def vector(self, name: str) -> Handle:
        """A norm's weight: [n]."""
        ...

    def linear(self, *names: str) -> Handle:
        """Linears that share an input, as one: their outputs follow each other."""
        ...

    def router(self, name: str) -> Handle:
        """The linear that chooses experts."""
        ...

    def head(self, name: str, tied_to: Handle) -> Handle:
        """The output head, or the embedding where they are one."""
        ...


class Family(Protocol):
    """A module of `models/`."""

    HF: dict[str, FromHF]  # by the name in `architectures`
    GGUF: dict[str, FromGGUF]  # by `general.architecture`
    NORM_OFFSET: float  # what Hugging Face's files hold norms less

    def linears(self, cfg: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
        """Names and [out, in] of a block's linears: what readers check and quantizers quantize."""
        ...

    def norms(self, cfg: ModelConfig, layer: int) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of what a block has besides, read in floats and never quantized: norms [n],
        convolutions [channels, width], gates [out, in].
        """
        ...

    def biases(self, cfg: ModelConfig) -> tuple[str, ...]:
        """Linears that must have a bias, by their names inside a block."""
        ...

    def load(self, w: WeightSource, cfg: ModelConfig) -> Any:
        """Ask for every weight, in the order of use."""
        ...

    def forward(self, ops: Ops, cfg: ModelConfig, w: Any) -> Handle:
        """Token ids (the step's input) to logits; `w` is what `load` returned."""
        ...

    def settings(self, cfg: ModelConfig) -> Settings:
        """Entries of config.json for such a model beside what `settings.hf_config` writes for all."""
        ...


class Predicting(Family, Protocol):
    """A family whose `forward` leaves what a layer that predicts further reads (`network.further`)."""

    def predict(self, ops: Ops, cfg: ModelConfig, w: Any, few: bool = False) -> Handle:
        """Token ids, one of each sequence, to logits of what follows them; few: of frequent ids only."""
        ...
