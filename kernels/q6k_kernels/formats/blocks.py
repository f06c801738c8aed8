"""The blocks of GGUF files, decoded in numpy: the definition, for checks, tools and small data.

A block of Q6_K, ggml's 6-bit type, has 256 weights in 210 bytes: ql:128 qh:64 scales:16 d:2. It is two halves of
128 weights; weight 32j+l of a half (j = 0..3, l = 0..31) has its low nibble in `ql[32*(j%2) + l]` of
that half (low nibble for j < 2, high for the rest) and its high pair in bits 2j of `qh[l]`. A weight is
`d * scales[e // 16] * q` with d fp16, scales int8 and q the 6-bit code minus 32.
Source: block_q6_K and dequantize_row_q6_K in ggml.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from q6k_kernels.formats.ggml import GROUP, SUPER_BLOCK, TYPE_SIZES, GGMLType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BLOCK_BYTES = TYPE_SIZES[GGMLType.Q6_K][1]
SCALES_AT, D_AT = 192, 208
"""Byte offsets in a block of the sub-scales and of d."""


def decode(blocks: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Decode Q6_K blocks to integer weights and their scales, exactly.

    Args:
        blocks: uint8 (..., bytes), the last dimension a whole number of 210-byte blocks.

    Returns:
        q, int8 (..., K) with values -32..31, and scale, float32 (..., K/16), each d * sub-scale
        computed without rounding, so that `q * repeat(scale, 16)` in fp32 is ggml's dequantisation.

    Raises:
        ValueError: the dtype is wrong, or the last block is incomplete.
    """
    import numpy as np  # imported here: a conversion starts sooner without it

    if blocks.dtype != np.uint8 or blocks.ndim == 0 or blocks.shape[-1] % BLOCK_BYTES:
        raise ValueError(
            f"expected uint8 (..., n * {BLOCK_BYTES}), found {blocks.dtype} {blocks.shape}: "
            "the last dimension holds whole Q6_K blocks"
        )
    lead = blocks.shape[:-1]
    weights = blocks.shape[-1] // BLOCK_BYTES * SUPER_BLOCK
    flat = np.ascontiguousarray(blocks).reshape(-1, BLOCK_BYTES)
    nibble_shifts, pair_shifts = np.array([0, 4], dtype=np.uint8), np.array([0, 2, 4, 6], dtype=np.uint8)
    # (block, half, nibble, 64) flattens to weight order: low nibbles of ql[0..63], then high ones.
    low = flat[:, None, :128].reshape(-1, 2, 1, 64) >> nibble_shifts[:, None] & 15
    high = flat[:, None, 128:192].reshape(-1, 2, 1, 32) >> pair_shifts[:, None] & 3
    u = low.reshape(-1, SUPER_BLOCK) | high.reshape(-1, SUPER_BLOCK) << 4
    q = u.view(np.int8) - np.int8(32)
    d = np.ascontiguousarray(flat[:, D_AT:]).view("<f2").astype(np.float32)
    with np.errstate(invalid="ignore"):  # an infinite d times a zero sub-scale
        scale = d * flat[:, SCALES_AT:D_AT].view(np.int8).astype(np.float32)
    return q.reshape(*lead, weights), scale.reshape(*lead, weights // GROUP)
