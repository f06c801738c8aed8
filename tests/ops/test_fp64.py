"""The GPU tests' own means, held against `accuracy`, `planar` and `oracles`. Runs on the CPU, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fp64
import gpu_weights
import oracles
from q6k_kernels.formats import planes
from q6k_kernels.ops import accuracy

DTYPES = [torch.bfloat16, torch.float16]
KINDS = ["genuine", "random", "extreme"]


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with gpu_weights.made_on_the_cpu():
        yield


def activations(dtype: torch.dtype, k: int) -> torch.Tensor:
    x = gpu_weights.inputs(9, k, dtype)
    x[1] = 0
    x[2, 40] = float("inf")
    x[3, 50] = float("nan")
    x[4] *= 1e-7 if dtype == torch.float16 else 1e-39
    x[5] *= 2000
    x[6, 7], x[6, 300] = float("inf"), float("-inf")
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formula", ["int8", "bf16"])
@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_and_the_tolerance_are_those_of_accuracy(
    kind: str, scales: str, formula: Literal["int8", "bf16"], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = 21, 768
    monkeypatch.setattr(fp64, "CHUNK", 8 * k)
    w = gpu_weights.weight(kind, n, k, scales)
    x, bias = activations(dtype, k), gpu_weights.bias_of(n, torch.float32)
    y, magnitude = accuracy.linear_fp64(x, *w.planes, bias, activations=formula)
    exact = fp64.linear(x, w.q, w.s, formula).plus(bias)
    scale = 1e-13 * np.nan_to_num(magnitude, posinf=1.0) + 1e-300
    with np.errstate(invalid="ignore"):
        near = np.abs(exact.y.numpy() - y) <= scale
    assert (near | (exact.y.numpy() == y) | (np.isnan(y) & exact.y.isnan().numpy())).all()
    np.testing.assert_allclose(exact.magnitude.numpy(), magnitude, rtol=1e-12)
    stated = fp64.Exact(torch.from_numpy(y), torch.from_numpy(magnitude), k, formula)
    chain = fp64.roundings(k, formula)
    allowed = accuracy.tolerance(y, magnitude, k, dtype, chain)
    np.testing.assert_array_equal(fp64.tolerance(stated, dtype).numpy(), allowed)
    output = torch.from_numpy(np.where(np.isfinite(y), y, 0)).to(dtype)
    for found in (
        output,
        output * 1.01,
        torch.full_like(output, float("inf")),
        torch.full_like(output, float("nan")),
    ):
        np.testing.assert_array_equal(
            fp64.errors(found, stated, fp64.tolerance(stated, dtype)).numpy(),
            accuracy.error_in_tolerances(found, y, allowed),
        )


def test_planes_are_those_of_the_format() -> None:
    q = torch.randint(-32, 32, (3, 4, 512), dtype=torch.int8)
    ql, qh = gpu_weights.planes_of(q)
    expected = planes.pack(q.numpy())
    np.testing.assert_array_equal(ql.numpy(), expected[0])
    np.testing.assert_array_equal(qh.numpy(), expected[1])
    row = oracles.planes_of_row(q[2, 3].tolist())
    assert (ql[2, 3].numpy().tobytes(), qh[2, 3].numpy().tobytes()) == row


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_their_kind_says(kind: str) -> None:
    w = gpu_weights.weight(kind, 64, 512, "exact")
    assert (w.q.min(), w.q.max()) == (-32, 31)
    assert w.sub_scales.min() == -128
    assert (w.d < 0).any()
    assert ((w.d != 0) & (w.d.abs() < 6.1e-5)).any()
    assert w.d.isfinite().all()
    if kind == "extreme":
        assert (w.d == 0).any()
        assert (w.q == 0).all(1).any()
        assert (w.q == -32).all(1).any()
    if kind == "genuine":
        assert 0.015 < w.weights(torch.float32).std() < 0.025
        assert len(w.weights(torch.float32).unique(dim=0)) == 64


def test_a_wrong_output_is_outside_the_tolerance() -> None:
    """One group of sixteen left out, at the longest K of the tests."""
    w = gpu_weights.weight("genuine", 8, 21504, "bf16")
    x = gpu_weights.inputs(16, 21504, torch.bfloat16)
    for formula in ("int8", "bf16"):
        exact = fp64.linear(x, w.q, w.s, formula)
        s = w.s
        s[:, 700] = 0
        wrong = fp64.linear(x, w.q, s, formula).y.bfloat16()
        fp64.assert_right(exact.y.bfloat16(), exact, formula)
        allowed = fp64.tolerance(exact, torch.bfloat16)
        assert (fp64.errors(wrong, exact, allowed) > 1).double().mean() > 0.25
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
