"""Random blocks of every quantized type of GGUF: any bytes, with scales that are finite."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES

# Types that are read exactly → where halves lie in a block: random bytes there would be infinities
HALVES: dict[Kind, tuple[int, ...]] = {
    Kind.Q4_0: (0,),
    Kind.Q4_1: (0, 2),
    Kind.Q5_0: (0,),
    Kind.Q5_1: (0, 2),
    Kind.Q8_0: (0,),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_NL: (0,),
    Kind.IQ4_XS: (0,),
    Kind.MXFP4: (),
    Kind.NVFP4: (),
    Kind.TQ1_0: (52,),
    Kind.TQ2_0: (64,),
}


def random_blocks(kind: Kind, n: int, k: int, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """uint8 [n, k / weights of a block, bytes of a block]; scales are normal, of about that size."""
    size, n_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (n, k // size, n_bytes), dtype=np.uint8)
    for at in HALVES[kind]:
        values = rng.normal(0, scale, (n, k // size, 1)).astype(np.float16)
        blocks[..., at : at + 2] = values.view(np.uint8)
    if kind == Kind.MXFP4:
        power = 127 + round(np.log2(scale))
        blocks[..., 0] = rng.integers(power - 3, power + 1, blocks.shape[:2])
    if kind == Kind.NVFP4:  # unsigned, eight codes to a power of two; 127 is no number
        highest = 127 if scale == 1 else max(8, 56 + 8 * round(np.log2(scale)))
        blocks[..., :4] = rng.integers(0 if scale == 1 else highest - 8, highest, (*blocks.shape[:2], 4))
    return blocks
