"""The formulas in fp64 on any device, from codes and scales, and the comparison: as `accuracy` says, but on a GPU.

`accuracy` is the measure, in numpy; at the sizes of real models it would take minutes. This says the same in
torch, and test_gpu_fp64.py holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Formula = Literal["int8", "bf16"]
CHUNK = 1 << 25
"""float64 values at a time: 256 MB."""


@dataclass(frozen=True)
class Exact:
    """y and the sum of its terms' absolute values, float64 (M, N); and what the tolerance depends on."""

    y: Tensor
    magnitude: Tensor
    k: int
    formula: Formula

    def rows(self, count: int) -> Exact:
        """Of the first rows of x."""
        return Exact(self.y[:count], self.magnitude[:count], self.k, self.formula)

    def plus(self, bias: Tensor) -> Exact:
        """With a bias."""
        b = bias.double()
        return Exact(self.y + b, self.magnitude + b.abs(), self.k, self.formula)


def linear(x: Tensor, q: Tensor, s: Tensor, formula: Formula) -> Exact:
    """x (M, K) times weights: q int8 (N, K), s float64 (N, K/16)."""
    (m, k), n = x.shape, len(q)
    y, magnitude = (torch.empty(m, n, dtype=torch.float64, device=x.device) for _ in range(2))
    step = max(1, CHUNK // (k if formula == "bf16" else max(k, m * k // 16)))
    left = (x.double(), None) if formula == "bf16" else quantized(x)
    for at in range(0, n, step):
        part = slice(at, at + step)
        if formula == "bf16":
            w = (q[part].double().view(-1, k // 16, 16) * s[part].unsqueeze(-1)).view(-1, k)
            w = w.float().to(x.dtype).double()
            y[:, part], magnitude[:, part] = left[0] @ w.T, left[0].abs() @ w.abs().T
        else:
            a, d_a = left
            groups = a.double().view(m, k // 16, 16).transpose(0, 1)
            inner = groups @ q[part].double().view(-1, k // 16, 16).permute(1, 2, 0)  # (group, M, N)
            terms = inner * s[part].T.unsqueeze(1) * d_a.double().repeat_interleave(2, 1).T.unsqueeze(-1)
            y[:, part], magnitude[:, part] = terms.sum(0), terms.abs().sum(0)
    return Exact(y, magnitude, k, formula)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """a float32 (M, K), of integers, and d_a float32 (M, K/32)."""
    groups = x.float().view(len(x), x.shape[1] // 32, 32)
    amax = groups.abs().amax(-1)
    d_a = amax / torch.full_like(amax, 127)  # by a tensor: dividing by a number is multiplying on a GPU
    d_a = torch.where(groups.isfinite().all(-1), d_a, torch.nan)
    a = (groups / d_a.unsqueeze(-1)).clamp(-127, 127).round()
    return torch.where((d_a > 0).unsqueeze(-1), a, 0).view(x.shape), d_a


def roundings(k: int, formula: Formula) -> int:
    """The roundings to fp32 that the unluckiest term meets, for `tolerance`.

    "int8": two products, then additions of K/16 sums of groups, in any order, and the bias; some to spare.
    "bf16": matrix instructions add sixteen products at a time, and do so by cutting off what lies below the
    largest one's bits, not by rounding: an instruction counts as two. Then the parts of K that blocks share, of a
    super-block or more, and the bias; some to spare.
    """
    return k // 16 + 8 if formula == "int8" else k // 8 + k // 256 + 8


def tolerance(exact: Exact, dtype: torch.dtype, chain: int | None = None) -> Tensor:
    """`accuracy.tolerance`; `chain` are the roundings."""
    u = 2.0**-24
    r = (roundings(exact.k, exact.formula) if chain is None else chain) + 1
    sums = r * u / (1 - r * u) * exact.magnitude + exact.k * 2.0**-149
    allowed = sums + ulp(exact.y.abs() + sums, dtype) / 2
    return torch.where(exact.magnitude >= 2.0**127, torch.inf, allowed)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of `dtype`'s neighbours around values >= 0, as if it had no largest number."""
    info = torch.finfo(dtype)
    held = values.clamp(min=info.smallest_normal)
    exponents = held.nan_to_num(1.0, 2.0**1023).frexp().exponent.long() - 1
    powers = (exponents + 1023 << 52).view(torch.float64)
    return torch.where(values.isnan(), torch.nan, info.eps * powers)


def errors(output: Tensor, exact: Exact, allowed: Tensor) -> Tensor:
    """`accuracy.error_in_tolerances`."""
    found, y = output.double(), exact.y
    largest = torch.finfo(output.dtype).max
    bound = largest + float(ulp(torch.tensor(largest, dtype=torch.float64), output.dtype)) / 2
    ratio = (found - y).abs() / allowed
    rounds_past = found.isinf() & (found.sign() == y.sign()) & (y.abs() + allowed >= bound)
    right = (found == y) | (found.isnan() & y.isnan()) | (y.isfinite() & (rounds_past | allowed.isposinf()))
    return torch.where(right, 0.0, ratio.nan_to_num(torch.inf, torch.inf))


def assert_right(output: Tensor, exact: Exact, what: str) -> None:
    """Every output is within its tolerance; if not, says where the first is that is not."""
    __tracebackhide__ = True
    assert output.shape == exact.y.shape, f"{what}: expected {tuple(exact.y.shape)}, found {tuple(output.shape)}"
    if not output.numel():
        return
    allowed = tolerance(exact, output.dtype)
    off = errors(output, exact, allowed)
    worst = float(off.max())
    if worst <= 1:
        return
    wrong = (off > 1).nonzero()
    i, j = wrong[0].tolist()
    raise AssertionError(
        f"{what}: y[{i}, {j}] is {float(output[i, j]):.8g}, expected {float(exact.y[i, j]):.8g} within "
        f"{float(allowed[i, j]):.3g}; {len(wrong)} of {off.numel()} are wrong, the worst by {worst:.3g} tolerances"
    )


def assert_same_bits(found: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal to the bit, NaN included; if not, says where the first is that is not."""
    __tracebackhide__ = True
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), (
        f"{what}: expected {expected.dtype} {tuple(expected.shape)}, found {found.dtype} {tuple(found.shape)}"
    )
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    expected = expected.to(found.device)
    bits = [t.contiguous().view(kinds[t.element_size()]) for t in (found, expected)]
    if torch.equal(*bits):
        return
    wrong = (bits[0] != bits[1]).nonzero()
    at = tuple(wrong[0].tolist())
    raise AssertionError(
        f"{what}: element {at} is {found[at].item()!r}, expected {expected[at].item()!r}; "
        f"{len(wrong)} of {found.numel()} differ"
    )
