"""From block to block: what each method carries through the network while it is quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from tinychat.base.errors import CheckpointError
from tinychat.quantize.block import BlockQuantizer, Options, QuantizedBlock, round_to_nearest
from tinychat.quantize.forward import Forward, read_block
from tinychat.quantize.gptq import GPTQQuantizer
from tinychat.quantize.layouts import Tensors, unpacked

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
    """Round to nearest: nothing is carried."""

    def __init__(self, checkpoint: Checkpoint, group: int):
        self.checkpoint, self.group = checkpoint, group

    def quantize(self, layer: int) -> QuantizedBlock:
        return round_to_nearest(read_block(self.checkpoint, layer), self.group, self.checkpoint.config)

    def skip(self, layer: int, stored: Tensors) -> None:
        pass


class AWQWalk:
    """The calibration text's activations, in the float and in the quantized network."""

    def __init__(self, checkpoint: Checkpoint, group: int, tokens: np.ndarray):
        self.checkpoint = checkpoint
        forward = Forward(checkpoint.config)
        self.quantizer = BlockQuantizer(forward, Options(group=group))
        self.x_q = _embedded(checkpoint, forward, tokens)
        self.x_f = self.x_q.clone()

    def quantize(self, layer: int) -> QuantizedBlock:
        out, self.x_f, self.x_q = self.quantizer(read_block(self.checkpoint, layer), self.x_f, self.x_q)
        _check(self.x_q, layer)
        return out

    def skip(self, layer: int, stored: Tensors) -> None:
        w = read_block(self.checkpoint, layer)
        quantized = unpacked(stored, self.checkpoint.config, layer, "awq")
        self.x_f, self.x_q = self.quantizer.advance(w, quantized, self.x_f, self.x_q)


class GPTQWalk:
    """The calibration text's activations in the quantized network."""

    def __init__(self, checkpoint: Checkpoint, group: int, tokens: np.ndarray, act_order: bool):
        self.checkpoint = checkpoint
        forward = Forward(checkpoint.config)
        self.quantizer = GPTQQuantizer(forward, group, act_order)
        self.x = _embedded(checkpoint, forward, tokens)

    def quantize(self, layer: int) -> QuantizedBlock:
        out, self.x = self.quantizer(read_block(self.checkpoint, layer), self.x)
        _check(self.x, layer)
        return out

    def skip(self, layer: int, stored: Tensors) -> None:
        self.x = self.quantizer.advance(unpacked(stored, self.checkpoint.config, layer, "gptq"), self.x)


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
