"""Many rows of 16-bit activations on GPUs that `gemm_wgmma` does not serve: weights are expanded.

A slice of rows is expanded into scratch memory, small enough to stay near the L2 cache, and cuBLAS multiplies with
it; then comes the next slice. Products are summed and returned in fp32, then rounded once with the bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from q6k_kernels.cuda import rows as row_kernels
from q6k_kernels.formats.types import TILE_ROWS, WeightType

SCRATCH_BYTES = 48 << 20
"""Bytes of a slice's weights and their products together."""


def slice_rows(m: int, k: int) -> int:
    """Return the rows of weights in a slice: a multiple of 16, at least 16."""
    return max(TILE_ROWS, SCRATCH_BYTES // (2 * k + 4 * m) // TILE_ROWS * TILE_ROWS)


def linear(x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, row: WeightType, y: Tensor) -> None:
    """Compute the product y = x Wᵀ (+ bias); `cuda.dispatch.linear` has checked the arguments.

    Args:
        x: bf16 or fp16 (M, K), M >= 1.
        tiles: uint8 (T, ceil(K/256), tile_bytes).
        bias: (n,) or None.
        n: rows of the weight.
        row: the weight type.
        y: x's dtype (M, n), contiguous.
    """
    m, k = x.shape
    step = min(slice_rows(m, k), n)
    weights = torch.empty(step, k, dtype=x.dtype, device=x.device)
    for first in range(0, n, step):
        rows = min(step, n - first)
        part = weights[:rows]
        row_kernels.dequantize_rows(tiles, first, rows, n, row, part)
        sums = torch.mm(x, part.T, out_dtype=torch.float32)
        if bias is not None:
            sums += bias[first : first + rows]
        y[:, first : first + rows] = sums
        del sums  # before the next slice's: both would not fit in the scratch
