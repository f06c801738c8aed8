"""How right is an output? The formulas in fp64, the tolerance that follows from them, and the comparison.

    W6A16 ("bf16")  y = sum_k x[k] * round(w[k]), the weights rounded to x's dtype
    W6A8  ("int8")  y = sum_g s[g] * d_a[g//2] * sum_(k in g) q[k] * a[k], a and d_a the quantised activations

This is the measure of every implementation, so it shares with them nothing but the text.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from q6k_kernels.formats import planes
from q6k_kernels.formats.ggml import GROUP, SUPER_BLOCK

F64 = npt.NDArray[np.float64]


def linear_fp64(
    x: Tensor,
    ql: Tensor,
    qh: Tensor,
    scale: Tensor,
    steps: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activations: Literal["int8", "bf16"],
) -> tuple[F64, F64]:
    """What `reference.linear` says, in fp64 and all at once: the measure of every implementation.

    Takes what `reference.linear` takes; `planar.unpack`, in numpy, unpacks the planes.

    Returns:
        y, float64 (..., N), and the sum of its terms' absolute values, float64 (..., N), for `tolerance`. A
        term is x * w or, with int8, s * d_a * (the integer sum of a group).

    Raises:
        ValueError: the planes do not agree on their shape.
    """
    q = planes.unpack(ql.cpu().numpy(), qh.cpu().numpy()).astype(np.float64)
    (n, k), m = q.shape, math.prod(x.shape[:-1])
    s: F64 = scale.cpu().double().numpy()
    if steps is not None:
        s = s * np.repeat(steps.cpu().double().numpy(), SUPER_BLOCK // GROUP, axis=1)
    x32: npt.NDArray[np.float32] = x.detach().cpu().float().numpy().reshape(m, k)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if activations == "bf16":
            w = q * np.repeat(s, GROUP, axis=1)
            if x.dtype == torch.bfloat16:
                w = planes.bf16_to_float(planes.round_to_bf16(w.astype(np.float32))).astype(np.float64)
            elif x.dtype == torch.float16:
                w = w.astype(np.float16).astype(np.float64)
            y = x32.astype(np.float64) @ w.T
            magnitude = np.abs(x32).astype(np.float64) @ np.abs(w, out=w).T
        else:
            x_groups = x32.reshape(m, k // 32, 32)
            d_a = np.abs(x_groups).max(axis=2) / np.float32(127)
            d_a[~np.isfinite(x_groups).all(axis=2)] = np.nan
            a = np.rint(np.clip(x_groups / d_a[..., None], -127, 127))
            a[~(d_a > 0)] = 0
            inner = a.astype(np.float64).reshape(m, k // 16, 16).swapaxes(0, 1) @ (
                q.reshape(n, k // 16, 16).transpose(1, 2, 0)
            )  # (group, M, N)
            terms = inner * s.T[:, None, :] * np.repeat(d_a.astype(np.float64), 2, axis=1).T[:, :, None]
            y, magnitude = terms.sum(axis=0), np.abs(terms).sum(axis=0)
    if bias is not None:
        b = bias.detach().cpu().double().numpy()
        y, magnitude = y + b, magnitude + np.abs(b)
    return y.reshape(*x.shape[:-1], n), magnitude.reshape(*x.shape[:-1], n)


def tolerance(exact: F64, magnitude: F64, k: int, dtype: torch.dtype, roundings: int | None = None) -> F64:
    """How far an output may be from `linear_fp64`'s: fp32 sums, then one rounding. Every part is derived.

    1. A term that meets r roundings on its way through products and additions carries a factor
       (1 + e1)...(1 + er), |ei| <= u = 2**-24. So the fp32 sum is off by at most g * sum |terms| with
       g = r u / (1 - r u), whatever the order (Higham, Accuracy and Stability of Numerical Algorithms,
       Lemma 3.1 and section 4.2). fp64's own error, below k * 2**-53 * sum |terms| in value and in
       magnitude, is less than one more u for any k < 2**28: r + 1 covers it.
    2. A product too small for fp32's normal numbers is off by 2**-150 at most: k * 2**-149 covers all, twice.
    3. Rounding the sum to nearest moves it by at most half an ulp of `dtype`, taken at the largest value
       that the sum may have, |exact| + 1. + 2.

    This holds while nothing overflows in fp32. Where sum |terms| reaches 2**127 it might: there the result
    is infinite and anything goes.

    Args:
        exact: float64, from `linear_fp64`.
        magnitude: float64 of the same shape, from `linear_fp64`.
        k: length of the sums.
        dtype: the output's: bfloat16, float16 or float32.
        roundings: fp32 roundings that the unluckiest term meets. By default k + 3, which holds for any
            order of summation: 2 for products, k - 1 additions, the bias, and one to spare. An
            implementation whose order is known states less, as `reference.roundings` does for its own.

    Returns:
        float64, of the same shape; NaN where the terms are.
    """
    u = 2.0**-24
    r = (k + 3 if roundings is None else roundings) + 1
    with np.errstate(invalid="ignore", over="ignore"):
        sums = r * u / (1 - r * u) * magnitude + k * 2.0**-149
        allowed: F64 = sums + _ulp(np.abs(exact) + sums, dtype) / 2
    allowed[magnitude >= 2.0**127] = np.inf
    return allowed


def error_in_tolerances(output: Tensor, exact: F64, allowed: F64) -> F64:
    """|output - exact| / allowed, for every output: up to 1 is right, above is wrong.

    NaN and infinities must be met exactly (0, else infinite), but for one case: a finite value that may
    round past the largest one of the output's dtype may become infinite, as IEEE rounding has it.

    Args:
        output: bfloat16, float16 or float32, any shape.
        exact: float64 of the same shape, from `linear_fp64`.
        allowed: float64 of the same shape, from `tolerance`.

    Returns:
        float64 of the same shape, never NaN.
    """
    found: F64 = output.detach().cpu().double().numpy()
    largest = torch.finfo(output.dtype).max
    bound = largest + float(_ulp(np.array(largest), output.dtype)) / 2
    with np.errstate(invalid="ignore"):
        errors: F64 = np.abs(found - exact) / allowed
        rounds_past = np.isinf(found) & (np.sign(found) == np.sign(exact)) & (np.abs(exact) + allowed >= bound)
    right = (found == exact) | (np.isnan(found) & np.isnan(exact))
    right |= np.isfinite(exact) & (rounds_past | np.isposinf(allowed))
    return np.where(right, 0.0, np.where(np.isnan(errors), np.inf, errors))


def _ulp(values: F64, dtype: torch.dtype) -> F64:
    """The distance of `dtype`'s neighbours around values >= 0, as if it had no largest number."""
    info = torch.finfo(dtype)
    exponents = np.frexp(np.maximum(values, info.smallest_normal))[1] - 1
    result: F64 = np.ldexp(np.float64(info.eps), exponents)
    return result
