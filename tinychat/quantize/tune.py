"""Tuning: what stands beside the codes is distilled against the float model's distributions of next tokens.

The codes of a quantized model stay. Its scales (and offsets, where the format has some that are not integers)
and the norms of its blocks move by gradient descent, so that KL(float ‖ quantized) over the vocabulary falls
on calibration text. Each of these numbers moves by a share of itself: θ, from 0.

One block in float32 is enough memory: the forward pass may keep nothing but the residual stream between
blocks, and the backward pass then runs each block again. Where there is room for more, all blocks are kept
until the way back, which takes a third less time. Besides that the codes lie in memory, a byte each, and the
float model's last hidden states of all windows, from which its distributions are computed a few tokens at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tinychat.base.machine import available_memory
from tinychat.network.config import ModelConfig
from tinychat.network.weight_form import Coded, Numbers
from tinychat.network.weights import QuantizedLinear
from tinychat.quantize.forward import Forward, apart, read_block
from tinychat.quantize.layouts import StoredBlock
from tinychat.quantize.linears import quantized
from tinychat.quantize.nodes import BlockWeights

if TYPE_CHECKING:
    import torch

    from tinychat.network.checkpoint import Checkpoint

LENGTH = 256  # tokens of a window
TOKENS = 64  # whose distributions are in memory at once


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    steps     of gradient descent
    batch     windows in one of them
    rate      of Adam: the share of itself by which a number moves in a step at the highest
    warmup    steps until that; then the rate falls along a cosine
    held_out  windows that no step uses; they tell which state is kept
    every     steps from one look at them to the next
    """

    steps: int = 96
    batch: int = 2
    rate: float = 5e-4
    warmup: int = 8
    held_out: int = 8
    every: int = 16

    @property
    def windows(self) -> int:
        """Windows of which each is seen about once."""
        return self.steps * self.batch + self.held_out

    def at(self, step: int) -> float:
        """The rate of a step."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


PLAN = Schedule()


class Moving:
    """Numbers of a file that move by shares of themselves. numbers: float16, float32 or coded, whose floats
    move and whose codes stay; anything else does not move.
    """

    def __init__(self, numbers: Numbers):
        import torch

        self.numbers = numbers
        floats = numbers.times if isinstance(numbers, Coded) else numbers
        self.share: torch.Tensor | None = None
        self._codes = torch.from_numpy(_coded(numbers)) if isinstance(numbers, Coded) else None
        if floats is not None:
            self._base = torch.from_numpy(floats.astype(np.float32))
            self.share = torch.zeros_like(self._base, requires_grad=True)

    def value(self) -> torch.Tensor:
        """float32, as they are now, in the shape of `numbers`."""
        if self.share is None:
            assert self._codes is not None
            return self._codes
        now = self._base * (1 + self.share)
        if self._codes is None:
            return now
        return now.repeat_interleave(self._codes.shape[1] // now.shape[1], dim=1) * self._codes

    def stored(self) -> Numbers:
        """What a file holds of them."""
        if self.share is None:
            return self.numbers
        now = (self._base * (1 + self.share)).detach().numpy()
        if isinstance(self.numbers, Coded):
            assert self.numbers.times is not None
            return replace(self.numbers, times=now.astype(self.numbers.times.dtype))
        return now.astype(self.numbers.dtype)


def _coded(numbers: Coded) -> np.ndarray:
    """float32 of the codes alone, or of all where no float stands beside them."""
    if numbers.times is None:
        return numbers.floats()
    return replace(numbers, times=np.ones_like(numbers.times)).floats()


class TunedLinear:
    """A quantized linear whose scales and offsets move."""

    def __init__(self, linear: QuantizedLinear):
        import torch

        self.linear = linear
        self.scales = Moving(linear.scales)
        self.offsets = None if linear.offsets is None else Moving(linear.offsets)
        self._back = None if linear.perm is None else torch.from_numpy(linear.perm).long().argsort()

    def moving(self) -> list[Moving]:
        """The numbers that stand beside the codes."""
        return [self.scales] if self.offsets is None else [self.scales, self.offsets]

    def weight(self) -> torch.Tensor:
        """float32 [out, in], with a gradient to the numbers that move."""
        n, k = self.linear.shape
        w = self._values() * self._each_row(self.scales.value())
        if self.offsets is not None:
            w = w + self._each_row(self.offsets.value())
        w = w.view(n, k)
        return w if self._back is None else w[:, self._back]

    def stored(self) -> QuantizedLinear:
        """The weight with its numbers as a file holds them now."""
        offsets = None if self.offsets is None else self.offsets.stored()
        return replace(self.linear, scales=self.scales.stored(), offsets=offsets)

    def _values(self) -> torch.Tensor:
        """The codes decoded, less their zero points: float32 [out, groups, group]."""
        import torch

        linear = self.linear
        if linear.table is not None or linear.zeros is None:
            return torch.from_numpy(linear.values()).view(len(linear.codes), -1, linear.group)
        codes = torch.from_numpy(linear.codes).view(len(linear.codes), -1, linear.group)
        return codes.float().sub_(self._each_row(torch.from_numpy(linear.zeros).float()))

    def _each_row(self, beside: torch.Tensor) -> torch.Tensor:
        """[out, groups, 1] of what stands beside groups."""
        rows = self.linear.rows
        if rows > 1:
            beside = beside.repeat_interleave(rows, 0)[: len(self.linear.codes)]
        return beside[..., None]


class TunedBlock:
    """A block whose numbers move."""

    def __init__(self, stored: StoredBlock):
        self.layer = stored.layer
        self.linear = {name: TunedLinear(linear) for name, linear in stored.linear.items()}
        self.norm = {name: Moving(norm) for name, norm in stored.norm.items()}
        self.whole = stored.whole

    def moving(self) -> Iterator[Moving]:
        """All of its numbers that move."""
        for linear in self.linear.values():
            yield from linear.moving()
        yield from self.norm.values()

    def weights(self, cfg: ModelConfig) -> BlockWeights:
        """Dequantized, for the forward pass, with gradients to what moves."""
        import torch

        w = BlockWeights({}, layer=self.layer)
        for name, tuned in self.linear.items():
            w.linear |= apart(cfg, self.layer, name, tuned.weight())
            if tuned.linear.bias is not None:
                bias = torch.from_numpy(tuned.linear.bias.astype(np.float32))
                w.bias |= apart(cfg, self.layer, name, bias)
        w.norm = {name: norm.value() for name, norm in self.norm.items()}
        w.norm |= {name: torch.from_numpy(a) for name, a in self.whole.items()}
        return w

    def stored(self) -> StoredBlock:
        """The block with its numbers as they are now."""
        linear = {name: tuned.stored() for name, tuned in self.linear.items()}
        norm = {name: moving.value().detach().numpy() for name, moving in self.norm.items()}
        return StoredBlock(self.layer, linear, norm, self.whole)


class Tuner:
    """Tunes the blocks of a quantized model against the float model that they were made from.

    checkpoint  the float model
    blocks      all of the quantized model's, in order; their numbers move
    keeps       whether blocks stay in memory between the forward and the backward pass
    """

    def __init__(
        self, checkpoint: Checkpoint, blocks: Sequence[TunedBlock], schedule: Schedule | None = None
    ):
        import torch

        self.checkpoint, self.blocks, self.schedule = checkpoint, blocks, schedule or PLAN
        self.forward = Forward(checkpoint.config)
        self.keeps = available_memory() > 2 * kept(checkpoint.config)
        self._embedding = torch.from_numpy(checkpoint.linear("model.embed_tokens").dequantize())
        tied = checkpoint.config.tie_embeddings
        self._head = self._embedding if tied else torch.from_numpy(checkpoint.linear("lm_head").dequantize())
        self._norm = torch.from_numpy(np.array(checkpoint.vector("model.norm")))
        moving = [m for block in blocks for m in block.moving()]
        self._shares = [m.share for m in moving if m.share is not None]

    def __call__(
        self, tokens: np.ndarray, report: Callable[[int, int, float], None] | None = None
    ) -> dict[str, Any]:
        """Move the blocks' numbers.

        tokens  int64 [windows, length]; the first `held_out` of them are held out
        report  called with (steps done, steps, least KL on the held-out windows so far, in nats a token)

        The state that is best on the held-out windows is kept: it is never worse there than the one given.
        Returns facts: divergence_before and divergence_after on these windows, and the steps to that state.
        """
        import torch

        plan, ids = self.schedule, torch.from_numpy(tokens)
        held = min(plan.held_out, len(ids) // 2)
        if not held or not self._shares:
            return {"steps": 0}
        with torch.no_grad():
            wanted = self._float_states(ids)
        order = _order(len(ids) - held, plan.steps * plan.batch) + held
        adam = torch.optim.Adam(self._shares, lr=plan.rate, betas=(0.9, 0.98))
        before = best = self._divergence(ids[:held], wanted[:held])
        kept, steps = [s.detach().clone() for s in self._shares], 0
        report = report or (lambda done, steps, kl: None)
        for step in range(plan.steps):
            report(step, plan.steps, best)
            for group in adam.param_groups:
                group["lr"] = plan.at(step)
            rows = order[step * plan.batch : (step + 1) * plan.batch]
            adam.zero_grad()
            with _fast_products():
                self._backward(ids[rows], wanted[rows])
            adam.step()
            if (step + 1) % plan.every and step + 1 < plan.steps:
                continue
            now = self._divergence(ids[:held], wanted[:held])
            if now < best:
                best, steps = now, step + 1
                kept = [s.detach().clone() for s in self._shares]
        with torch.no_grad():
            for share, value in zip(self._shares, kept, strict=True):
                share.copy_(value)
        return {"divergence_before": before, "divergence_after": best, "steps": steps}

    def _float_states(self, ids: torch.Tensor) -> torch.Tensor:
        """The float model's last hidden states, before its final norm: [S, T, H]."""
        x = self.forward.embed(self._embedding, ids)
        for layer in range(self.checkpoint.config.n_layers):
            w = read_block(self.checkpoint, layer)
            for i in range(0, len(x), 8):
                x[i : i + 8] = self.forward.block(x[i : i + 8], w)
        return x

    def _divergence(self, ids: torch.Tensor, wanted: torch.Tensor) -> float:
        """KL(float ‖ quantized) in nats, the mean over tokens."""
        import torch

        total, batch = 0.0, self.schedule.batch
        with torch.no_grad():
            for i in range(0, len(ids), batch):
                x = self.forward.embed(self._embedding, ids[i : i + batch])
                for block in self.blocks:
                    x = self.forward.block(x, block.weights(self.forward.cfg))
                total += sum(float(self._kl(a, b)) for a, b in self._pieces(x, wanted[i : i + batch]))
        return total / ids.numel()

    def _backward(self, ids: torch.Tensor, wanted: torch.Tensor) -> None:
        """Gradients of the mean divergence over these windows, to all shares."""
        import torch

        x, way = self.forward.embed(self._embedding, ids), []
        for block in self.blocks:
            start = x.detach().requires_grad_()
            with torch.set_grad_enabled(self.keeps):
                x = self.forward.block(start, block.weights(self.forward.cfg))
            way.append((block, start, x if self.keeps else None))
        last = x.detach().requires_grad_()
        for now, want in self._pieces(last, wanted):
            (self._kl(now, want) / ids.numel()).backward()
        gradient = last.grad
        while way:
            block, start, end = way.pop()
            if end is None:
                end = self.forward.block(start, block.weights(self.forward.cfg))
            end.backward(gradient)
            gradient = start.grad

    def _pieces(self, x: torch.Tensor, wanted: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Both hidden states, a few tokens at a time."""
        return zip(x.flatten(0, 1).split(TOKENS), wanted.flatten(0, 1).split(TOKENS), strict=True)

    def _kl(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Sum over tokens of KL(float ‖ quantized); last hidden states [tokens, H]."""
        import torch

        with torch.no_grad():
            p = self.forward.logits(wanted, self._norm, self._head).log_softmax(-1)
        q = self.forward.logits(x, self._norm, self._head).log_softmax(-1)
        return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)


@contextmanager
def _fast_products() -> Iterator[None]:
    """Let processors that multiply bfloat16 faster do so: a gradient does not notice what that rounds."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def kept(cfg: ModelConfig) -> int:
    """Bytes of all blocks of one step with what their gradients need."""
    tokens, total = PLAN.batch * LENGTH, 0
    for i, layer in enumerate(cfg.layers):
        weights = sum(n * k for n, k in quantized(cfg, i).values())
        total += 8 * weights + 4 * tokens * (16 * cfg.hidden_size + 5 * layer.mlp.size)
    return total


def needed(cfg: ModelConfig, group: int, n_tokens: int) -> int:
    """Bytes that tuning takes at most: codes and what stands beside them with Adam's two moments and the
    gradient, one block of either model, the float model's last states, embedding and head, and distributions.
    """
    sizes = [[n * k for n, k in quantized(cfg, i).values()] for i in range(cfg.n_layers)]
    weights, block = sum(map(sum, sizes)), max(map(sum, sizes))
    held = weights + 24 * weights // (group or cfg.hidden_size)
    tables = 4 * cfg.vocab_size * (cfg.hidden_size * (1 if cfg.tie_embeddings else 2) + 8 * TOKENS)
    states = 4 * cfg.hidden_size * n_tokens + 4 * PLAN.batch * LENGTH * cfg.hidden_size * cfg.n_layers
    return held + 4 * 4 * block + tables + states


def _order(n: int, count: int) -> torch.Tensor:
    """`count` indices below n: whole rounds in random orders, always the same."""
    import torch

    g = torch.Generator().manual_seed(0)
    rounds = [torch.randperm(n, generator=g) for _ in range(-(-count // n))]
    return torch.cat(rounds)[:count]
