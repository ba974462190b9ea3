"""Quantizing one decoder block: AWQ's scales, folded into what goes before, then rounding that compensates.

AWQ (Lin et al., MLSys 2024) multiplies a linear's input channels by s and divides what produces them by s,
so that the function stays and the weights that meet large activations lose less to rounding. Each linear
then sees the inputs that the *quantized* network before it produces, and is fitted to the output that the
float network wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinychat.models import FAMILIES
from tinychat.network.config import ModelConfig
from tinychat.quantize.forward import DOWN, GATE_UP, O_PROJ, QKV, BlockWeights, Forward
from tinychat.quantize.rounding import Metric, Rounded, compensated, nearest, refine

if TYPE_CHECKING:
    import torch

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SCALE_LIMIT = 32.0  # scales stay within 1/32…32, so that folded norms and rows keep their place in fp16


@dataclass(frozen=True)
class Options:
    """How a block is quantized.

    group        inputs that share a scale
    target       what a linear is fitted to: "local": its float output on the inputs it gets; "float": its
                 output in the float network; "residual": the float network's residual stream
    damp         share of H's mean diagonal added to its diagonal
    trust        how far the target moves from local towards the float network, 0…1
    judge        windows that judge a scale by the output of attention or MLP
    rounds       rounds of coordinate descent and scale refitting
    batch        windows in one forward pass
    """

    group: int = 64
    target: str = "float"
    damp: float = 0.01
    trust: float = 1.0
    alphas: tuple[float, ...] = ALPHAS
    search: bool = True
    judge: int = 4
    rounds: int = 2
    batch: int = 8


@dataclass
class QuantizedBlock:
    """Rounded linears and folded norms, by their names inside the block; biases are the float ones,
    folded."""

    linear: dict[str, Rounded]
    bias: dict[str, torch.Tensor]
    norm: dict[str, torch.Tensor]
    layer: int = 0

    def weights(self) -> BlockWeights:
        """Dequantized, for the forward pass."""
        linear = {k: r.dequantize() for k, r in self.linear.items()}
        return BlockWeights(linear, self.bias, self.norm, self.layer)


def norm16(v: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    """A norm's weight as a file in fp16 gives it back."""
    offset = getattr(FAMILIES[cfg.family], "NORM_OFFSET", 0.0)
    return (v - offset).half().float() + offset if offset else v.half().float()


def round_to_nearest(w: BlockWeights, group: int, cfg: ModelConfig) -> QuantizedBlock:
    """RTN: every linear rounded on its own, nothing folded."""
    norms = {k: norm16(v, cfg) for k, v in w.norm.items()}
    return QuantizedBlock({k: nearest(v, group) for k, v in w.linear.items()}, dict(w.bias), norms, w.layer)


class _Moments:
    """Sums over tokens for one linear's input: XᵀX of the quantized network, and what the target needs."""

    def __init__(self):
        self.n, self.h, self.c, self.r, self.x = 0, 0, 0, 0, 0

    def add(self, x_q: torch.Tensor, x_f: torch.Tensor, gap: torch.Tensor | None = None) -> None:
        """Inputs [S, T, K] in the quantized and the float network; gap: residual of float minus quantized."""
        q, f = x_q.flatten(0, 1), x_f.flatten(0, 1)
        self.n += len(q)
        self.h = self.h + q.T @ q
        self.c = self.c + f.T @ q
        self.x = self.x + q.abs().sum(0)
        if gap is not None:
            self.r = self.r + gap.flatten(0, 1).T @ q


class BlockQuantizer:
    """Quantizes blocks in order; keeps nothing between them but the options."""

    def __init__(self, forward: Forward, options: Options):
        self.forward, self.options = forward, options

    def __call__(
        self, w: BlockWeights, x_f: torch.Tensor, x_q: torch.Tensor
    ) -> tuple[QuantizedBlock, torch.Tensor, torch.Tensor]:
        """w: the float block (not changed). x_f, x_q [S, T, H]: its input in the float and the quantized
        network, overwritten. Returns the quantized block and its outputs in both.
        """
        f, float_w, w = self.forward, w, w.copy()
        out, start = QuantizedBlock({}, {}, {}, w.layer), x_q.clone()
        self._attention(w, out, float_w, x_f, x_q)
        self._mlp(w, out, float_w, x_f, x_q)

        # What goes on is what the stored block computes, so that a resumed run sees the same numbers.
        out.norm = {k: norm16(v, f.cfg) for k, v in w.norm.items()}
        out.bias = {k: v.half().float() for k, v in w.bias.items()}
        return out, x_f, self._run(start, out.weights())

    def _attention(
        self,
        w: BlockWeights,
        out: QuantizedBlock,
        float_w: BlockWeights,
        x_f: torch.Tensor,
        x_q: torch.Tensor,
    ) -> None:
        """Quantizes q, k, v and o into `out`; w, x_f and x_q then are what follows."""
        import torch

        f = self.forward

        # q, k, v
        m = _Moments()
        for s in self._batches(x_q):
            m.add(f.attention_input(x_q[s], float_w), f.attention_input(x_f[s], float_w))
        few = f.attention_input(x_q[: self.options.judge], float_w)
        ideal = few if self.options.target == "local" else f.attention_input(x_f[: len(few)], float_w)
        wanted = f.linear(f.attend(ideal, float_w), float_w, O_PROJ)

        def attention_error(trial: BlockWeights) -> float:
            return float((f.linear(f.attend(few, trial), trial, O_PROJ) - wanted).pow(2).mean())

        s = self._quantize(QKV, w, out, m, float_w, attention_error)
        self._fold_norm(w, f.norms.attn_in, s)
        quantized = self._now(w, out, float_w)

        # o
        m = _Moments()
        inner = torch.empty(*x_q.shape[:2], w.linear[O_PROJ].shape[1])
        for s in self._batches(x_q):
            inner[s] = f.attend(f.attention_input(x_q[s], w), quantized)
            wide = f.attend(f.attention_input(x_f[s], float_w), float_w)
            m.add(inner[s], wide, self._gap(x_f[s], x_q[s]))
            x_f[s] = f.add_attention(x_f[s], f.linear(wide, float_w, O_PROJ), float_w)
        s = self._quantize((O_PROJ,), w, out, m, float_w, None, self._shared_by_heads)
        a = f.cfg.layers[w.layer].mixer
        self._fold_rows(w, out, QKV[2], s.view(a.n_kv_heads, -1, a.head_dim)[:, 0].flatten())
        o = out.linear[O_PROJ].dequantize() / s  # `inner` was made before v was divided by s
        for b in self._batches(x_q):
            y = torch.nn.functional.linear(inner[b], o, w.bias.get(O_PROJ))
            x_q[b] = f.add_attention(x_q[b], y, w)

    def _mlp(
        self,
        w: BlockWeights,
        out: QuantizedBlock,
        float_w: BlockWeights,
        x_f: torch.Tensor,
        x_q: torch.Tensor,
    ) -> None:
        """Quantizes gate, up and down into `out`; of x_q the last product is left to the stored block."""
        f = self.forward

        # gate, up
        m = _Moments()
        for s in self._batches(x_q):
            m.add(f.mlp_input(x_q[s], float_w), f.mlp_input(x_f[s], float_w))
        few = f.mlp_input(x_q[: self.options.judge], float_w)
        ideal = few if self.options.target == "local" else f.mlp_input(x_f[: len(few)], float_w)
        wanted = f.linear(f.middle(ideal, float_w), float_w, DOWN)

        def mlp_error(trial: BlockWeights) -> float:
            return float((f.linear(f.middle(few, trial), trial, DOWN) - wanted).pow(2).mean())

        s = self._quantize(GATE_UP, w, out, m, float_w, mlp_error)
        self._fold_norm(w, f.norms.mlp_in, s)
        quantized = self._now(w, out, float_w)

        # down
        m = _Moments()
        for s in self._batches(x_q):
            wide = f.middle(f.mlp_input(x_f[s], float_w), float_w)
            narrow = f.middle(f.mlp_input(x_q[s], w), quantized)
            m.add(narrow, wide, self._gap(x_f[s], x_q[s]))
            x_f[s] = f.add_mlp(x_f[s], f.linear(wide, float_w, DOWN), float_w)
        s = self._quantize((DOWN,), w, out, m, float_w, None)
        self._fold_rows(w, out, GATE_UP[1], s)

    def advance(
        self, w: BlockWeights, quantized: BlockWeights, x_f: torch.Tensor, x_q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Past a block that is quantized already: the outputs of both networks, in place."""
        return self._run(x_f, w), self._run(x_q, quantized)

    def _run(self, x: torch.Tensor, w: BlockWeights) -> torch.Tensor:
        for s in self._batches(x):
            x[s] = self.forward.block(x[s], w)
        return x

    def _gap(self, x_f: torch.Tensor, x_q: torch.Tensor) -> torch.Tensor | None:
        """What the residual target needs besides the inputs; the others never look at it."""
        return x_f - x_q if self.options.target == "residual" else None

    def _batches(self, x: torch.Tensor) -> Iterator[slice]:
        for start in range(0, len(x), self.options.batch):
            yield slice(start, start + self.options.batch)

    def _now(self, w: BlockWeights, out: QuantizedBlock, float_w: BlockWeights) -> BlockWeights:
        """Quantized where that is done already, float elsewhere."""
        linear = {k: out.linear[k].dequantize() if k in out.linear else v for k, v in float_w.linear.items()}
        return BlockWeights(linear, w.bias, w.norm, w.layer)

    def _quantize(
        self,
        names: tuple[str, ...],
        w: BlockWeights,
        out: QuantizedBlock,
        m: _Moments,
        float_w: BlockWeights,
        judge: Callable[[BlockWeights], float] | None,
        share: Callable[[torch.Tensor], torch.Tensor] = lambda s: s,
    ) -> torch.Tensor:
        """Round the linears `names`, which share an input, into `out`; returns their scales s [in].

        `judge` tells the error of a trial; without one it is the metric's own. `share` ties channels
        together.
        """
        import torch

        o = self.options
        metric = Metric.of(m.h / m.n, o.group, o.damp)
        targets = {n: self._target(w.linear[n], m, metric) for n in names}
        mean_x = (m.x / m.n).clamp_min(1e-5)
        best, best_error = torch.ones_like(mean_x), float("inf")
        for alpha in o.alphas if self._foldable(names) and len(o.alphas) > 1 else ():
            s = mean_x.pow(alpha)
            s = share((s / (s.max() * s.min()).sqrt()).clamp(1 / SCALE_LIMIT, SCALE_LIMIT))
            scaled = metric.scaled(s)
            trial = {n: compensated(targets[n] * s, scaled, o.group, search=False) for n in names}
            if judge is None:
                error = sum(scaled.loss(targets[n] * s, r) for n, r in trial.items())
            else:
                linear = dict(float_w.linear) | {n: r.dequantize() / s for n, r in trial.items()}
                error = judge(BlockWeights(linear, float_w.bias, float_w.norm, w.layer))
            if _better(error, best_error):
                best, best_error, self.last_alpha = s, error, alpha
        s = self._exact_in_norm(names, w, best)
        metric = metric.scaled(s)
        for n in names:
            target = targets[n] * s
            r = compensated(target, metric, o.group, o.search)
            out.linear[n] = refine(target, metric, r, o.rounds) if o.rounds else r
        return s

    def _target(self, w: torch.Tensor, m: _Moments, metric: Metric) -> torch.Tensor:
        """The weight that, on the quantized network's inputs, comes closest to what float wants."""
        import torch

        o = self.options
        if o.target == "local":
            return w
        wanted = w @ (m.c - m.h) / m.n
        if o.target == "residual" and not isinstance(m.r, int):
            wanted = wanted + m.r / m.n
        return w + o.trust * torch.linalg.solve(metric.h.double(), wanted.double().T).T.float()

    def _norm_before(self, names: tuple[str, ...]) -> str | None:
        return {QKV: self.forward.norms.attn_in, GATE_UP: self.forward.norms.mlp_in}.get(names)

    def _foldable(self, names: tuple[str, ...]) -> bool:
        """Whether something before the linears `names` can be divided by their scales: a norm, or the rows of
        v (for o) and of up (for down). OLMo 2's q, k, v and gate, up read the residual itself.
        """
        return names not in (QKV, GATE_UP) or self._norm_before(names) is not None

    def _exact_in_norm(self, names: tuple[str, ...], w: BlockWeights, s: torch.Tensor) -> torch.Tensor:
        """`s` moved by what fp16 rounds off the folded norm, so that the folding is exact."""
        norm = self._norm_before(names)
        if norm is None:
            return s
        folded = norm16(w.norm[norm] / s, self.forward.cfg)
        usable = (folded != 0) & (w.norm[norm] != 0)
        return (w.norm[norm] / folded).where(usable, s)

    def _fold_norm(self, w: BlockWeights, norm: str | None, s: torch.Tensor) -> None:
        if norm is not None:
            w.norm[norm] = norm16(w.norm[norm] / s, self.forward.cfg)

    def _fold_rows(self, w: BlockWeights, out: QuantizedBlock, name: str, s: torch.Tensor) -> None:
        out.linear[name].divide_rows(s)
        if name in w.bias:
            w.bias[name] = w.bias[name] / s

    def _shared_by_heads(self, s: torch.Tensor) -> torch.Tensor:
        """One scale for each channel of a KV head: all query heads of its group read the same v."""
        c = self.forward.cfg.layers[0].mixer
        per_group = s.view(c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim)
        return per_group.log().mean(1, keepdim=True).exp().expand_as(per_group).flatten()


def _better(error: float, best: float) -> bool:
    return error < best
