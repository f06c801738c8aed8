"""The operations on CUDA GPUs: which kernel computes what. `ops` has checked the arguments.

| rows of x (M) | activations | kernel |
|---|---|---|
| 1 to `DECODE_M` | int8 | `decode`: quantises in the same launch or in a separate one |
| more | bf16 | Hopper: `gemm_wgmma`. Other GPUs: `gemm_mma`, and from `PREFILL_M` on `expand` |

"auto" picks by this table; "int8" and "bf16" can be forced at any M. Nothing here waits for the GPU, and all of it
can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from q6k_kernels.cuda import decode, decode_plan, expand, gemm_mma, gemm_wgmma
from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda import rows as row_kernels
from q6k_kernels.formats.types import WeightType

DECODE_M = 8
"""Most rows of x for which "auto" quantises activations, if one row fits: a single launch serves them, and it is
faster (4.0 against 8.3 us at M = 1, 5.6 against 8.3 at M = 8 on the smallest layer measured)."""
PREFILL_M = 256
"""Rows of x from which expanding weights for cuBLAS should pay on GPUs other than Hopper. Not measured there."""
INT8_ROUNDINGS = 64
"""Most roundings to fp32 that a term of a product of int8 activations meets, beside one for each term: see
`ops.accuracy`, where a term is a group's sum, or a group's min times its sum of activations.

A term meets fewer additions than there are terms, and then

- 8: the product with the scale, those with both steps, the addition of the bias, with some to spare.
- 56, for a min (`decode_tile.cuh`): tensor cores multiply the 8 mins of a super-block with 3 parts of each sum, 24
  products in 2 instructions, and add them from zero. An instruction cuts off what lies below the last bit of its
  largest addend, at most 2 roundings of it, from each product, from what it adds to, and from the result. No addend
  is larger than the super-block's terms together: 2 * (24 + 2 + 2). That is once for each super-block, of which a
  term is in one. fp16 mins have a second, lower half with 2 more instructions, 2**-8 as large: below one rounding.
"""


def linear(
    x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, row: WeightType, activations: str = "auto"
) -> Tensor:
    """Return the product of x and the transposed weights, plus the bias.

    Args:
        x: bfloat16 or float16 (..., K), any strides.
        tiles: uint8 (T, ceil(K/256), tile_bytes), on the same GPU.
        bias: bfloat16, float16 or float32 (n,), or None.
        n: rows of the weight.
        row: the weight type.
        activations: "auto", "int8" or "bf16".

    Returns:
        (..., n) of x's dtype.

    Raises:
        CudaError: this GPU cannot run kernels, or something they need is missing (see `errors`).
        ValueError: tiles not aligned to 16 bytes, or "int8" with rows of activations too long for shared memory.
    """
    launching.check_aligned(tiles)
    device = launching.device(x.device.index)
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    rows, outputs = aligned_rows(x), y.view(-1, n)
    m = len(rows)
    if m == 0:
        return y
    if bias is not None:
        bias = bias.detach().contiguous()
    if activations == "auto" and m <= DECODE_M and decode_plan.fits(n, x.shape[-1], row, device):
        activations = "int8"
    if activations == "int8":
        decode.linear(rows, tiles, bias, n, row, outputs, device)
    elif device.arch == gemm_wgmma.ARCH:
        gemm_wgmma.linear(rows, tiles, bias, n, row, outputs, device)
    elif m < PREFILL_M:
        gemm_mma.linear(rows, tiles, bias, n, row, outputs)
    else:
        expand.linear(rows, tiles, bias, n, row, outputs)
    return y


def prepared(
    m: int,
    k: int,
    fp16: bool,
    tiles: Tensor,
    bias: Tensor | None,
    n: int,
    row: WeightType,
    activations: str,
    at: int,
) -> gemm_wgmma.Product | None:
    """Return `linear` with one weight and shape as a prepared launch, where `gemm_wgmma` serves it; else None.

    Args:
        m: rows of x.
        k: columns of x.
        fp16: whether x is float16, not bfloat16.
        tiles: see `linear`, as are the next ones.
        bias: (n,) or None.
        n: rows of the weight.
        row: the weight type.
        activations: "auto", "int8" or "bf16".
        at: ordinal of the GPU.
    """
    device = launching.device(at)
    coded = activations == "auto" and m <= DECODE_M and decode_plan.fits(n, k, row, device)
    if device.arch != gemm_wgmma.ARCH or coded or activations == "int8":
        return None
    launching.check_aligned(tiles)
    return gemm_wgmma.Product(m, k, fp16, tiles, None if bias is None else bias.contiguous(), n, row, device)


def rounds_scales(x: Tensor) -> bool:
    """Check whether products of 16-bit activations x (M, K) round a weight's scales and mins to x's dtype first.

    That is so for bf16 (`cuda/halves.cuh`), where weights are not expanded for cuBLAS.
    """
    if not x.is_cuda or x.dtype is not torch.bfloat16:
        return False
    rows = x.numel() // x.shape[-1]
    return rows < PREFILL_M or launching.device(x.device.index).arch == gemm_wgmma.ARCH


def aligned_rows(x: Tensor) -> Tensor:
    """Return the activations as (M, K), rows contiguous and 16-byte aligned: a view if possible, else a copy."""
    rows = x.detach().reshape(-1, x.shape[-1])
    apart = rows.stride(0)
    if rows.stride(1) == 1 and apart % 8 == 0 and apart >= rows.shape[1] and not rows.data_ptr() % 16:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


embedding = row_kernels.embedding
dequantize = row_kernels.dequantize
pack = row_kernels.pack
