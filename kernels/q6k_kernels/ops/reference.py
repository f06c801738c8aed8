"""The operations on packed weights in plain torch: what runs on the CPU, and what kernels are tested against.

A weight is `w = scale * code - min`, scale and min those of its group (see `formats.types`), in fp32 in this order:
ggml's bits.

    "bf16"  y = sum_k x[k] * round(w[k]), the weights rounded to x's dtype
    "int8"  y = sum_g d_a * (scale[g] * sum_(k in g) code[k] * a[k] - min[g] * sum_(k in g) a[k]),
            with (a, d_a) = quantize_activations(x), d_a that of the 32 activations that g lies in

Sums run in fp32 at least. The bias is added to them, and the result is rounded once, to x's dtype. `accuracy` has
the same formulas in fp64, and the tolerance between the two. Memory is bounded by working on some rows at a time.
The code follows the formulas line by line, at the cost of speed. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from q6k_kernels.formats import words
from q6k_kernels.formats.checks import (
    FLOATS,
    Activations,
    check_activations,
    check_dtype,
    check_input,
    check_planes,
    found,
)
from q6k_kernels.formats.ggml import SUPER_BLOCK, super_blocks
from q6k_kernels.formats.tiles import group_scales
from q6k_kernels.formats.types import TILE_ROWS, WeightType

Parts = tuple[Tensor, Tensor, Tensor | None]
"""Parts of some weights: codes, float32 (rows, K), scale and min, float32 (rows, K/group); or no min."""
Rows = Callable[[slice], Parts]
"""A source of weights: a slice of rows -> their parts."""

ACTIVATION_GROUP = 32
"""Activations that share one d_a: one or two groups of weights."""
BLOCK_WEIGHTS = 1 << 20
"""Weights unpacked at a time; at most 24 bytes each, so about 25 MB."""
BLOCK_M = 32
"""Rows of x multiplied at a time; the sums of groups take BLOCK_M * BLOCK_WEIGHTS / 16 * 4 bytes = 8 MB."""


def dequantize(planes: Sequence[Tensor], row: WeightType, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn planes into weights.

    In fp32, scale * code is exact: scale and code have at most 24 significant bits together. Subtracting a min
    rounds once. So these are the bits of ggml's `dequantize_row_*`, but for Q6_K with bf16 scales.

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


def codes_and_scales(planes: Sequence[Tensor], row: WeightType) -> Parts:
    """Return the codes, scales and mins of planes (N, width)."""
    count = len(planes) - len(row.scales)
    codes = words.of_planes(planes[:count], row).view(torch.uint8)
    return words.code_values(codes, row), *group_scales(planes[count:], row)


def weights(codes: Tensor, scale: Tensor, least: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the weights (rows, K) of their parts in `dtype`: computed in fp32, then rounded."""
    w = codes.view(*scale.shape, codes.shape[1] // scale.shape[1]) * scale.unsqueeze(-1)
    if least is not None:
        w -= least.unsqueeze(-1)
    return w.view(codes.shape).to(dtype)


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
        activations: "int8" quantises them to 8 bits, "bf16" keeps them in x's dtype. "auto" is "bf16" here: it
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

    def rows(part: slice) -> Parts:
        return codes_and_scales([plane[part] for plane in planes], row)

    return multiply(x, rows, n, k, bias, activations)


def multiply(x: Tensor, rows: Rows, n: int, k: int, bias: Tensor | None, activations: Activations) -> Tensor:
    """Multiply as `linear` does, with weights from any source and checked arguments: (..., K) -> (..., N).

    Every source has its rows multiplied in the same slices, so that all give the same bits.
    """
    x_rows = x.detach().reshape(-1, k)
    y = torch.empty(len(x_rows), n, dtype=x.dtype, device=x.device)
    blocks = [x_rows[at : at + BLOCK_M] for at in range(0, len(x_rows), BLOCK_M)]
    if activations == "int8":
        quantised = [quantize_activations(block) for block in blocks]
    else:
        wide = [_by_super_block(block.to(_product_dtype(x.dtype))) for block in blocks]
    for part in row_blocks(n if blocks else 0, k):
        parts = rows(part)
        if activations != "int8":
            w = _by_super_block(weights(*parts, x.dtype).to(_product_dtype(x.dtype))).mT
        for index in range(len(blocks)):
            # Products of super-blocks, then their sum, keep chains of roundings short.
            sums = (
                _int8_sums(quantised[index], parts) if activations == "int8" else (wide[index] @ w).sum(0).float()
            )
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


def roundings(k: int, row: WeightType, activations: Literal["int8", "bf16"]) -> int:
    """Return the most fp32 roundings that any term of `linear`'s sums goes through, for `accuracy.tolerance`.

    "bf16": one product, the 255 additions of a super-block in any order, an addition for each super-block, and one
    for the bias. "int8": the product with the scale or the min, their difference if there are mins, the product
    with d_a, the additions of the groups in a super-block, and then as above. Sums that `linear` makes in fp64
    round less.
    """
    within = 1 + 255 if activations == "bf16" else 2 + row.minimum + SUPER_BLOCK // row.group - 1
    return within + super_blocks(k) + 1


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which "bf16" multiplies activations of `dtype`.

    torch.set_float32_matmul_precision may cut fp32 operands to bf16's 8 bits. That leaves bf16 values whole (and
    the integers of "int8"), but no others, which are multiplied in fp64.
    """
    return torch.float32 if dtype == torch.bfloat16 else torch.float64


def _by_super_block(values: Tensor) -> Tensor:
    """Return values (rows, K) as (ceil(K/256), rows, 256), padded with zeros, which change no sum."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % SUPER_BLOCK))
    return padded.view(len(values), -1, SUPER_BLOCK).transpose(0, 1)


def _int8_sums(activations: tuple[Tensor, Tensor], parts: Parts) -> Tensor:
    """Return y, float32 (M, N), of activations in 8 bits, int8 (M, K) and float32 (M, K/32), and parts of weights.

    The inner sums are integers of at most 32 * 128 * 127 < 2**19, as are their parts: fp32 holds them exactly in
    any order of addition. Their operands, of 8 bits, fit in bf16, so no setting of matmul precision changes them.
    """
    (a, d_a), (codes, scale, least) = activations, parts
    groups = scale.shape[1]
    group = codes.shape[1] // groups
    left = a.float().view(len(a), groups, group).transpose(0, 1)
    terms = left @ codes.view(len(codes), groups, group).permute(1, 2, 0)  # (groups, M, N)
    terms *= scale.T.unsqueeze(1)
    if least is not None:
        terms -= left.sum(-1, keepdim=True) * least.T.unsqueeze(1)
    terms *= d_a.T.repeat_interleave(ACTIVATION_GROUP // group, 0).unsqueeze(-1)
    missing = -groups % (SUPER_BLOCK // group)
    terms = torch.nn.functional.pad(terms, (0, 0, 0, 0, 0, missing)) if missing else terms
    return terms.view(-1, SUPER_BLOCK // group, *terms.shape[1:]).sum(1).sum(0)
