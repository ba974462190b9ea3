"""Quantizing one decoder block: AWQ's scales, folded into what goes before, then rounding that compensates.

AWQ (Lin et al., MLSys 2024) multiplies a linear's input channels by s and divides what produces them by s,
so that the function stays and the weights that meet large activations lose less to rounding. Each linear
then sees the inputs that the *quantized* network before it produces, and is fitted to the output that the
float network wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinychat.network.config import ModelConfig
from tinychat.quantize.experts import Mixture, given, reach
from tinychat.quantize.folding import bounded, exact_in_norm, norm16, of_rows
from tinychat.quantize.forward import Forward, Group, Half
from tinychat.quantize.grids import Grid
from tinychat.quantize.nodes import BlockWeights
from tinychat.quantize.rounding import Metric, Rounded, compensated, nearest, refine

if TYPE_CHECKING:
    import torch

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SCALE_LIMIT = 32.0  # scales stay within 1/32…32, so that folded norms and rows keep their place in fp16


@dataclass(frozen=True)
class Options:
    """How a block is quantized.

    grid         the grid of a linear by its number of inputs
    search       choose ranges by the error that is left; else the whole range of each group
    target       what a linear is fitted to: "local": its float output on the inputs it gets; "float": its
                 output in the float network; "residual": the float network's residual stream
    damp         share of H's mean diagonal added to its diagonal
    trust        how far the target moves from local towards the float network, 0…1
    judge        windows that judge a scale by the output of attention or MLP
    rounds       rounds of coordinate descent and scale refitting
    batch        windows in one forward pass
    """

    grid: Callable[[int], Grid]
    target: str = "float"
    damp: float = 0.1
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


def round_to_nearest(
    w: BlockWeights,
    grid: Callable[[int], Grid],
    cfg: ModelConfig,
    importance: Mapping[str, torch.Tensor] | None = None,
) -> QuantizedBlock:
    """RTN: every linear rounded on its own, nothing folded. importance: for each linear what an error of an
    input costs [in], by which ranges are then chosen; without it they are the whole ones.
    """
    linear = {}
    for name, v in w.linear.items():
        of_inputs = grid(v.shape[1])
        if importance is None:
            linear[name] = nearest(v, of_inputs)
        else:
            metric = Metric.diagonal(importance[name])
            linear[name] = refine(v, metric, compensated(v, metric, of_inputs))
    norms = {k: norm16(k, v, cfg) for k, v in w.norm.items()}
    return QuantizedBlock(linear, dict(w.bias), norms, w.layer)


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
        float_w, w = w, BlockWeights(w.linear, dict(w.bias), dict(w.norm), w.layer)
        out, start = QuantizedBlock({}, {}, {}, w.layer), x_q.clone()
        halves = self.forward.halves(w.layer)
        for half in halves:
            if half.mixture:
                self._mixed(half, half.mixture, w, out, float_w, x_f, x_q, goes_on=half is not halves[-1])
                continue
            for group in half.groups[:-1]:
                self._early(half, group, w, out, float_w, x_f, x_q)
            self._last(half, w, out, float_w, x_f, x_q, goes_on=half is not halves[-1])

        # What goes on is what the stored block computes, so that a resumed run sees the same numbers.
        out.norm = {k: norm16(k, v, self.forward.cfg) for k, v in w.norm.items()}
        out.bias = {k: v.half().float() for k, v in w.bias.items()}
        return out, x_f, self._run(start, out.weights())

    def _early(
        self,
        half: Half,
        group: Group,
        w: BlockWeights,
        out: QuantizedBlock,
        float_w: BlockWeights,
        x_f: torch.Tensor,
        x_q: torch.Tensor,
    ) -> None:
        """Quantizes linears that others of the half come after, into `out`; those judge the scales."""
        f, m, now = self.forward, _Moments(), self._now(half, w, out, float_w)
        for b in self._batches(x_q):
            m.add(
                f.value(group.input, now, {half.start: x_q[b]}),
                f.value(group.input, float_w, {half.start: x_f[b]}),
            )
        few_q = x_q[: self.options.judge]
        few = f.value(group.input, now, {half.start: few_q})
        few_f = few_q if self.options.target == "local" else x_f[: len(few_q)]
        ideal = few if self.options.target == "local" else f.value(group.input, float_w, {half.start: few_f})
        wanted = f.result(half, float_w, {half.start: few_f, group.input: ideal})

        def error(trial: BlockWeights) -> float:
            got = f.result(half, trial, {half.start: few_q, group.input: few})
            return float((got - wanted).pow(2).mean())

        self._fold(group, w, out, self._quantize(group, w, out, m, float_w, error))

    def _last(
        self,
        half: Half,
        w: BlockWeights,
        out: QuantizedBlock,
        float_w: BlockWeights,
        x_f: torch.Tensor,
        x_q: torch.Tensor,
        goes_on: bool,
    ) -> None:
        """Quantizes the linears that end the half, into `out`; x_f is then what follows, and x_q where it
        goes on: behind the last half of a block the stored block says what follows.
        """
        f, m, group = self.forward, _Moments(), half.groups[-1]
        quantized = self._now(half, w, out, float_w)
        inner = _room(x_q, float_w.linear[group.names[0]].shape[1]) if goes_on else None
        for b in self._batches(x_q):
            narrow = f.value(group.input, quantized, {half.start: x_q[b]})
            wide = f.value(group.input, float_w, {half.start: x_f[b]})
            m.add(narrow, wide, self._gap(x_f[b], x_q[b]))
            x_f[b] = f.value(half.end, float_w, {half.start: x_f[b], group.input: wide})
            if inner is not None:
                inner[b] = narrow
        s = self._quantize(group, w, out, m, float_w, None)
        self._fold(group, w, out, s)
        if inner is None:
            return
        # `inner` was made before what comes before the linears was divided by s
        linear = quantized.linear | {n: out.linear[n].dequantize() / s for n in group.names}
        now = BlockWeights(linear, w.bias, w.norm, w.layer)
        for b in self._batches(x_q):
            x_q[b] = f.value(half.end, now, {half.start: x_q[b], group.input: inner[b]})

    def _mixed(
        self,
        half: Half,
        mixture: Mixture,
        w: BlockWeights,
        out: QuantizedBlock,
        float_w: BlockWeights,
        x_f: torch.Tensor,
        x_q: torch.Tensor,
        goes_on: bool,
    ) -> None:
        """Quantizes experts, and what all tokens take beside them, into `out`; x_f and x_q as in `_last`."""
        f, now = self.forward, self._now(half, w, out, float_w)
        narrow, routed = given(f, half.start, mixture, now, x_q, self.options.batch)
        wide, _ = given(f, half.start, mixture, float_w, x_f, self.options.batch)
        for e, tokens in enumerate(reach(routed, narrow)):
            into, down = mixture.into.experts[e], mixture.down.experts[e]
            q, x = narrow[tokens], wide[tokens]
            self._round(Group(mixture.input, (into,)), w, out, q, x, float_w)
            now.linear.update((n, out.linear[n].dequantize()) for n in into.parts)
            q, x = mixture.between(e, now, q), mixture.between(e, float_w, x)
            group = Group(mixture.middle, (down,), rows=mixture.rows_of_up(e))
            self._fold(group, w, out, self._round(group, w, out, q, x, float_w))
        for group in half.groups:
            self._early(half, group, w, out, float_w, x_f, x_q)
        own = {n for p in mixture.products for n in p.parts} | {n for g in half.groups for n in g.names}
        linear = now.linear | {n: out.linear[n].dequantize() for n in own}
        now = BlockWeights(linear, w.bias, w.norm, w.layer)
        for b in self._batches(x_q):
            x_f[b] = f.value(half.end, float_w, {half.start: x_f[b]})
            if goes_on:
                x_q[b] = f.value(half.end, now, {half.start: x_q[b]})

    def _round(
        self,
        group: Group,
        w: BlockWeights,
        out: QuantizedBlock,
        x_q: torch.Tensor,
        x_f: torch.Tensor,
        float_w: BlockWeights,
    ) -> torch.Tensor:
        """`_quantize` on the rows [n, K] that the linears read in both networks."""
        m = _Moments()
        m.add(x_q[None], x_f[None])
        return self._quantize(group, w, out, m, float_w, None)

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
        """Sums that the residual target needs besides the inputs; the others never look at them."""
        return x_f - x_q if self.options.target == "residual" else None

    def _batches(self, x: torch.Tensor) -> Iterator[slice]:
        for start in range(0, len(x), self.options.batch):
            yield slice(start, start + self.options.batch)

    def _now(self, half: Half, w: BlockWeights, out: QuantizedBlock, float_w: BlockWeights) -> BlockWeights:
        """The half's linears quantized where that is done already, float elsewhere."""
        done = [n for group in half.groups for n in group.names if n in out.linear]
        linear = float_w.linear | {n: out.linear[n].dequantize() for n in done}
        return BlockWeights(linear, w.bias, w.norm, w.layer)

    def _quantize(
        self,
        group: Group,
        w: BlockWeights,
        out: QuantizedBlock,
        m: _Moments,
        float_w: BlockWeights,
        judge: Callable[[BlockWeights], float] | None,
    ) -> torch.Tensor:
        """Round the linears of a group into `out`; returns their scales s [in].

        `judge` tells the error of a trial; without one it is the metric's own.
        """
        import torch

        o, names = self.options, group.names
        grid = o.grid(len(m.h))
        metric = Metric.of(m.h / m.n, grid, o.damp)
        targets = {n: self._target(w.linear[n], m, metric) for n in names}
        mean_x = (m.x / m.n).clamp_min(1e-5)
        best, best_error = torch.ones_like(mean_x), float("inf")
        for alpha in o.alphas if (group.norm or group.rows) and len(o.alphas) > 1 else ():
            s = mean_x.pow(alpha)
            s = bounded(s, group, SCALE_LIMIT)
            scaled = metric.scaled(s)
            trial = {n: compensated(targets[n] * s, scaled, grid, o.search) for n in names}
            if judge is None:
                error = sum(scaled.loss(targets[n] * s, r) for n, r in trial.items())
            else:
                linear = dict(float_w.linear) | {n: r.dequantize() / s for n, r in trial.items()}
                error = judge(BlockWeights(linear, float_w.bias, float_w.norm, w.layer))
            if _better(error, best_error):
                best, best_error, self.last_alpha = s, error, alpha
        s = exact_in_norm(group, w, best, self.forward.cfg)
        metric = metric.scaled(s)
        for n in names:
            target = targets[n] * s
            r = compensated(target, metric, grid, o.search)
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

    def _fold(self, group: Group, w: BlockWeights, out: QuantizedBlock, s: torch.Tensor) -> None:
        """Divide what comes before the linears of a group by their scales."""
        if group.norm is not None:
            w.norm[group.norm] = norm16(group.norm, w.norm[group.norm] / s, self.forward.cfg)
        if group.rows is None:
            return
        s = of_rows(s, group)
        out.linear[group.rows].divide_rows(s)
        if group.rows in w.bias:
            w.bias[group.rows] = w.bias[group.rows] / s


def _room(x: torch.Tensor, width: int) -> torch.Tensor:
    """Room for as many windows and tokens as x [S, T, …] has, of another width."""
    return x.new_empty(*x.shape[:2], width)


def _better(error: float, best: float) -> bool:
    return error < best
