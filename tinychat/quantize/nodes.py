"""A family's forward pass written down instead of computed: an implementation of `Ops` that returns nodes.

A node knows what it reads and how it is computed in float32 over whole windows, with whatever weights. So a
quantizer can stop at any of them: look at the inputs of a linear, or go on from there with other weights.
Shapes: S windows, T tokens each, H hidden, D head_dim, F intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tinychat.backends.reference_experts import ExpertOps
from tinychat.base.errors import UnsupportedModelError
from tinychat.network.config import AttentionConfig, RopeConfig
from tinychat.network.ops import DeltaWeights, MambaWeights
from tinychat.network.recurrence import ConvConfig, DeltaConfig, MambaConfig
from tinychat.quantize.recurrence import conv_over, delta_over, mamba_over
from tinychat.quantize.routed import Routed
from tinychat.quantize.windows import attended, attended_latent, rms, rotated

if TYPE_CHECKING:
    import torch


@dataclass
class BlockWeights:
    """Weights of one block in float32, by their names inside the block (`mlp.up_proj`); a linear that is
    stored for several is in its parts.
    """

    linear: dict[str, torch.Tensor]
    bias: dict[str, torch.Tensor] = field(default_factory=dict)
    norm: dict[str, torch.Tensor] = field(default_factory=dict)
    layer: int = 0

    def copy(self) -> BlockWeights:
        """Tensors of its own."""
        return BlockWeights(
            {k: v.clone() for k, v in self.linear.items()},
            {k: v.clone() for k, v in self.bias.items()},
            {k: v.clone() for k, v in self.norm.items()},
            self.layer,
        )


@dataclass(eq=False)
class Node:
    """One verb of the forward pass.

    op       the verb, or "add" for what a verb adds to, and "heads" for a part of `split_heads`
    inputs   the nodes that it reads
    run      its value from the weights of its block and the values of its inputs
    weights  the names of the modules that it uses
    """

    op: str
    inputs: tuple[Node, ...]
    run: Callable[..., Any]
    weights: tuple[str, ...] = ()
    attention: AttentionConfig | None = None


@dataclass(eq=False)
class Product(Node):
    """Linears that share an input. Its value is a list of the products of its parts, or the one product.

    sizes  rows of the parts, where one linear stands for several
    """

    sizes: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its parts inside their block."""
        names = tuple(short(name) for name in self.weights)
        return tuple(f"{names[0]}.{i}" for i in range(len(self.sizes))) if self.sizes else names

    def cut(self, *sizes: int) -> None:
        """Take a linear that stands for several apart, into so many rows each."""
        if len(self.weights) == 1 and not self.sizes:
            self.sizes = sizes
            self.run = _product(self.parts)


@dataclass(eq=False)
class ExpertProduct(Node):
    """Linears of experts, of each those that share an input. Its value is a list of theirs, each of the rows
    that the expert gets, in their order; so is what it reads, or it is what all are given: [S, T, in].
    """

    experts: tuple[Product, ...] = ()


def short(name: str) -> str:
    """A module's name inside its block; that of one outside of all as it is."""
    return name.split(".", 3)[3] if name.startswith("model.layers.") else name


class Routing(tuple[str, ...]):
    """Names of a linear that chooses: it stays as it is stored, among the norms of its block."""


class Names:
    """A `WeightSource` whose handles are the names."""

    def embedding(self, name: str) -> str:
        return name

    def vector(self, name: str) -> str:
        return name

    def linear(self, *names: str) -> tuple[str, ...]:
        return names

    def router(self, name: str) -> Routing:
        return Routing((name,))

    def head(self, name: str, tied_to: str) -> str:
        return name


class Recorder:
    """Implements `Ops` by writing nodes down, in the order in which they are computed."""

    def __init__(self, rows: dict[str, int]):
        """rows: outputs of each linear, by its whole name."""
        self.rows = rows
        self.nodes: list[Node] = []

    def embed(self, weight: str, scale: float = 1.0, norm_eps: float = 0.0) -> Node:
        def run(w: BlockWeights, ids: torch.Tensor) -> torch.Tensor:
            import torch

            x = w.linear[weight][ids]
            x = x if scale == 1 else x * scale
            return rms(x, torch.ones(x.shape[-1]), norm_eps) if norm_eps else x

        return self._node("embed", (IDS,), run, weight)

    def rms_norm(self, x: Node, weight: str, eps: float, add_to: Node | None = None) -> Node:
        name = short(weight)
        y = self._node("rms_norm", (x,), lambda w, x: rms(x, w.norm[name], eps), weight)
        return y if add_to is None else self._add(add_to, y)

    def linear(self, x: Node, weight: tuple[str, ...], add_to: Node | None = None) -> Node:
        if isinstance(weight, Routing):
            name = short(weight[0])
            y = self._node("gates", (x,), lambda w, x: x @ w.norm[name].T, *weight)
            return y if add_to is None else self._add(add_to, y)
        y = Product("linear", (x,), _product(tuple(map(short, weight))), weight)
        self.nodes.append(y)
        return y if add_to is None else self._add(add_to, y)

    def split_heads(self, qkv: Product, attention: AttentionConfig) -> tuple[Node, Node, Node]:
        d = attention.head_dim
        qkv.cut(*[n * d for n in attention.projected if n])

        def part(i: int) -> Node:
            return self._node("heads", (qkv,), lambda w, x: x[i].unflatten(-1, (-1, d)).transpose(1, 2))

        return part(0), part(1), part(1 if attention.tied else 2)

    def gated_heads(self, qkv: Product, attention: AttentionConfig) -> tuple[Node, Node, Node, Node]:
        d, kv = attention.head_dim, attention.n_kv_heads * attention.head_dim
        qkv.cut(2 * attention.n_heads * d, kv, kv)

        def half(i: int) -> Callable[..., Any]:
            return lambda w, x: x[0].unflatten(-1, (-1, 2, d))[..., i, :]

        def part(i: int) -> Node:
            return self._node("heads", (qkv,), lambda w, x: x[i].unflatten(-1, (-1, d)).transpose(1, 2))

        q = self._node("heads", (qkv,), lambda w, x: half(0)(w, x).transpose(1, 2))
        gate = self._node("gates", (qkv,), lambda w, x: half(1)(w, x).flatten(2))
        return q, part(1), part(2), gate

    def norm_heads(
        self, q: Node, k: Node, q_weight: str | None, k_weight: str | None, eps: float
    ) -> tuple[Node, Node]:
        def normed(x: Node, weight: str | None) -> Node:
            if weight is None:
                return self._node("norm_heads", (x,), lambda w, x: rms(x, x.new_ones(x.shape[-1]), eps))
            name = short(weight)

            def run(w: BlockWeights, x: torch.Tensor) -> torch.Tensor:
                scale, d = w.norm[name], x.shape[-1]
                spans = x.transpose(1, 2).flatten(2).unflatten(-1, (-1, len(scale)))
                return rms(spans, scale, eps).flatten(-2).unflatten(-1, (-1, d)).transpose(1, 2)

            return self._node("norm_heads", (x,), run, weight)

        return normed(q, q_weight), normed(k, k_weight)

    def norm_values(self, v: Node, eps: float) -> Node:
        return self._node("norm_values", (v,), lambda w, v: rms(v, v.new_ones(v.shape[-1]), eps))

    def rope(self, q: Node, k: Node, rope: RopeConfig) -> tuple[Node, Node]:
        def turned(x: Node) -> Node:
            return self._node("rope", (x,), lambda w, x: rotated(x, rope))

        return turned(q), turned(k)

    def attention(
        self, q: Node, k: Node, v: Node, attention: AttentionConfig, layer: int, sinks: str | None = None
    ) -> Node:
        names = () if sinks is None else (sinks,)
        if attention.source >= 0:
            raise UnsupportedModelError(
                "A model with layers that attend to another's keys and values cannot be quantized yet.",
                'It runs with quantize="rtn", or as someone quantized it.',
            )

        def run(w: BlockWeights, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            own = [w.norm[short(name)] for name in names]
            return attended(q, k, v, attention, *own).transpose(1, 2).flatten(2)

        node = self._node("attention", (q, k, v), run, *names)
        node.attention = attention
        return node

    def short_conv(self, bcx: Product, weight: str, conv: ConvConfig, layer: int) -> Node:
        name, n = short(weight), conv.channels
        bcx.cut(n, n, n)
        return self._node(
            "short_conv", (bcx,), lambda w, x: x[1] * conv_over(x[0] * x[2], w.norm[name]), weight
        )

    def delta_rule(
        self, qkv: Node, beta: Node, alpha: Node, weights: DeltaWeights, delta: DeltaConfig, layer: int
    ) -> Node:
        names = (weights.conv, weights.decay, weights.dt)

        def run(w: BlockWeights, qkv: torch.Tensor, beta: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
            conv, decay, dt = (w.norm[short(name)] for name in names)
            return delta_over(qkv, beta, alpha, conv, decay, dt, delta)

        return self._node("delta_rule", (qkv, beta, alpha), run, *names)

    def head_linear(self, x: Node, weight: tuple[str, ...], heads: int) -> Node:
        (name,) = weight

        def run(w: BlockWeights, x: torch.Tensor) -> torch.Tensor:
            each = w.norm[short(name)].unflatten(0, (heads, -1))
            x = x.unflatten(-1, (heads, -1))[..., : each.shape[-1]]
            return (x[..., None, :] @ each.transpose(1, 2)).flatten(-3)

        return self._node("head_linear", (x,), run, name)

    def latent_attention(
        self,
        q: Node,
        absorbed: Node,
        row: Node,
        norm: str,
        eps: float,
        attention: AttentionConfig,
        layer: int,
    ) -> Node:
        def run(w: BlockWeights, q: torch.Tensor, absorbed: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            return attended_latent(q, absorbed, row, w.norm[short(norm)], eps, attention)

        return self._node("latent_attention", (q, absorbed, row), run, norm)

    def mamba(self, x: Node, weights: MambaWeights, mamba: MambaConfig, layer: int, eps: float) -> Node:
        names = (weights.conv, weights.bias, weights.decay, weights.dt, weights.skip, weights.norm)

        def run(w: BlockWeights, x: torch.Tensor) -> torch.Tensor:
            vectors = (None if name is None else w.norm[short(name)] for name in names)
            return mamba_over(x, MambaWeights(*vectors), mamba, eps)

        return self._node("mamba", (x,), run, *(name for name in names if name is not None))

    def multiplied(self, x: Node, sizes: Sequence[int], factors: Sequence[float]) -> Node:
        def run(w: BlockWeights, x: Any) -> Any:
            import torch

            if isinstance(x, list):
                return [part * f for part, f in zip(x, factors, strict=True)]
            return x * torch.cat([torch.full((n,), f) for n, f in zip(sizes, factors, strict=True)])

        return self._node("multiplied", (x,), run)

    def norm_gated(self, x: Node, weight: str, gate: Node, eps: float) -> Node:
        from torch.nn import functional

        def run(w: BlockWeights, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            scale = w.norm[short(weight)]
            heads = rms(x.unflatten(-1, (-1, len(scale))), scale, eps)
            return heads.flatten(-2) * functional.silu(gate)

        return self._node("norm_gated", (x, gate), run, weight)

    def behind(self, *given: Any, **also: Any) -> Any:
        raise NotImplementedError  # `forward.network` leaves the layer that predicts further out

    recall = leave = join = keep = behind

    def sigmoid_mul(self, x: Node, gate: Node) -> Node:
        def run(w: BlockWeights, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return (x.unflatten(-1, (gate.shape[-1], -1)) * gate.sigmoid()[..., None]).flatten(-2)

        return self._node("sigmoid_mul", (x, gate), run)

    def silu_mul(self, gate_up: Product) -> Node:
        from torch.nn import functional

        return self._gated("silu_mul", gate_up, functional.silu)

    def gelu_mul(self, gate_up: Product) -> Node:
        from torch.nn import functional

        return self._gated("gelu_mul", gate_up, lambda x: functional.gelu(x, approximate="tanh"))

    def _gated(self, op: str, gate_up: Product | ExpertProduct, gate: Callable[..., torch.Tensor]) -> Node:
        if isinstance(gate_up, ExpertProduct):
            return self._node(op, (gate_up,), lambda w, xs: [gate(x[0]) * x[1] for x in xs])
        if isinstance(gate_up, Product):  # else it is multiplied, and was two
            self._halve(gate_up)
        return self._node(op, (gate_up,), lambda w, x: gate(x[0]) * x[1])

    def relu_square(self, up: Node) -> Node:
        if isinstance(up, ExpertProduct):
            return self._node("relu_square", (up,), lambda w, xs: [x.relu().square() for x in xs])
        return self._node("relu_square", (up,), lambda w, x: x.relu().square())

    def gelu_columns(self, gate: Node, x: Node, first: int) -> Node:
        raise NotImplementedError  # `embed_onto` comes first

    def norm_columns(self, x: Node, weight: str, eps: float) -> Node:
        name = short(weight)

        def run(w: BlockWeights, x: torch.Tensor) -> torch.Tensor:
            return rms(x.unflatten(-1, (-1, len(w.norm[name]))), w.norm[name], eps).flatten(-2)

        return self._node("norm_columns", (x,), run, weight)

    def embed_onto(self, x: Node, weight: str, scale: float, factor: float) -> Node:
        raise UnsupportedModelError(
            "A model with an embedding for each layer cannot be quantized yet.",
            'It runs with quantize="rtn", or as someone quantized it.',
        )

    def tanh(self, *given: Any) -> Any:
        raise NotImplementedError  # of models with an embedding for each layer: `embed_onto` comes first

    times = summed = resized = mix_streams = correct_streams = cut_gates = tanh

    def scaled(self, x: Node, weight: str) -> Node:
        return self._node("scaled", (x,), lambda w, x: x * w.norm[short(weight)], weight)

    def clamped_mul(self, gate_up: Product, limit: float, alpha: float) -> Node:
        raise UnsupportedModelError(
            "The experts of a gpt-oss have 4 bits as they are, and are not quantized.", "Run it as it is."
        )

    def route(
        self,
        scores: Node,
        n: int,
        normalize: bool,
        sigmoid: bool = False,
        bias: str | None = None,
        scale: float = 1.0,
        each: str | None = None,
        groups: tuple[int, int] = (1, 1),
    ) -> Node:
        names = [name for name in (bias, each) if name is not None]

        def run(w: BlockWeights, scores: torch.Tensor) -> Routed:
            b, e = (None if name is None else w.norm[short(name)] for name in (bias, each))
            rule = (n, normalize, sigmoid, b, scale, e, groups)
            chosen, weights = ExpertOps.route(None, scores.flatten(0, 1), *rule)  # type: ignore[arg-type]
            return Routed.of(chosen, weights, scores.shape[-1])

        return self._node("route", (scores,), run, *names)

    def expert_linear(self, x: Node, weights: Sequence[tuple[str, ...]], routes: Node) -> ExpertProduct:
        own = tuple(Product("linear", (x,), _product(tuple(map(short, of))), of) for of in weights)

        def run(w: BlockWeights, x: Any, routed: Routed) -> list[Any]:
            rows = x if isinstance(x, list) else [x.flatten(0, 1)[tokens] for tokens in routed.tokens]
            return [linears.run(w, given) for linears, given in zip(own, rows, strict=True)]

        names = tuple(name for linears in own for name in linears.weights)
        node = ExpertProduct("expert_linear", (x, routes), run, names, experts=own)
        self.nodes.append(node)
        return node

    def expert_sum(self, x: Node, routes: Node, add_to: Node | None = None) -> Node:
        def run(
            w: BlockWeights, xs: list[torch.Tensor], routed: Routed, scores: torch.Tensor
        ) -> torch.Tensor:
            windows, tokens = scores.shape[:2]
            out = xs[0].new_zeros(windows * tokens, xs[0].shape[1])
            for rows, places, weights in zip(xs, routed.tokens, routed.weights, strict=True):
                out = out.index_add(0, places, rows * weights[:, None])
            return out.view(windows, tokens, -1)

        y = self._node("expert_sum", (x, routes, *routes.inputs), run)
        return y if add_to is None else self._add(add_to, y)

    def lm_head(
        self, x: Node, weight: str, scale: float = 1.0, soft_cap: float = 0.0, first: int = 0
    ) -> Node:
        def run(w: BlockWeights, x: torch.Tensor) -> torch.Tensor:
            import torch

            y = x @ w.linear[weight].T * scale
            return soft_cap * torch.tanh(y / soft_cap) if soft_cap else y

        return self._node("lm_head", (x,), run, weight)

    def _halve(self, gate_up: Product) -> None:
        n = self.rows[gate_up.weights[0]] // 2
        gate_up.cut(n, n)

    def _add(self, x: Node, y: Node) -> Node:
        return self._node("add", (x, y), lambda w, x, y: x + y)

    def _node(self, op: str, inputs: tuple[Node, ...], run: Callable[..., Any], *weights: str) -> Node:
        node = Node(op, inputs, run, weights)
        self.nodes.append(node)
        return node


IDS = Node("ids", (), lambda w: None)
"""The token ids [S, T]: what is embedded."""


def _product(parts: tuple[str, ...]) -> Callable[[BlockWeights, torch.Tensor], Any]:
    def run(w: BlockWeights, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        import torch

        products = [torch.nn.functional.linear(x, w.linear[p], w.bias.get(p)) for p in parts]
        return products if len(parts) > 1 else products[0]

    return run
