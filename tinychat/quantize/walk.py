"""From block to block: what each method carries through the network while it is quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from tinychat.base.errors import CheckpointError
from tinychat.quantize.block import BlockQuantizer, Options, QuantizedBlock, round_to_nearest
from tinychat.quantize.forward import Forward, read_block
from tinychat.quantize.gptq import GPTQQuantizer
from tinychat.quantize.layouts import Tensors, unpacked
from tinychat.quantize.smooth import SmoothQuantizer
from tinychat.quantize.target import Target

if TYPE_CHECKING:
    import torch

    from tinychat.network.checkpoint import Checkpoint


class Walk(Protocol):
    """One block after the other, each either quantized or passed."""

    def quantize(self, layer: int) -> QuantizedBlock:
        """The next block, quantized. Raises CheckpointError for weights that are no numbers."""
        ...

    def skip(self, layer: int, stored: Tensors) -> None:
        """Past a block that an earlier run has written."""
        ...


class NearestWalk:
    """Round to nearest on whole ranges: nothing is carried."""

    def __init__(self, checkpoint: Checkpoint, target: Target):
        self.checkpoint, self.target = checkpoint, target

    def quantize(self, layer: int) -> QuantizedBlock:
        w = read_block(self.checkpoint, layer)
        return round_to_nearest(w, self.target.grid, self.checkpoint.config)

    def skip(self, layer: int, stored: Tensors) -> None:
        pass


class WeighedWalk:
    """Round to nearest on ranges that the float network's activations choose."""

    def __init__(self, checkpoint: Checkpoint, target: Target, tokens: np.ndarray):
        self.checkpoint, self.target = checkpoint, target
        self.forward = Forward(checkpoint.config)
        self.x = _embedded(checkpoint, self.forward, tokens)

    def quantize(self, layer: int) -> QuantizedBlock:
        w = read_block(self.checkpoint, layer)
        squares = self.forward.mean_squares(self.x, w)
        _check(self.x, layer)
        return round_to_nearest(w, self.target.grid, self.checkpoint.config, squares)

    def skip(self, layer: int, stored: Tensors) -> None:
        self.forward.mean_squares(self.x, read_block(self.checkpoint, layer))


class AWQWalk:
    """The calibration text's activations, in the float and in the quantized network."""

    def __init__(self, checkpoint: Checkpoint, target: Target, tokens: np.ndarray, search: bool):
        self.checkpoint, self.target = checkpoint, target
        forward = Forward(checkpoint.config)
        self.quantizer = BlockQuantizer(forward, Options(target.grid, search=search))
        self.x_q = _embedded(checkpoint, forward, tokens)
        self.x_f = self.x_q.clone()

    def quantize(self, layer: int) -> QuantizedBlock:
        out, self.x_f, self.x_q = self.quantizer(read_block(self.checkpoint, layer), self.x_f, self.x_q)
        _check(self.x_q, layer)
        return out

    def skip(self, layer: int, stored: Tensors) -> None:
        w = read_block(self.checkpoint, layer)
        quantized = unpacked(stored, self.checkpoint.config, layer, self.target)
        self.x_f, self.x_q = self.quantizer.advance(w, quantized, self.x_f, self.x_q)


class GPTQWalk:
    """The calibration text's activations in the quantized network."""

    def __init__(self, checkpoint: Checkpoint, target: Target, tokens: np.ndarray, search: bool):
        self.checkpoint, self.target = checkpoint, target
        forward = Forward(checkpoint.config)
        self.quantizer = GPTQQuantizer(forward, target.grid, target.act_order, search)
        self.x = _embedded(checkpoint, forward, tokens)

    def quantize(self, layer: int) -> QuantizedBlock:
        out, self.x = self.quantizer(read_block(self.checkpoint, layer), self.x)
        _check(self.x, layer)
        return out

    def skip(self, layer: int, stored: Tensors) -> None:
        self.x = self.quantizer.advance(unpacked(stored, self.checkpoint.config, layer, self.target), self.x)


class SmoothWalk:
    """The calibration text's activations in the float network, whose loud channels are moved."""

    def __init__(self, checkpoint: Checkpoint, target: Target, tokens: np.ndarray):
        self.checkpoint, self.target = checkpoint, target
        self.forward = Forward(checkpoint.config)
        self.quantizer = SmoothQuantizer(self.forward, target.grid)
        self.x = _embedded(checkpoint, self.forward, tokens)

    def quantize(self, layer: int) -> QuantizedBlock:
        out, self.x = self.quantizer(read_block(self.checkpoint, layer), self.x)
        _check(self.x, layer)
        return out

    def skip(self, layer: int, stored: Tensors) -> None:
        w = read_block(self.checkpoint, layer)
        for b in range(0, len(self.x), self.quantizer.batch):
            part = slice(b, b + self.quantizer.batch)
            self.x[part] = self.forward.block(self.x[part], w)


def _embedded(checkpoint: Checkpoint, forward: Forward, tokens: np.ndarray) -> torch.Tensor:
    import torch

    table = torch.from_numpy(checkpoint.linear("model.embed_tokens").dequantize())
    return forward.embed(table, torch.from_numpy(tokens))


def _check(x: torch.Tensor, layer: int) -> None:
    if not bool(x.isfinite().all()):
        raise CheckpointError(
            f"Block {layer} gives NaN or infinity on the calibration text.",
            "The checkpoint is damaged; pull it again.",
        )
