"""Products with experts on CUDA GPUs: which kernel computes what. `ops` has checked the arguments.

| tokens (M) | activations | kernel |
|---|---|---|
| 1 to `EXPERTS_DECODE_M` | int8 | `experts_decode`: up to 256 pairs of a token and an expert a launch |
| more | bf16 | `experts_gemm`: pairs are sorted by expert first |

"auto" picks by this table; "int8" and "bf16" can be forced at any M. Nothing here waits for the GPU, and all of it
can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda import experts_decode, experts_gemm
from q6k_kernels.cuda.dispatch import aligned_rows
from q6k_kernels.formats.types import WeightType

EXPERTS_DECODE_M = 16
"""Most tokens for which "auto" quantises activations: there it is faster (at 16 tokens of 8 experts each 17 against
36 to 59 against 81 us), and from 64 on slower."""


def experts(
    x: Tensor, tiles: Tensor, chosen: Tensor, bias: Tensor | None, n: int, row: WeightType, activations: str
) -> Tensor:
    """Return the products of rows with the weights of their experts, plus the bias.

    An expert outside 0..E-1 stops the kernel, as an index does in `torch.nn.functional.embedding` on a GPU: the
    next call that waits for the GPU raises, and the process can no longer use it.

    Args:
        x: bfloat16 or float16 (M, K) or (M, top, K), any strides.
        tiles: uint8 (E, T, ceil(K/256), tile_bytes), on the same GPU.
        chosen: int32 or int64 (M, top).
        bias: bfloat16, float16 or float32 (E, n), or None.
        n: rows of each expert's weight.
        row: the weight type.
        activations: "auto", "int8" or "bf16".

    Returns:
        (M, top, n) of x's dtype.

    Raises:
        CudaError: this GPU cannot run kernels, or something they need is missing (see `errors`).
        ValueError: tiles not aligned to 16 bytes, "int8" with rows of activations too long for shared memory, or
            "bf16" with more than 512 experts.
    """
    launching.check_aligned(tiles)
    y = torch.empty((*chosen.shape, n), dtype=x.dtype, device=x.device)
    if chosen.numel() == 0:
        return y
    if bias is not None:
        bias = bias.detach().contiguous()
    device = launching.device(x.device.index)
    if (
        activations == "auto"
        and len(chosen) <= EXPERTS_DECODE_M
        and experts_decode.fits(n, x.shape[-1], row, device)
    ):
        activations = "int8"
    multiply = experts_decode.multiply if activations == "int8" else experts_gemm.multiply
    multiply(aligned_rows(x), tiles, chosen.contiguous(), bias, n, row, y, device)
    return y
