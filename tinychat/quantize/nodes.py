"""A family's forward pass written down instead of computed: an implementation of `Ops` that returns nodes.

A node knows what it reads and how it is computed in float32 over whole windows, with whatever weights. So a
quantizer can stop at any of them: look at the inputs of a linear, or go on from there with other weights.
Shapes: S windows, T tokens each, H hidden, D head_dim, F intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tinychat.base.errors import UnsupportedModelError
from tinychat.network.config import AttentionConfig, RopeConfig
from tinychat.network.ops import DeltaWeights, MambaWeights
from tinychat.network.recurrence import ConvConfig, DeltaConfig, MambaConfig
from tinychat.quantize.recurrence import conv_over, delta_over, mamba_over

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
            return _norm(x, torch.ones(x.shape[-1]), norm_eps) if norm_eps else x

        return self._node("embed", (IDS,), run, weight)

    def rms_norm(self, x: Node, weight: str, eps: float, add_to: Node | None = None) -> Node:
        name = short(weight)
        y = self._node("rms_norm", (x,), lambda w, x: _norm(x, w.norm[name], eps), weight)
        return y if add_to is None else self._add(add_to, y)

    def linear(self, x: Node, weight: tuple[str, ...], add_to: Node | None = None) -> Node:
        if isinstance(weight, Routing):
            return self._node("gates", (x,), lambda w, x: x @ w.norm[short(weight[0])].T, *weight)
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
                return self._node("norm_heads", (x,), lambda w, x: _norm(x, x.new_ones(x.shape[-1]), eps))
            name = short(weight)

            def run(w: BlockWeights, x: torch.Tensor) -> torch.Tensor:
                scale, d = w.norm[name], x.shape[-1]
                spans = x.transpose(1, 2).flatten(2).unflatten(-1, (-1, len(scale)))
                return _norm(spans, scale, eps).flatten(-2).unflatten(-1, (-1, d)).transpose(1, 2)

            return self._node("norm_heads", (x,), run, weight)

        return normed(q, q_weight), normed(k, k_weight)

    def norm_values(self, v: Node, eps: float) -> Node:
        return self._node("norm_values", (v,), lambda w, v: _norm(v, v.new_ones(v.shape[-1]), eps))

    def rope(self, q: Node, k: Node, rope: RopeConfig) -> tuple[Node, Node]:
        def turned(x: Node) -> Node:
            return self._node("rope", (x,), lambda w, x: _rotate(x, rope))

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
            return _attention(q, k, v, attention, *own).transpose(1, 2).flatten(2)

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
        raise UnsupportedModelError(
            "A model with latent attention cannot be quantized yet.",
            'It runs with quantize="rtn", or as someone quantized it.',
        )

    def latent_attention(self, *given: Any) -> Any:
        raise NotImplementedError  # `head_linear` comes first

    def mamba(self, x: Node, weights: MambaWeights, mamba: MambaConfig, layer: int, eps: float) -> Node:
        names = (weights.conv, weights.bias, weights.decay, weights.dt, weights.skip, weights.norm)

        def run(w: BlockWeights, x: torch.Tensor) -> torch.Tensor:
            vectors = (None if name is None else w.norm[short(name)] for name in names)
            return mamba_over(x, MambaWeights(*vectors), mamba, eps)

        return self._node("mamba", (x,), run, *(name for name in names if name is not None))

    def multiplied(self, x: Node, sizes: Sequence[int], factors: Sequence[float]) -> Node:
        if isinstance(x, Product):
            x.cut(*sizes)

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
            heads = _norm(x.unflatten(-1, (-1, len(scale))), scale, eps)
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

        self._halve(gate_up)
        return self._node("silu_mul", (gate_up,), lambda w, x: functional.silu(x[0]) * x[1])

    def gelu_mul(self, gate_up: Product) -> Node:
        from torch.nn import functional

        self._halve(gate_up)
        return self._node(
            "gelu_mul", (gate_up,), lambda w, x: functional.gelu(x[0], approximate="tanh") * x[1]
        )

    def relu_square(self, up: Node) -> Node:
        return self._node("relu_square", (up,), lambda w, x: x.relu().square())

    def gelu_columns(self, gate: Node, x: Node, first: int) -> Node:
        raise NotImplementedError  # `embed_onto` comes first

    def norm_columns(self, x: Node, weight: str, eps: float) -> Node:
        raise UnsupportedModelError(
            "A model with an embedding for each layer cannot be quantized yet.",
            'It runs with quantize="rtn", or as someone quantized it.',
        )

    def embed_onto(self, x: Node, weight: str, scale: float, factor: float) -> Node:
        raise NotImplementedError  # `norm_columns` comes first

    def tanh(self, *given: Any) -> Any:
        raise NotImplementedError  # of models with an embedding for each layer: `norm_columns` comes first

    times = summed = resized = mix_streams = correct_streams = cut_gates = tanh

    def scaled(self, x: Node, weight: str) -> Node:
        return self._node("scaled", (x,), lambda w, x: x * w.norm[short(weight)], weight)

    def clamped_mul(self, gate_up: Product, limit: float, alpha: float) -> Node:
        raise NotImplementedError  # `route` comes first

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
    ) -> Any:
        raise UnsupportedModelError(
            "A mixture of experts cannot be quantized yet.",
            'It runs with quantize="rtn", or as someone quantized it.',
        )

    def expert_linear(self, x: Node, weights: Sequence[Any], routes: Any) -> Any:
        raise NotImplementedError  # `route` comes first

    def expert_sum(self, x: Node, routes: Any, add_to: Node | None = None) -> Any:
        raise NotImplementedError

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


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    import torch

    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@lru_cache(maxsize=8)
def _turns(rope: RopeConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the positions 0…length - 1: each [length, D / 2]."""
    import torch

    with torch.inference_mode(False):  # kept for those who want gradients through them
        angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.from_numpy(rope.frequencies())
        return (rope.magnitude * torch.cos(angle)).float(), (rope.magnitude * torch.sin(angle)).float()


def _rotate(x: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """[S, heads, T, D] at the positions 0…T - 1."""
    import torch

    cos, sin = _turns(rope, x.shape[2])
    half = cos.shape[1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionConfig, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention within each window; q, k, v and result [S, heads, T, D]. sinks: [heads]."""
    import torch

    t, cap, window = q.shape[2], a.soft_cap, a.window
    if a.slope:
        far = torch.log1p(torch.floor(torch.arange(t, dtype=torch.float64) / a.original))
        q = q * (1 + a.slope * far).float()[:, None]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if not cap and sinks is None and not 0 < window < t:
        return sdpa(q, k, v, is_causal=True, scale=a.scale, enable_gqa=True)
    distance = torch.arange(t)[:, None] - torch.arange(t)
    seen = (distance >= 0) & (distance < (window or t))
    if not cap and sinks is None:
        return sdpa(q, k, v, attn_mask=seen, scale=a.scale, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (a.scale or q.shape[-1] ** -0.5)
    scores = (cap * torch.tanh(scores / cap) if cap else scores).masked_fill(~seen, -torch.inf)
    if sinks is None:
        return scores.softmax(-1) @ v
    one_more = sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, one_more], dim=-1).softmax(-1)[..., :-1] @ v
