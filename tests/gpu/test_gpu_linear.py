"""`q6k::linear` on a GPU at the sizes of real models, and at all numbers of rows, within the tolerance of fp64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

torch = pytest.importorskip("torch")

import fp64
from gpu_weights import CORE, EVERY, bias_of, inputs, linear, weight, width
from q6k_kernels.cuda import decode_plan, dispatch

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LLAMA_3_8B = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)]
GEMMA_3_27B = [(21504, 5376), (5376, 21504), (4096, 5376), (2048, 5376), (5376, 4096), (262144, 5376)]
QWEN_3_8B = [(12288, 4096), (4096, 12288), (151936, 4096)]
SHAPES = [*LLAMA_3_8B, *GEMMA_3_27B, *QWEN_3_8B]
SMALL = [(1, 256), (1, 21504), (16, 256), (17, 768), (1001, 256), (1001, 2560), (33, 5376), (15, 21504)]
HUGE_N = 100_000
MS = {"int8": (1, 3, 8, 16, 33), "bf16": (1, 3, 8, 16, 33, 128)}
LARGE_MS = (512, 2048)
ALL_MS = [*range(18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 512, 2048]
THRESHOLDS = sorted({dispatch.DECODE_M, decode_plan.MOST_TOKENS, 16, 32, 64, 128, dispatch.PREFILL_M})
CASES = [
    *(
        (n, k, format, dtype)
        for (n, k), format, dtype in itertools.product([*SMALL, *SHAPES], (CORE[0], CORE[2]), (BF16, FP16))
        if n < HUGE_N or dtype == BF16
    ),
    *((n, k, format, BF16) for (n, k), format in itertools.product(SHAPES[:2], EVERY)),
]


def check(n: int, k: int, format: str, dtype: torch.dtype, formula: str, ms: Sequence[int]) -> None:
    """The first rows of the same x, for every M, with and without a bias."""
    w = weight("genuine", n, k, format)
    x = inputs(max(ms), k, dtype)
    exact = fp64.linear(x, w, formula)
    biases = itertools.cycle([bias_of(n, kind) for kind in (BF16, FP16, FP32)])
    for m, bias in zip(ms, biases, strict=False):
        what = f"{n}x{k} M={m} {formula} {dtype} {format}"
        y = linear(x[:m], w, None, formula)
        assert y.dtype == dtype
        fp64.assert_right(y, exact[:m], what)
        y = linear(x[:m], w, bias, formula)
        fp64.assert_right(y, exact[:m].plus(bias), f"{what} with a bias of {bias.dtype}")


@pytest.mark.parametrize(("n", "k", "format", "dtype"), CASES)
def test_shapes_of_models(n: int, k: int, format: str, dtype: torch.dtype) -> None:
    check(n, k, format, dtype, "int8", MS["int8"])
    check(n, k, format, dtype, "bf16", MS["bf16"] if n >= HUGE_N else (*MS["bf16"], *LARGE_MS))


@pytest.mark.parametrize("formula", ["int8", "bf16"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("n", "k", "format"),
    [
        *((17, width(768, format), format) for format in EVERY),
        *((n, k, format) for (n, k), format in itertools.product([(1001, 2560), (4096, 4096)], CORE[:3])),
    ],
)
def test_every_number_of_rows(n: int, k: int, format: str, dtype: torch.dtype, formula: str) -> None:
    check(n, k, format, dtype, formula, ALL_MS)


@pytest.mark.parametrize("format", CORE)
@pytest.mark.parametrize(("n", "k"), [(17, 768), (4096, 4096), (5376, 21504)])
def test_auto_is_int8_for_few_rows_and_16_bits_for_more(n: int, k: int, format: str) -> None:
    w, x = weight("genuine", n, k, format), inputs(2048, k, BF16)
    for m in (1, dispatch.DECODE_M, dispatch.DECODE_M + 1, 128, 2048):
        formula = "int8" if m <= dispatch.DECODE_M else "bf16"
        fp64.assert_same_bits(linear(x[:m], w), linear(x[:m], w, None, formula), f"M={m}")


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(("n", "k"), [(1001, 2560), (4096, 4096)])
def test_both_sides_of_a_threshold_agree(n: int, k: int, threshold: int) -> None:
    """As the operation chooses: near the product of activations that nobody rounded, and near each other.

    1% holds for normal activations; an outlier makes its whole group of 32 coarser.
    """
    w, x = weight("genuine", n, k, "q6_k"), torch.randn(threshold + 1, k, device="cuda").to(BF16)
    full = fp64.linear(x, w, "bf16").y
    sides = [linear(x[:m], w)[:threshold].double() for m in (threshold, threshold + 1)]
    for y in sides:
        assert (y - full[:threshold]).norm() < 0.01 * full[:threshold].norm()
    assert (sides[0] - sides[1]).norm() < 0.01 * full[:threshold].norm()
    for formula in ("int8", "bf16"):
        exact = fp64.linear(x, w, formula)
        for m in (threshold, threshold + 1):
            fp64.assert_right(linear(x[:m], w, None, formula), exact[:m], f"M={m} {formula}")


@pytest.mark.parametrize("format", EVERY)
def test_activations_of_8_bits_cost_less_than_a_hundredth(format: str) -> None:
    w, x = weight("genuine", 4096, 4096, format), inputs(8, 4096, BF16)
    x = torch.randn_like(x)
    full = fp64.linear(x, w, "bf16").y
    coarse = linear(x, w, None, "int8").double()
    assert 1e-4 < (coarse - full).norm() / full.norm() < 1e-2
