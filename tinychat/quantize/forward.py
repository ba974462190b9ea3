"""A family's own forward pass over whole windows, block by block, in the pieces that a quantizer needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tinychat.base.errors import CheckpointError, UnsupportedModelError
from tinychat.models import FAMILIES
from tinychat.network.checkpoint import Checkpoint
from tinychat.network.config import AttentionConfig, ModelConfig
from tinychat.quantize import experts
from tinychat.quantize.experts import Mixture
from tinychat.quantize.linears import kept
from tinychat.quantize.nodes import IDS, BlockWeights, ExpertProduct, Names, Node, Product, Recorder, short

if TYPE_CHECKING:
    import torch

ENDS = ("add", "scaled")  # verbs that end a half
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Group:
    """Linears that share an input, and what before them can be divided by the scales of their inputs.

    norm   the norm whose result they alone read
    rows   the linear whose rows are those inputs, but for a factor that scales leave alone
    heads  where `rows` is that of the values: several heads of the inputs come of each of its heads
    """

    input: Node
    products: tuple[Product, ...]
    norm: str | None = None
    rows: str | None = None
    heads: AttentionConfig | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Their parts, by the names inside the block."""
        return tuple(part for product in self.products for part in product.parts)


@dataclass(frozen=True)
class Half:
    """From one state of the residual stream to the next: a block's attention, or its MLP.

    mixture  experts, which come before the groups
    sums     how many of the groups' results are added up in the end
    """

    start: Node
    end: Node
    groups: tuple[Group, ...]
    mixture: Mixture | None = None
    sums: int = 1


class Network:
    """The nodes of a whole model, in blocks and halves.

    Raises UnsupportedModelError for a family whose blocks pass on more than the residual stream.
    """

    def __init__(self, cfg: ModelConfig):
        family, cfg = FAMILIES[cfg.family], cfg.without_further
        recorder = Recorder({n: s[0] for i in range(cfg.n_layers) for n, s in family.linears(cfg, i).items()})
        family.forward(recorder, cfg, family.load(Names(), cfg))
        self.embed, *nodes = recorder.nodes
        readers: dict[Node, list[Node]] = {}
        for node in nodes:
            for x in node.inputs:
                readers.setdefault(x, []).append(node)
        self.blocks: list[tuple[Half, ...]] = []
        self.tail: list[Node] = []
        start, layers = self.embed, _by_layer(nodes)
        for layer in range(cfg.n_layers):
            halves = []
            for part in _joined(_halves(layers[layer])):
                if not {x for node in part for x in node.inputs} <= {start, *part} or part[-1].op not in ENDS:
                    raise UnsupportedModelError(
                        f"The blocks of a {cfg.family} model pass on more than their sum.",
                        'Such a model cannot be quantized yet; it runs with quantize="rtn".',
                    )
                sums = sum(node.op == "add" for node in part)
                halves.append(Half(start, part[-1], _groups(part, readers), Mixture.of(part), sums))
                start = part[-1]
            self.blocks.append(tuple(halves))
        self.final_norm, self.head = layers[-1]

    def parts(self, layer: int) -> dict[str, dict[str, int]]:
        """The linears of a block as files have them: name → its parts and how many rows each has; none where
        it is a part itself.
        """
        products = [p for half in self.blocks[layer] for group in half.groups for p in group.products]
        products += [p for half in self.blocks[layer] if half.mixture for p in half.mixture.products]
        return {
            short(name): dict(zip(p.parts, p.sizes, strict=True)) if p.sizes else {}
            for p in products
            for name in p.weights
        }


@lru_cache(maxsize=4)
def network(cfg: ModelConfig) -> Network:
    """The network of that config, written down once."""
    return Network(cfg)


def _by_layer(nodes: Sequence[Node]) -> dict[int, list[Node]]:
    """The nodes of each layer, and as those of layer -1 the ones behind all layers."""
    layers: dict[int, list[Node]] = {}
    layer = -1
    for node in nodes:
        if node.weights:
            match = _LAYER.match(node.weights[0])
            layer = int(match[1]) if match else -1
        layers.setdefault(layer, []).append(node)
    return layers


def _halves(nodes: Sequence[Node]) -> list[list[Node]]:
    parts: list[list[Node]] = [[]]
    for node in nodes:
        at = -2 if node.op == "scaled" and not parts[-1] and len(parts) > 1 else -1
        parts[at].append(node)  # a sum that is scaled ends behind that
        if node.op == "add":
            parts.append([])
    return [part for part in parts if part]


def _joined(parts: list[list[Node]]) -> list[list[Node]]:
    """The same, but as one what is added one after the other and made of the same: experts and what every
    token takes beside them, attention and a state-space layer.
    """
    joined: list[list[Node]] = []
    for part in parts:
        others = {x for node in part for x in node.inputs}.difference(part, *[p[-1:] for p in joined[-1:]])
        experts = any(isinstance(node, ExpertProduct) for p in (*joined[-1:], part) for node in p)
        if joined and others and (experts or others <= set(joined[-1])):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _groups(nodes: Sequence[Node], readers: Mapping[Node, list[Node]]) -> tuple[Group, ...]:
    by_input: dict[Node, list[Product]] = {}
    for node in nodes:
        if isinstance(node, Product):
            by_input.setdefault(node.inputs[0], []).append(node)
    return tuple(
        Group(x, tuple(products), **(_folds(x) if set(readers[x]) <= set(products) else {}))
        for x, products in by_input.items()
    )


def _folds(x: Node) -> dict[str, Any]:
    """Weights that make `x` and can be divided by scales of its channels."""
    if x.op == "rms_norm":
        return {"norm": short(x.weights[0])}
    if x.op == "multiplied":  # factors leave scales alone
        return _folds(x.inputs[0])
    made_of = x.inputs[-1] if x.inputs else x
    made_of = made_of.inputs[0] if made_of.op == "multiplied" else made_of
    if x.op in ("silu_mul", "gelu_mul", "short_conv") and isinstance(made_of, Product):
        return {"rows": made_of.parts[1]}
    if x.op == "mamba" and x.weights[-1].endswith(".norm"):  # its weights come last
        return {"norm": short(x.weights[-1])}
    if x.op == "sigmoid_mul":  # the gate stays as it is
        return _folds(x.inputs[0])
    if x.op == "attention" and made_of.op == "heads":
        (qkv,) = made_of.inputs
        assert isinstance(qkv, Product)
        return {"rows": qkv.parts[2], "heads": x.attention}
    return {}


class Forward:
    """The float32 forward pass of a model over windows [S, T, H]; causal, positions 0…T−1.

    rounded  what the linears of blocks read instead of their inputs […, in]; None: these themselves
    """

    def __init__(self, config: ModelConfig, rounded: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.cfg, self.network, self.rounded = config, network(config), rounded

    def halves(self, layer: int) -> tuple[Half, ...]:
        """Attention and MLP of a block, in the order of use."""
        return self.network.blocks[layer]

    def value(self, node: Node, w: BlockWeights, known: Mapping[Node, torch.Tensor]) -> torch.Tensor:
        """The value of a node of the block that `w` are the weights of, from those that are `known`."""
        values: dict[Node, Any] = dict(known)

        def of(x: Node) -> Any:
            if x not in values:
                inputs = list(map(of, x.inputs))
                if self.rounded is not None and isinstance(x, Product | ExpertProduct):
                    inputs[0] = self._rounded(inputs[0])
                values[x] = x.run(w, *inputs)
            return values[x]

        return of(node)

    def _rounded(self, x: Any) -> Any:
        assert self.rounded is not None
        return [self.rounded(rows) for rows in x] if isinstance(x, list) else self.rounded(x)

    def product(self, group: Group, w: BlockWeights, known: Mapping[Node, torch.Tensor]) -> torch.Tensor:
        """Result of the last linear of a group, before it is added to anything."""
        y: Any = self.value(group.products[-1], w, known)
        return y[-1] if isinstance(y, list) else y

    def result(self, half: Half, w: BlockWeights, known: Mapping[Node, torch.Tensor]) -> torch.Tensor:
        """What the half adds: the result of its last linears, or all that it adds up."""
        if half.sums == 1:
            return self.product(half.groups[-1], w, known)
        return self.value(half.end, w, known) - known[half.start]

    def embed(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [S, T] → the residual stream [S, T, H]."""
        (name,) = self.network.embed.weights
        return self.value(self.network.embed, BlockWeights({name: table}), {IDS: ids})

    def block(self, x: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        """The residual stream before a block and behind it: [S, T, H]."""
        for half in self.halves(w.layer):
            x = self.value(half.end, w, {half.start: x})
        return x

    def mean_squares(self, x: torch.Tensor, w: BlockWeights, batch: int = 8) -> dict[str, torch.Tensor]:
        """For each linear of a block the mean square of every input [in], over the windows x [S, T, H], which
        are overwritten by what the block makes of them.
        """
        sums: dict[str, torch.Tensor] = {}
        of_experts: dict[Mixture, dict[str | None, Any]] = {}
        for b in range(0, len(x), batch):
            part = x[b : b + batch]
            for half in self.halves(w.layer):
                known = {half.start: part}
                if mixture := half.mixture:
                    given = self.value(mixture.input, w, known)
                    routed: Any = self.value(mixture.routes, w, known)
                    known |= {mixture.input: given, mixture.routes: routed}
                    own = of_experts.setdefault(mixture, {})
                    experts.mean_squares(mixture, w, given.flatten(0, 1), routed, own)
                for group in half.groups:
                    known[group.input] = read = self.value(group.input, w, known)
                    squares = read.flatten(0, 1).square().sum(0)
                    sums |= {n: sums.get(n, 0) + squares for n in group.names}
                part = self.value(half.end, w, known)
            x[b : b + batch] = part
        found = {name: s / (x.shape[0] * x.shape[1]) for name, s in sums.items()}
        for mixture, own in of_experts.items():
            found |= experts.means(mixture, own)
        return found

    def normed(self, x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """The last block's output […, H] as the head reads it."""
        final = self.network.final_norm
        return self.value(final, BlockWeights({}, norm={final.weights[0]: norm}), {final.inputs[0]: x})

    def logits(self, x: torch.Tensor, norm: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """The last block's output […, H] → […, vocab]."""
        node, final = self.network.head, self.network.final_norm
        return self.value(node, BlockWeights({node.weights[0]: head}), {final: self.normed(x, norm)})


def read_block(checkpoint: Checkpoint, layer: int) -> BlockWeights:
    """Block `layer` of a checkpoint, dequantized where it is quantized, linears that stand for several apart.

    Raises CheckpointError when a weight holds NaN or infinity, by name.
    """
    import torch

    family, cfg, prefix = FAMILIES[checkpoint.config.family], checkpoint.config, f"model.layers.{layer}."
    w = BlockWeights({}, layer=layer)
    for name in family.linears(cfg, layer):
        linear = checkpoint.linear(name)
        inside = name.removeprefix(prefix)
        weight = torch.from_numpy(finite(linear.dequantize(), name))
        if name in kept(cfg):
            w.norm[inside] = weight
            continue
        w.linear |= apart(cfg, layer, inside, weight)
        if linear.bias is not None:
            bias = torch.from_numpy(finite(np.array(linear.bias, np.float32), name + ".bias"))
            w.bias |= apart(cfg, layer, inside, bias)
    for name, shape in family.norms(cfg, layer).items():
        vector = finite(np.array(checkpoint.vector(name)).reshape(shape), name)
        w.norm[name.removeprefix(prefix)] = torch.from_numpy(vector)
    return w


def apart(cfg: ModelConfig, layer: int, name: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """A linear that stands for several in its parts by name; any other one as it is. rows: [out, …]."""
    parts = network(cfg).parts(layer)[name]
    return dict(zip(parts, rows.split(list(parts.values())), strict=True)) if parts else {name: rows}


def finite(a: np.ndarray, name: str) -> np.ndarray:
    """`a` itself. Raises CheckpointError when it holds NaN or infinity."""
    if not np.isfinite(a).all():
        raise CheckpointError(
            f"The weights of {name} hold NaN or infinity.", "The file is damaged; pull or convert it again."
        )
    return a
