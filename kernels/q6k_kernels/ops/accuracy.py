"""Every operation in fp64, the tolerance of outputs derived from it, and the comparison of outputs with both.

    w[n,k] = scale[n,g] * code[n,k] - min[n,g]    g = k // G the group of weight k; without a min, it is 0

    dequantise                 w, rounded to fp32 and then to the dtype asked for
    embedding                  rows of the dequantised weight
    activations to 8 bits      in groups of 32: d_a = amax / 127, a = rint(x / d_a)
    linear, 16-bit ("bf16")    y = sum_k x[k] * w[k], w dequantised to x's dtype; scale and min may be
                               rounded to it first
    linear, int8 ("int8")      y = sum_g d_a * (scale[g] * sum_(k in g) code[k] * a[k] - min[g] * sum_(k in g) a[k])

Every implementation is tested against this module, so it shares no formula with them. It computes on the device of
its arguments, the CPU or a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from q6k_kernels.ops.exact_weights import Weight as Weight
from q6k_kernels.ops.exact_weights import of_planes as of_planes

ACTIVATION_GROUP = 32
"""Activations that share one d_a."""
MOST_INTEGER_SCALE = 128
"""No integer that is a scale, or a min, before its step is larger."""
CHUNK = 1 << 24
"""Weights, or terms of a sum, held in fp64 at a time; about 40 bytes each, 700 MB."""


@dataclass(frozen=True)
class Exact:
    """The exact result of `linear`, and the quantities that its tolerance depends on.

    Attributes:
        y: float64 (..., N).
        magnitude: float64 (..., N), the sum of the terms' absolute values. A term is x * w or, with int8
            activations, d_a * scale * (the integer sum of a group); a min adds one more.
        k: length of the sums.
        terms: number of terms that one output adds.
        largest: float64 (..., N), what no sum or product on the way exceeds, in whatever order scales are
            multiplied with; None if that is the magnitude.
    """

    y: Tensor
    magnitude: Tensor
    k: int
    terms: int
    largest: Tensor | None = None

    def __getitem__(self, rows: slice | list[int]) -> Exact:
        largest = None if self.largest is None else self.largest[rows]
        return Exact(self.y[rows], self.magnitude[rows], self.k, self.terms, largest)

    def plus(self, bias: Tensor) -> Exact:
        """Return this result with a bias (N,) added."""
        b = bias.detach().double()
        largest = None if self.largest is None else self.largest + b.abs()
        return Exact(self.y + b, self.magnitude + b.abs(), self.k, self.terms, largest)


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weights (N, K) in `dtype`: rounded to fp32, as in GGUF, and then to `dtype`."""
    return _values(weight).float().to(dtype)


def rounded_scales(weight: Weight, dtype: torch.dtype) -> Weight:
    """Return the weight with scales and mins rounded to nearest, ties to even, in `dtype`.

    A kernel for 16-bit activations may compute with these: it multiplies and subtracts them, exactly, and rounds
    the result once to `dtype` (see `linear`).
    """

    def each(values: Tensor) -> Tensor:
        return values.to(torch.float32).to(dtype).double()

    return Weight(weight.codes, each(weight.scale), None if weight.min is None else each(weight.min))


def _values(weight: Weight) -> Tensor:
    """Return scale * code - min, float64 (N, K); exact for scales and mins of fp16 numbers times integers."""
    w = weight.codes.double().reshape(*weight.scale.shape, weight.group) * weight.scale.unsqueeze(-1)
    if weight.min is not None:
        w -= weight.min.unsqueeze(-1)
    return w.flatten(1)


def _rounded_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 values rounded to `dtype` once, ties to even; torch's conversion rounds to fp32 before."""
    ulp = _ulp(values.abs(), dtype)
    return torch.where(values.isfinite(), (values / ulp).round() * ulp, values).to(dtype)


def embedding(indices: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the dequantised rows at `indices`, of any shape (...), as (..., K) of `dtype`."""
    return dequantize(weight.rows(indices.flatten()), dtype).view(*indices.shape, weight.codes.shape[1])


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x, float (M, K), to 8 bits: a (M, K), integers of -127 to 127, and d_a (M, K/32), both float64.

    Quotients are fp32's: dividing in fp64 and rounding gives the same bits, because 53 bits are more than twice 24.
    A group whose d_a is zero has a = 0; one that holds an infinity or NaN has a = 0 and d_a = NaN.
    """
    groups = x.detach().double().reshape(len(x), x.shape[1] // ACTIVATION_GROUP, ACTIVATION_GROUP)
    amax = groups.abs().amax(-1, keepdim=True)
    # By a tensor, because on GPUs torch turns division by a number into multiplication with its reciprocal.
    d_a = (amax / torch.full_like(amax, 127)).float().double()
    d_a = torch.where(amax.isfinite(), d_a, torch.nan)
    a = torch.where(d_a > 0, (groups / d_a).float().double().round().clamp(-127, 127), 0)
    return a.flatten(1), d_a.squeeze(-1)


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    activations: Literal["int8", "bf16"],
    scales_rounded: bool = False,
) -> Exact:
    """Return x times the transposed weights plus the bias, by the formulas at the top of this module.

    Args:
        x: bfloat16, float16 or float32 (..., K).
        weight: (N, K), on x's device.
        bias: (N,), or None.
        activations: "int8", or "bf16" for activations in x's own dtype.
        scales_rounded: whether, with "bf16", weights are those of `rounded_scales` in x's dtype, rounded once.

    Raises:
        ValueError: scales are to be rounded with "int8", whose scales are exact.
    """
    if scales_rounded and activations == "int8":
        raise ValueError('scales_rounded: expected False with activations "int8", found True')
    (n, k), rows = weight.codes.shape, x.detach().reshape(-1, x.shape[-1])
    width = math.gcd(weight.group, ACTIVATION_GROUP)
    sums: Callable[[Weight], tuple[Tensor, Tensor, Tensor]]
    if activations == "int8":
        a, d_a = quantize_activations(rows)
        sums, values, terms = lambda part: _int8(a, d_a, part, width), len(rows) * k // width, k // width
        terms *= 1 if weight.min is None else 2
    else:
        wide = rows.double()

        def expanded(part: Weight) -> Tensor:
            if scales_rounded:
                return _rounded_once(_values(rounded_scales(part, x.dtype)), x.dtype)
            return dequantize(part, x.dtype)

        sums, values, terms = lambda part: _bf16(wide, expanded(part).double()), k, k
    step = max(1, CHUNK // max(k, values))
    chunks = [sums(weight.rows(slice(at, at + step))) for at in range(0, n, step)]
    y, magnitude, largest = (torch.cat(part, 1).view(*x.shape[:-1], n) for part in zip(*chunks, strict=True))
    exact = Exact(y, magnitude, k, terms, largest)
    return exact if bias is None else exact.plus(bias)


def _bf16(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, magnitude and largest (M, N) of x (M, K) and w (N, K), float64."""
    magnitude = x.abs() @ w.abs().T
    return x @ w.T, magnitude, magnitude


def _int8(a: Tensor, d_a: Tensor, weight: Weight, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, magnitude and largest (M, N) of quantised activations; `width` weights share both scales."""
    k = a.shape[1]

    def each(scales: Tensor) -> Tensor:
        """Return one value for each group of `width`: (groups, rows)."""
        return scales.repeat_interleave(k // width // scales.shape[1], 1).T

    a_groups = a.view(len(a), k // width, width).transpose(0, 1)
    codes = weight.codes.double().reshape(-1, k // width, width).permute(1, 2, 0)
    steps = each(d_a).unsqueeze(-1)
    terms = a_groups @ codes  # (groups, M, N)
    before_scales = (terms.abs() * steps).sum(0)
    terms.mul_(each(weight.scale).unsqueeze(1))
    before_steps = terms.abs().sum(0)
    terms.mul_(steps)
    y, magnitude = terms.sum(0), terms.abs_().sum(0)
    if weight.min is not None:
        sums = a_groups.sum(-1, keepdim=True) * steps
        terms = sums * each(weight.min).unsqueeze(1)
        y, magnitude = y - terms.sum(0), magnitude + terms.abs_().sum(0)
        before_scales += sums.abs_().sum(0)
    largest = torch.maximum(before_steps, MOST_INTEGER_SCALE * before_scales)
    return y, magnitude, torch.maximum(largest, magnitude)


def tolerance(exact: Exact, dtype: torch.dtype, roundings: int | None = None) -> Tensor:
    """Return how far an output may be from the exact one: fp32 sums, then one rounding. Every part is derived.

    1. A term that meets r roundings on its way through products and additions carries a factor
       (1 + e1)...(1 + er), |ei| <= u = 2**-24. So the fp32 sum is off by at most g * sum |terms| with
       g = r u / (1 - r u), whatever the order (Higham, Accuracy and Stability of Numerical Algorithms,
       Lemma 3.1 and section 4.2). fp64's own error, below k * 2**-53 * sum |terms| in value and in
       magnitude, is less than one more u for any k < 2**28: r + 1 covers it.
    2. A product too small for fp32's normal numbers is off by 2**-150 at most: k * 2**-149 covers all, twice.
    3. Rounding the sum to nearest moves it by at most half an ulp of `dtype`, taken at the largest value
       that the sum may have, |exact| + 1. + 2.

    This holds while nothing overflows in fp32. Where `largest` reaches 2**127 something might, so the tolerance
    is infinite there.

    Args:
        exact: what `linear` returns.
        dtype: dtype of the output: bfloat16, float16 or float32.
        roundings: most fp32 roundings that any term goes through. By default terms + 3, which holds for any
            order of summation: 2 for products, terms - 1 additions, the bias, and one to spare; integer sums
            of int8 activations are exact. An implementation whose order is known states less, as
            `reference.roundings` does for its own.

    Returns:
        float64, of the shape of y; NaN where the terms are.
    """
    u = 2.0**-24
    r = (exact.terms + 3 if roundings is None else roundings) + 1
    sums = r * u / (1 - r * u) * exact.magnitude + exact.k * 2.0**-149
    allowed = sums + _ulp(exact.y.abs() + sums, dtype) / 2
    largest = exact.magnitude if exact.largest is None else exact.largest
    return torch.where(largest >= 2.0**127, torch.inf, allowed)


def error_in_tolerances(output: Tensor, exact: Tensor, allowed: Tensor) -> Tensor:
    """Return |output - exact| / allowed for every output: up to 1 is right, above is wrong.

    NaN and infinities must be equal: the error is 0 if they are, else infinite. One exception: a finite value
    that may round past the largest value of the output's dtype may become infinite, as in IEEE rounding.

    Args:
        output: bfloat16, float16 or float32, any shape.
        exact: float64 of the same shape, the y of `linear`.
        allowed: float64 of the same shape, from `tolerance`.

    Returns:
        float64 of the same shape, never NaN.
    """
    found = output.detach().double()
    largest = torch.finfo(output.dtype).max
    bound = largest + float(_ulp(torch.tensor(largest, dtype=torch.float64), output.dtype)) / 2
    errors = (found - exact).abs() / allowed
    rounds_past = found.isinf() & (found.sign() == exact.sign()) & (exact.abs() + allowed >= bound)
    right = (found == exact) | (found.isnan() & exact.isnan())
    right |= exact.isfinite() & (rounds_past | allowed.isposinf())
    return torch.where(right, 0.0, errors.nan_to_num(torch.inf, torch.inf))


class Wrong(NamedTuple):
    """An output outside its tolerance: its index, its value, the exact value and the tolerance."""

    at: tuple[int, ...]
    found: float
    expected: float
    allowed: float


@dataclass(frozen=True)
class Comparison:
    """Outputs compared with `Exact`.

    Attributes:
        worst: the largest error in tolerances: up to 1 is right; infinite for a NaN or infinity out of place.
        wrong: number of outputs outside their tolerance.
        first: the first of them.
    """

    worst: float
    wrong: int
    first: Wrong | None


def compare(output: Tensor, exact: Exact, roundings: int | None = None) -> Comparison:
    """Compare outputs with the exact ones, within `tolerance`.

    Args:
        output: bfloat16, float16 or float32, of the shape and on the device of `exact`.
        exact: what `linear` returns.
        roundings: see `tolerance`.

    Raises:
        ValueError: the output has another shape.
    """
    if output.shape != exact.y.shape:
        raise ValueError(f"expected outputs {tuple(exact.y.shape)}, found {tuple(output.shape)}")
    if not output.numel():
        return Comparison(0.0, 0, None)
    allowed = tolerance(exact, output.dtype, roundings)
    errors = error_in_tolerances(output, exact.y, allowed)
    wrong, first = (errors > 1).nonzero(), None
    if len(wrong):
        at = tuple(wrong[0].tolist())
        first = Wrong(at, float(output[at]), float(exact.y[at]), float(allowed[at]))
    return Comparison(float(errors.max()), len(wrong), first)


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of `dtype`'s numbers at values >= 0, as if it had no largest one; NaN at infinity."""
    info = torch.finfo(dtype)
    normal = values.clamp(min=info.smallest_normal)
    return info.eps * (normal / (2 * normal.frexp().mantissa))
