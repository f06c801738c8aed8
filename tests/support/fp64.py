"""What the GPU's tests assert of outputs: products within `accuracy`'s tolerance, everything else to the bit."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from q6k_kernels.ops import accuracy

Exact = accuracy.Exact


def linear(x: Tensor, q: Tensor, s: Tensor, formula: Literal["int8", "bf16"]) -> Exact:
    """x (M, K) times weights: q int8 (N, K), s float64 (N, K/G)."""
    return accuracy.linear(x, accuracy.Weight(q, s), activations=formula)


def roundings(exact: Exact) -> int:
    """The roundings to fp32 that the unluckiest term meets, for `accuracy.tolerance`.

    "int8", whose terms are the sums of groups: two products, then additions in any order, and the bias; some to
    spare. "bf16": matrix instructions add sixteen products at a time, and do so by cutting off what lies below the
    largest one's bits, not by rounding: an instruction counts as two. Then the parts of K that blocks share, of a
    super-block or more, and the bias; some to spare.
    """
    return exact.terms + 8 if exact.terms < exact.k else exact.k // 8 + exact.k // 256 + 8


def assert_right(output: Tensor, exact: Exact, what: str) -> None:
    """Every output is within its tolerance; if not, says where the first is that is not."""
    __tracebackhide__ = True
    assert output.shape == exact.y.shape, f"{what}: expected {tuple(exact.y.shape)}, found {tuple(output.shape)}"
    result = accuracy.compare(output, exact, roundings(exact))
    if result.first is not None:
        (i, j), found, expected, allowed = result.first
        raise AssertionError(
            f"{what}: y[{i}, {j}] is {found:.8g}, expected {expected:.8g} within {allowed:.3g}; "
            f"{result.wrong} of {output.numel()} are wrong, the worst by {result.worst:.3g} tolerances"
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
