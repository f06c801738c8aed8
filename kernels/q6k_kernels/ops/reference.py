"""The operations on packed weights in plain torch: what runs on the CPU, and what kernels are tested against.

A weight is `w = q * s`, s the scale of its group of 16 (see `formats.planes`); with steps `s = steps * scale`.

    W6A16 ("bf16")  y = sum_k x[k] * round(w[k]), the weights rounded to x's dtype
    W6A8  ("int8")  y = sum_g s[g] * d_a[g//2] * sum_(k in g) q[k] * a[k], with (a, d_a) = quantize_activations(x)

Sums run in fp32 at least. The bias is added to them, and the result is rounded once, to x's dtype. `accuracy` has
the same formulas in fp64, and the tolerance between the two. Memory is bounded by working on some rows at a time.
The code follows the formulas line by line, at the cost of speed. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from q6k_kernels.formats.checks import (
    FLOATS,
    Activations,
    check_activations,
    check_dtype,
    check_input,
    check_planes,
    found,
)
from q6k_kernels.formats.ggml import SUPER_BLOCK

GROUP = 16
from q6k_kernels.formats.tiles import group_scales
from q6k_kernels.formats.types import TILE_ROWS, WeightType

Rows = Callable[[slice], tuple[Tensor, Tensor]]
"""A source of weights: a slice of rows -> q, float32 (rows, K), and the scales s, float32 (rows, K/16)."""

ACTIVATION_GROUP = 32
"""Activations that share one d_a: two groups of weights."""
BLOCK_WEIGHTS = 1 << 20
"""Weights unpacked at a time; at most 24 bytes each, so about 25 MB."""
BLOCK_M = 32
"""Rows of x multiplied at a time; the sums of groups take BLOCK_M * BLOCK_WEIGHTS / 16 * 4 bytes = 8 MB."""


def dequantize(planes: Sequence[Tensor], row: WeightType, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn planes into weights.

    In fp32 nothing is rounded: with bf16 scales a weight has 8 + 5 significant bits, with stepped ones
    11 + 7 + 5 = 23 (of d, sub-scale and code); the latter are the bits of ggml's `dequantize_row_q6_K`.

    Args:
        planes: one tensor for each of `row.arrays`, (N, width).
        row: the weight type.
        dtype: bfloat16, float16 or float32; weights are rounded once. float16 overflows to infinity past 65504.

    Returns:
        (N, K) of `dtype`, on the planes' device.

    Raises:
        ValueError: a dtype is wrong, or the shapes do not agree.
    """
    check_planes(planes, row)
    check_dtype(dtype)
    return weights(*codes_and_scales(planes, row), dtype)


def codes_and_scales(planes: Sequence[Tensor], row: WeightType) -> tuple[Tensor, Tensor]:
    """Return q, float32 (N, K), the codes minus their offset, and s, float32 (N, K/group), of planes (N, width)."""
    ql, qh, *scales = planes
    return _codes(ql, qh) - row.offset, group_scales(scales, row)


def weights(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply q, float32 (rows, K), by its groups' scales s, float32 (rows, K/16); round to `dtype` once."""
    return (q.view(len(q), -1, GROUP) * s.unsqueeze(-1)).view(q.shape).to(dtype)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise activations to 8 bits, each row in groups of 32: d_a = amax / 127, a = rint(x / d_a).

    Both divisions are fp32's, correctly rounded, and rint goes to even: (a, d_a) is defined to the bit.
    A group whose d_a is zero (all zeros, or fp32 below 2**-143 or so) has a = 0. |a| is clamped to 127, which
    only matters for fp32 values near 2**-140, where d_a is too coarse a subnormal. A group that holds an
    infinity or NaN has d_a = NaN and a = 0, so that all outputs of its row are NaN.

    Args:
        x: bfloat16, float16 or float32 (M, K), K a multiple of 32.

    Returns:
        a int8 (M, K), values -127..127, and d_a float32 (M, K/32).

    Raises:
        ValueError: the dtype or shape is wrong.
    """
    if x.ndim != 2 or x.dtype not in FLOATS or x.shape[1] % ACTIVATION_GROUP:
        raise ValueError(
            f"x: expected bfloat16, float16 or float32 (M, K) with K a multiple of {ACTIVATION_GROUP}, "
            f"found {found(x)}"
        )
    groups = x.detach().float().reshape(x.shape[0], x.shape[1] // ACTIVATION_GROUP, ACTIVATION_GROUP)
    amax = groups.abs().amax(-1)
    # By a tensor, because on GPUs torch turns division by a number into multiplication with its reciprocal.
    d_a = amax / torch.full_like(amax, 127)
    d_a = torch.where(amax.isfinite(), d_a, torch.nan)
    quotients = groups / d_a.unsqueeze(-1)
    a = torch.where((d_a > 0).unsqueeze(-1), quotients, 0.0).round().clamp(-127, 127)
    return a.to(torch.int8).view(x.shape), d_a


def linear(
    x: Tensor,
    planes: Sequence[Tensor],
    row: WeightType,
    bias: Tensor | None = None,
    *,
    activations: Activations = "auto",
) -> Tensor:
    """Multiply x with the transposed weights and add the bias: the formulas at the top of this module.

    Args:
        x: bfloat16, float16 or float32 (..., K), any strides, zero rows allowed. With "bf16", float32
            activations meet float32 weights: nothing but the output is rounded to 16 bits or less.
        planes: one tensor for each of `row.arrays`, (N, width), N >= 1.
        row: the weight type.
        bias: bfloat16, float16 or float32 (N,), added in fp32 before the rounding.
        activations: "int8" for W6A8, "bf16" for W6A16 (in x's dtype). "auto" is "bf16" here: it
            rounds no activation, and on a CPU "int8" saves little time with few rows (as measured, a tenth of
            it for one row of bfloat16) and takes twice as long from about 64 on. Kernels may choose otherwise.

    Returns:
        (..., N) of x's dtype. Infinities and NaN follow IEEE arithmetic with "bf16"; with "int8" they turn
        their row into NaN.

    Raises:
        ValueError: a dtype, a shape or an option is wrong, or the tensors are on different devices.
    """
    n, k = check_planes(planes, row)
    check_input(x, n, k, bias)
    devices = {str(t.device) for t in (x, *planes, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors on one device, found them on {', '.join(sorted(devices))}")
    check_activations(activations)

    def rows(part: slice) -> tuple[Tensor, Tensor]:
        return codes_and_scales([plane[part] for plane in planes], row)

    return multiply(x, rows, n, k, bias, activations)


def multiply(x: Tensor, rows: Rows, n: int, k: int, bias: Tensor | None, activations: Activations) -> Tensor:
    """Multiply as `linear` does, with weights from any source and checked arguments: (..., K) -> (..., N).

    Every source has its rows multiplied in the same slices, so that all give the same bits.
    """
    x_rows = x.detach().reshape(-1, k)
    y = torch.empty(len(x_rows), n, dtype=x.dtype, device=x.device)
    blocks = [x_rows[at : at + BLOCK_M] for at in range(0, len(x_rows), BLOCK_M)]
    inputs = [_int8_operands(block) if activations == "int8" else _bf16_operands(block) for block in blocks]
    for part in row_blocks(n if inputs else 0, k):
        q, s = rows(part)
        w = q if activations == "int8" else weights(q, s, x.dtype).to(_product_dtype(x.dtype))
        for index, (left, d_a) in enumerate(inputs):
            sums = _bf16_sums(left, w) if d_a is None else _int8_sums(left, d_a, w, s)
            if bias is not None:
                sums += bias[part].detach().float()
            y[index * BLOCK_M : (index + 1) * BLOCK_M, part] = sums
    return y.view(*x.shape[:-1], n)


def row_blocks(n: int, k: int) -> Iterator[slice]:
    """Yield slices of N rows of K weights, at most `BLOCK_WEIGHTS` each, in whole tiles of 16 rows if one fits."""
    step = max(1, BLOCK_WEIGHTS // k)
    step = step // TILE_ROWS * TILE_ROWS or step
    for at in range(0, n, step):
        yield slice(at, min(at + step, n))


def roundings(k: int, activations: Literal["int8", "bf16"]) -> int:
    """Return the most fp32 roundings that any term of `linear`'s sums goes through, for `accuracy.tolerance`.

    "bf16": one product, the 255 additions of a super-block in any order, an addition for each of K/256
    super-blocks, and one for the bias. "int8": two products, 15 additions of the groups in a super-block, and
    again K/256 + 1. Sums that `linear` makes in fp64 round less.
    """
    return (1 + 255 if activations == "bf16" else 2 + 15) + k // SUPER_BLOCK + 1


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which "bf16" multiplies activations of `dtype`.

    torch.set_float32_matmul_precision may cut fp32 operands to bf16's 8 bits. That leaves bf16 values whole (and
    the integers of "int8"), but no others, which are multiplied in fp64.
    """
    return torch.float32 if dtype == torch.bfloat16 else torch.float64


def _bf16_operands(x: Tensor) -> tuple[Tensor, None]:
    """Return x as (K/256, M, 256) for `_bf16_sums`, and None."""
    return x.to(_product_dtype(x.dtype)).view(len(x), -1, SUPER_BLOCK).transpose(0, 1), None


def _bf16_sums(x: Tensor, w: Tensor) -> Tensor:
    """Return y, float32 (M, N): products by super-block, then their sum, which keeps chains of roundings short."""
    return (x @ w.view(len(w), -1, SUPER_BLOCK).permute(1, 2, 0)).sum(0).float()


def _int8_operands(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a (K/16, M, 16) and d_a (K/16, M, 1) for `_int8_sums`."""
    a, d_a = quantize_activations(x)
    groups = a.float().view(len(x), -1, GROUP).transpose(0, 1)
    return groups, d_a.T.repeat_interleave(ACTIVATION_GROUP // GROUP, 0).unsqueeze(-1)


def _int8_sums(a: Tensor, d_a: Tensor, q: Tensor, s: Tensor) -> Tensor:
    """Return y, float32 (M, N), of activations in 8 bits.

    The inner sums are integers below 16 * 32 * 127 < 2**16, as are their parts: fp32 holds them exactly in
    any order of addition, and its operands fit in bf16, so no setting of matmul precision changes them.
    """
    terms = a @ q.view(len(q), -1, GROUP).permute(1, 2, 0)  # (K/16, M, N)
    terms *= s.T.unsqueeze(1)
    terms *= d_a
    return terms.view(-1, SUPER_BLOCK // GROUP, *terms.shape[1:]).sum(1).sum(0)


def _codes(ql: Tensor, qh: Tensor) -> Tensor:
    """Return the codes, float32 (N, K), of their planes."""
    rows = len(ql)
    low = torch.stack((ql & 15, ql >> 4), dim=-1).view(rows, -1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=qh.device)
    # (row, chunk, parity, w, position in the byte), weight 8w + 2 * position + parity of the chunk
    pairs = qh.reshape(rows, -1, 2, 4, 1) >> shifts & 3
    high = pairs.permute(0, 1, 3, 4, 2).reshape(rows, -1)
    return (low | high << 4).float()
