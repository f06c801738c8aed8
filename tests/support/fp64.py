"""Assertions on outputs of GPU tests: products within `accuracy`'s tolerance, everything else to the bit."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gpu_weights import Weight
from q6k_kernels.cuda import dispatch
from q6k_kernels.ops import accuracy

Exact = accuracy.Exact


def linear(x: Tensor, w: Weight, formula: Literal["int8", "bf16"], *, scales_rounded: bool | None = None) -> Exact:
    """Return x (M, K) times a weight (N, K).

    Kernels for 16-bit activations round scales and mins to bf16 first where x is bf16, but for those that expand
    weights for cuBLAS. By default it is as the operation does on the device that x is on: see
    `cuda.dispatch.rounds_scales`.
    """
    if scales_rounded is None:
        scales_rounded = formula == "bf16" and dispatch.rounds_scales(x)
    return accuracy.linear(x, w.exact, activations=formula, scales_rounded=scales_rounded)


def roundings(exact: Exact) -> int:
    """Return the largest number of roundings to fp32 of any term, for `accuracy.tolerance`.

    "int8": see `cuda.dispatch.INT8_ROUNDINGS`.
    "bf16": a matrix instruction adds sixteen products and truncates, not rounds, below the bits of the largest one:
    two roundings. Then come the parts of K that thread blocks share, of a super-block or more, and the bias. The
    number includes some reserve.
    """
    if exact.terms < exact.k:
        return exact.terms + dispatch.INT8_ROUNDINGS
    return exact.k // 8 + exact.k // 256 + 8


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
