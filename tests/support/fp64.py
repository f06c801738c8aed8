"""Assertions on outputs of GPU tests: products within `accuracy`'s tolerance, everything else to the bit."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from q6k_kernels.ops import accuracy

Exact = accuracy.Exact


def linear(x: Tensor, q: Tensor, s: Tensor, formula: Literal["int8", "bf16"]) -> Exact:
    """Return x (M, K) times weights of codes q int8 (N, K) and scales s float64 (N, K/G)."""
    return accuracy.linear(x, accuracy.Weight(q, s), activations=formula)


def roundings(exact: Exact) -> int:
    """Return the largest number of roundings to fp32 of any term, for `accuracy.tolerance`.

    "int8": the terms are sums of groups. Each meets two products, additions in any order, and the bias.
    "bf16": a matrix instruction adds sixteen products and truncates, not rounds, below the bits of the largest
    one, so it counts as two roundings. Then come the parts of K that thread blocks share, of a super-block or
    more, and the bias. Both numbers include some reserve.
    """
    return exact.terms + 8 if exact.terms < exact.k else exact.k // 8 + exact.k // 256 + 8


def assert_right(output: Tensor, exact: Exact, what: str) -> None:
    """Assert that every output is within its tolerance; the message names the first that is not."""
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
    """Assert equality to the bit, NaN included; the message names the first difference."""
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
