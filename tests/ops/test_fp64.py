"""The GPU tests' own means, compared with `accuracy`, `planes` and `oracles`. Runs on the CPU, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fp64
import gpu_weights
import oracles
from q6k_kernels.cuda import dispatch
from q6k_kernels.formats import planes
from q6k_kernels.formats.types import WEIGHT_TYPES
from q6k_kernels.ops import accuracy

KINDS = ["genuine", "random", "extreme"]


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with gpu_weights.made_on_the_cpu():
        yield


@pytest.mark.parametrize("format", gpu_weights.EVERY)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_those_in_the_planes(kind: str, format: str) -> None:
    w = gpu_weights.weight(kind, 21, 768, format)
    stated = accuracy.of_planes(w.planes, w.row)
    assert torch.equal(stated.codes, w.q)
    assert torch.equal(stated.scale, w.s)
    assert (stated.min is None) == (w.least is None)
    assert stated.min is None or torch.equal(stated.min, w.exact.min)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        fp64.assert_same_bits(w.weights(dtype), accuracy.dequantize(stated, dtype))


@pytest.mark.parametrize("format", gpu_weights.EVERY)
@pytest.mark.parametrize("formula", ["int8", "bf16"])
def test_the_reference_is_right(formula: Literal["int8", "bf16"], format: str) -> None:
    """Every sort of activations, by the operations on the CPU."""
    for kind in KINDS:
        k = gpu_weights.width(768, format)
        w, x = gpu_weights.weight(kind, 21, k, format), gpu_weights.inputs(9, k, torch.bfloat16)
        x[1], x[2, 40], x[3, 50], x[5] = 0, float("inf"), float("nan"), x[5] * 2000
        bias = gpu_weights.bias_of(21, torch.float32)
        exact = fp64.linear(x, w, formula)
        fp64.assert_right(gpu_weights.linear(x, w, None, formula), exact, kind)
        fp64.assert_right(gpu_weights.linear(x, w, bias, formula), exact.plus(bias), f"{kind} with a bias")
        fp64.assert_right(gpu_weights.linear(x[:4], w, bias, formula), exact[:4].plus(bias), f"{kind}, some rows")


def test_the_roundings_of_kernels() -> None:
    w, x = gpu_weights.weight("random", 3, 768, "q6_k"), gpu_weights.inputs(1, 768, torch.bfloat16)
    assert fp64.roundings(fp64.linear(x, w, "int8")) == 768 // 16 + dispatch.INT8_ROUNDINGS
    assert fp64.roundings(fp64.linear(x, w, "bf16")) == 768 // 8 + 768 // 256 + 8


@pytest.mark.parametrize("format", gpu_weights.EVERY)
def test_planes_are_those_of_the_weight_type(format: str) -> None:
    w = gpu_weights.weight("random", 12, 512, format)
    stated = planes.pack(w.stored.numpy(), w.row)
    for found, expected in zip(gpu_weights.planes_of(w.stored.view(3, 4, 512), w.row), stated, strict=True):
        np.testing.assert_array_equal(found.view(torch.uint8).numpy().reshape(12, -1), expected)


def test_planes_are_those_of_the_oracle() -> None:
    q = torch.randint(-32, 32, (3, 4, 512), dtype=torch.int8)
    row = WEIGHT_TYPES["q6_k"]
    u = (q + 32).to(torch.uint8)
    ql, qh = gpu_weights.planes_of(u, row)
    stated = oracles.planes_of_row(q[2, 3].tolist())
    assert (ql[2, 3].numpy().tobytes(), qh[2, 3].numpy().tobytes()) == stated


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_their_kind_says(kind: str) -> None:
    w = gpu_weights.weight(kind, 64, 512, "q6_k_exact")
    assert (w.q.min(), w.q.max()) == (-32, 31)
    assert w.arrays["scale"].min() == -128
    assert (w.arrays["steps"] < 0).any()
    d = w.arrays["steps"]
    assert ((d != 0) & (d.abs() < 6.1e-5)).any()
    assert d.isfinite().all()
    if kind == "extreme":
        assert (d == 0).any()
        assert (w.q == 0).all(1).any()
        assert (w.q == -32).all(1).any()
        mins = gpu_weights.weight(kind, 64, 512, "q4_k").least
        assert (mins < 0).any()
        assert (mins > 0).any()
        assert {0, 1, 254} <= {*gpu_weights.weight(kind, 64, 512, "mxfp4").arrays["scale"].unique().tolist()}
    if kind == "genuine":
        assert 0.015 < w.weights(torch.float32).std() < 0.025
        assert len(w.weights(torch.float32).unique(dim=0)) == 64


def test_a_wrong_output_is_outside_the_tolerance() -> None:
    """One group of sixteen left out, at the longest K of the tests."""
    w = gpu_weights.weight("genuine", 8, 21504, "q6_k")
    x = gpu_weights.inputs(16, 21504, torch.bfloat16)
    for formula in ("int8", "bf16"):
        exact = fp64.linear(x, w, formula)
        scale = w.arrays["scale"].clone()
        scale[:, 700] = 0
        wrong = fp64.linear(x, gpu_weights.Weight(w.stored, {"scale": scale}, w.row), formula).y.bfloat16()
        fp64.assert_right(exact.y.bfloat16(), exact, formula)
        result = accuracy.compare(wrong, exact, fp64.roundings(exact))
        assert result.wrong > 0.25 * wrong.numel()
        with pytest.raises(AssertionError, match=r"y\[\d+, \d+\] is .*, expected .* within .* are wrong"):
            fp64.assert_right(wrong, exact, formula)
        with pytest.raises(AssertionError, match=r"expected \(16, 8\), found \(16, 7\)"):
            fp64.assert_right(wrong[:, :7], exact, formula)


def test_a_wrong_bit_is_named() -> None:
    one = torch.tensor([[0.0, 1.0], [float("nan"), -2.0]])
    fp64.assert_same_bits(one, one.clone())
    with pytest.raises(AssertionError, match=r"element \(0, 0\) is -0.0, expected 0.0; 1 of 4 differ"):
        fp64.assert_same_bits(torch.where(one == 0, -0.0, one), one)
    with pytest.raises(AssertionError, match="expected torch.float32"):
        fp64.assert_same_bits(one.half(), one)
