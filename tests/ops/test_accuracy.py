"""The fp64 statement of the operations against the plain one of `oracles`; the tolerance, and the comparison."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

import oracles
import packed

torch = pytest.importorskip("torch")

from q6k_cases import SHAPES, inputs, name_of, parts, planes
from q6k_kernels.ops import accuracy
from q6k_kernels.ops.accuracy import Exact, Weight, error_in_tolerances, tolerance
from q6k_kernels.ops.reference import roundings

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Formula = Literal["int8", "bf16"]


def wild_inputs(k: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows as models have them, and one of each sort that is not."""
    x = inputs(12, k, dtype)
    x[2, 40] = float("inf")
    x[3, 50] = float("nan")
    x[4] *= 1e-7 if dtype == torch.float16 else 1e-39
    x[5] *= 2000
    x[6, 7], x[6, k - 1] = float("inf"), float("-inf")
    x[7] = torch.arange(k) % 255 - 127.0  # every code, exactly
    x[8] = x[7] / 2  # ties, in part
    if dtype == torch.float32:  # where d_a is a coarse subnormal, or zero
        x[9] *= 3e-44
        x[10] = 1.4e-45
    return x


def random_weight(n: int, k: int, group: int, with_min: bool, wild: bool) -> Weight:
    """Codes of 0 to 31; scales and mins of a model's size or, if wild, of all sizes, and zero."""
    rng = np.random.default_rng(group)
    codes = torch.from_numpy(rng.integers(0, 32, (n, k), dtype=np.int8))
    scale, least = (torch.from_numpy(rng.normal(size=(n, k // group)) * 1e-3) for _ in range(2))
    if wild:
        sizes = torch.from_numpy(2.0 ** rng.integers(-40, 20, scale.shape))
        scale, least = scale * sizes, least * sizes.flip(0)
        scale[0], least[-1] = 0, 0
    # What fp32 holds, as every format's scales are.
    return Weight(codes, scale.half().double(), least.half().double() if with_min else None)


def assert_as_the_oracle_says(x: torch.Tensor, weight: Weight, activations: Formula) -> None:
    """y and magnitude, as near as fp64 allows two orders of summation; infinities and NaN where they should be."""
    least = None if weight.min is None else weight.min.numpy()
    codes, scale = weight.codes.double().numpy(), weight.scale.numpy()
    y, magnitude = oracles.linear(x.float().numpy(), codes, scale, least, activations, name_of(x.dtype))
    found = accuracy.linear(x, weight, activations=activations)
    assert (found.y.dtype, found.k) == (torch.float64, x.shape[1])
    near = x.shape[1] * 2.0**-52 * np.nan_to_num(magnitude, posinf=0.0) + 1e-300
    finite = np.isfinite(y)
    np.testing.assert_array_equal(found.y.numpy()[~finite], y[~finite])
    assert (abs(found.y.numpy()[finite] - y[finite]) <= near[finite]).all()
    np.testing.assert_allclose(found.magnitude.numpy(), magnitude, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("name", SHAPES)
def test_products_of_planes_are_the_oracles(
    name: str, scales: str, activations: Formula, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    k = SHAPES[name][1]
    weight = packed.exact_of(**planes(name, scales))
    for part, right in zip((weight.codes, weight.scale), parts(name, scales), strict=True):
        np.testing.assert_array_equal(part.double().numpy(), right)
    for chunk in (accuracy.CHUNK, 1, 3 * k):
        monkeypatch.setattr(accuracy, "CHUNK", chunk)
        assert_as_the_oracle_says(wild_inputs(k, dtype), weight, activations)


@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("with_min", [False, True])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_products_of_any_groups_are_the_oracles(
    group: int, with_min: bool, wild: bool, activations: Formula
) -> None:
    weight = random_weight(7, 192, group, with_min, wild)
    for dtype in DTYPES:
        assert_as_the_oracle_says(wild_inputs(192, dtype), weight, activations)
    floating = Weight(weight.codes.double(), weight.scale, weight.min)
    assert_as_the_oracle_says(wild_inputs(192, torch.bfloat16), floating, activations)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [16, 32])
def test_weights_and_rows_are_the_oracles(group: int, dtype: torch.dtype) -> None:
    for wild, with_min in ((False, False), (False, True), (True, False), (True, True)):
        weight = random_weight(7, 192, group, with_min, wild)
        least = None if weight.min is None else weight.min.numpy()
        right = oracles.weights(weight.codes.double().numpy(), weight.scale.numpy(), least)
        w = accuracy.dequantize(weight, dtype)
        assert w.dtype == dtype
        np.testing.assert_array_equal(w.double().numpy(), oracles.rounded(right, name_of(dtype)))
        for at in (torch.tensor([[6, 0], [3, 3]]), torch.tensor(2), torch.empty(0, 5, dtype=torch.int64)):
            assert torch.equal(accuracy.embedding(at, weight, dtype), w[at])


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_quantised_as_the_oracle_does(dtype: torch.dtype) -> None:
    x = torch.cat((wild_inputs(768, dtype), inputs(40, 768, dtype)))
    a, d_a = accuracy.quantize_activations(x)
    codes, steps = oracles.quantised(x.float().numpy())
    np.testing.assert_array_equal(d_a.numpy(), steps)
    np.testing.assert_array_equal(a.numpy(), codes)
    assert (a.min(), a.max()) == (-127, 127)


def test_a_bias_is_one_more_term_and_rows_are_rows() -> None:
    weight, x = random_weight(7, 192, 32, True, False), inputs(4, 192, torch.bfloat16)
    bias = torch.linspace(-1, 1, 7).half()
    for activations, terms in (("int8", 2 * 192 // 32), ("bf16", 192)):
        bare = accuracy.linear(x, weight, activations=activations)
        exact = accuracy.linear(x.view(2, 2, 192), weight, bias, activations=activations)
        assert (bare.k, bare.terms) == (192, terms)
        assert torch.equal(exact.y.view(4, 7), bare.y + bias.double())
        assert torch.equal(exact.magnitude.view(4, 7), bare.magnitude + bias.double().abs())
        assert torch.equal(bare[1:3].y, bare.y[1:3])
        assert torch.equal(bare[[0, 0, 2]].magnitude, bare.magnitude[[0, 0, 2]])
        assert accuracy.linear(x.new_empty(0, 3, 192), weight, bias, activations=activations).y.shape == (0, 3, 7)


def test_what_is_no_weight_is_refused() -> None:
    codes, scale = torch.zeros(3, 64), torch.zeros(3, 2)
    for bad in (torch.zeros(2, 2), torch.zeros(3, 5)):
        with pytest.raises(ValueError, match=r"scale: expected \(3, K/G\) for codes \(3, 64\), found \(\d, \d\)"):
            Weight(codes, bad)
    with pytest.raises(ValueError, match=r"min: expected \(3, K/G\) for codes \(3, 64\), found \(3, 4\)"):
        Weight(codes, scale, torch.zeros(3, 4))
    arrays = planes("random", "exact")
    for role in ("qh", "scale", "steps"):
        with pytest.raises(ValueError, match=r"q6_k_exact: expected ql, qh, scale, steps .*\(7, 384\)"):
            packed.exact_of(**{**arrays, role: arrays[role][:, 1:]})


# The tolerance: it must fail what is wrong, and its bound must be right.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["int8", "bf16"])
def test_a_wrong_output_is_outside_the_tolerance(activations: Formula, dtype: torch.dtype) -> None:
    k = SHAPES["genuine"][1]
    arrays, x = planes("genuine", "bf16"), inputs(2, k, dtype)
    y = packed.multiplied(x, **arrays, activations=activations)
    exact = accuracy.linear(x, packed.exact_of(**arrays), activations=activations)
    allowed = tolerance(exact, dtype, roundings(k, packed.row(packed.given(**arrays)), activations))
    # Two ulps and more, wherever terms do not cancel so far that the fp32 sums are not known that well.
    info = torch.finfo(dtype)
    sharp = allowed < info.eps * exact.y.abs().log2().floor().exp2()
    assert sharp.double().mean() >= 0.5
    errors = error_in_tolerances(y * (1 + 2 * info.eps), exact.y, allowed)
    assert (errors[sharp] > 1).all()
    for wrong in (
        -y, y.roll(1, 0), y.roll(1, 1), torch.zeros_like(y),
        torch.full_like(y, float("nan")), torch.full_like(y, float("inf")),
    ):  # fmt: skip
        assert (error_in_tolerances(wrong, exact.y, allowed) > 1).all()


@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("activations", ["int8", "bf16"])
def test_one_code_off_by_one_is_outside_the_tolerance(activations: Formula, scales: str) -> None:
    """Every weight of a row in turn, seen by a row of x that looks at its group of 16 alone."""
    k = SHAPES["heavy-tailed"][1]
    arrays, (q, s) = planes("heavy-tailed", scales), parts("heavy-tailed", scales)
    x = torch.zeros(k, k, dtype=torch.bfloat16)
    x[range(k), range(k)] = 1.25
    exact = accuracy.linear(x, packed.exact_of(**arrays), activations=activations)
    allowed = tolerance(exact, x.dtype, roundings(k, packed.row(packed.given(**arrays)), activations))
    shifted = np.where(q < 31, q + 1, q - 1).astype(int)
    ql, qh = oracles.planes_of_row(shifted[0].tolist())
    wrong = {**arrays, "ql": torch.tensor(list(ql), dtype=torch.uint8).view(1, -1)}
    wrong["qh"] = torch.tensor(list(qh), dtype=torch.uint8).view(1, -1)
    errors = error_in_tolerances(packed.multiplied(x, **wrong, activations=activations), exact.y, allowed)
    assert (errors[:, 0] > 1)[np.repeat(s[0], 16) != 0].all()
    assert (
        accuracy.compare(
            packed.multiplied(x, **arrays, activations=activations),
            exact,
            roundings(k, packed.row(packed.given(**arrays)), activations),
        ).worst
        <= 1
    )


def one_output(y: float, magnitude: float, k: int = 256) -> Exact:
    return Exact(torch.tensor([y], dtype=torch.float64), torch.tensor([magnitude], dtype=torch.float64), k, k)


def test_tolerance_is_the_sum_of_its_parts() -> None:
    g = 11 * 2.0**-24 / (1 - 11 * 2.0**-24)
    for dtype, ulp in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10), (torch.float32, 2.0**-23)):
        assert float(tolerance(one_output(1, 2), dtype, 10)) == pytest.approx(2 * g + ulp / 2, rel=1e-12, abs=0)
    # Below a power of two the sum may land above it, where an ulp is twice as large.
    below = tolerance(one_output(2 - 2.0**-23, 2), torch.bfloat16, 10)
    assert float(below) == pytest.approx(2 * g + 2.0**-7, rel=1e-12, abs=0)
    # At zero and among subnormals: an ulp of the smallest, and fp32's underflow.
    assert float(tolerance(one_output(0, 0), torch.float16, 10)) == pytest.approx(2.0**-25, rel=1e-12, abs=0)
    tiny = float(tolerance(one_output(0, 0), torch.float32, 10))
    assert tiny == pytest.approx(2.0**-150 + 256 * 2.0**-149, rel=1e-12, abs=0)
    assert tolerance(one_output(1, 2.0**127), torch.float16).isposinf()
    assert tolerance(one_output(float("inf"), float("inf")), torch.float16).isposinf()
    # By default, any order: terms - 1 additions, two products, the bias and one to spare.
    assert tolerance(one_output(1, 1), torch.float16) == tolerance(one_output(1, 1), torch.float16, 259)


def test_what_may_overflow_before_it_is_scaled_may_be_anything() -> None:
    """With scales so small that outputs are ordinary, activations so large that sums are not; and the reverse."""
    x = torch.full((3, 256), 1.0, dtype=torch.bfloat16)
    x[1], x[2] = 2.0**110, 2.0**-110
    codes, ones = torch.full((2, 256), 15, dtype=torch.int8), torch.ones(2, 8, dtype=torch.float64)
    small = accuracy.Weight(codes, ones * 2.0**-100, ones * 2.0**-100)
    exact = accuracy.linear(x, small, activations="int8")
    assert (exact.magnitude < 2.0**40).all()
    assert tolerance(exact, x.dtype).isposinf().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    large = accuracy.Weight(codes, ones * 2.0**112, None)
    exact = accuracy.linear(x[2:], large, activations="int8")
    assert (exact.magnitude < 2.0**40).all()
    assert tolerance(exact, x.dtype).isposinf().all()
    assert tolerance(accuracy.linear(x[2:], large, activations="bf16"), x.dtype).isfinite().all()


def test_the_bound_on_fp32_sums_holds_and_is_nearly_reached() -> None:
    """Sequential sums of random terms, and the worst ones: each addition loses nearly half an ulp."""
    k = 1024
    rng = np.random.default_rng(0)
    worst = np.full(k, 2.0**-24 * (1 - 2.0**-10), dtype=np.float32)
    worst[0] = 1
    shares = []
    for terms in (worst, *(rng.normal(size=(50, k)).astype(np.float32))):
        total = np.float32(0)
        for term in terms:
            total += term
        exact = one_output(float(terms.sum(dtype=np.float64)), float(abs(terms).sum(dtype=np.float64)), k)
        shares.append(accuracy.compare(torch.tensor([total]), exact).worst)
    assert max(shares) <= 1
    assert shares[0] > 0.95


def test_what_is_not_finite_must_be_met_exactly() -> None:
    nan, inf = float("nan"), float("inf")
    #         right: NaN, inf, -inf, rounds past fp16's largest number; wrong: all the rest
    y = [nan, inf, -inf, 65530.0, -65519.9, nan, nan, 1.0, 1.0, inf, inf, 65500.0, 65530.0, inf]
    found = torch.tensor([nan, inf, -inf, inf, -inf, 1.0, inf, nan, inf, -inf, 1.0, inf, -inf, nan])
    exact = torch.tensor(y, dtype=torch.float64)
    allowed = tolerance(Exact(exact, exact.abs(), 256, 256), torch.float16, 10)
    errors = error_in_tolerances(found.half(), exact, allowed)
    assert errors[:5].tolist() == [0] * 5
    assert (errors[5:] > 1).all()
    anything = error_in_tolerances(found[:2].half(), torch.ones(2).double(), torch.full((2,), inf).double())
    assert anything.tolist() == [0, 0]


def test_a_comparison_names_the_first_wrong_output() -> None:
    y = torch.arange(6, dtype=torch.float64).view(2, 3)
    exact, output = Exact(y, y, 256, 16), y.bfloat16()
    assert accuracy.compare(output, exact) == accuracy.Comparison(0.0, 0, None)
    assert accuracy.compare(output[:0], exact[:0]) == accuracy.Comparison(0.0, 0, None)
    output[1, 1:] = torch.tensor([4.5, float("nan")])
    found = accuracy.compare(output, exact)
    assert (found.worst, found.wrong) == (float("inf"), 2)
    allowed = float(tolerance(exact, torch.bfloat16)[1, 1])
    assert found.first == accuracy.Wrong((1, 1), 4.5, 4.0, allowed)
    with pytest.raises(ValueError, match=r"expected outputs \(2, 3\), found \(2, 2\)"):
        accuracy.compare(output[:, :2], exact)
