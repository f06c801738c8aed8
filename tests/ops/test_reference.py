"""The reference operations against the formulas, written out again here from the format's text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import gguf
import libgguf
import numpy as np
import numpy.typing as npt
import pytest

import oracles
from gguf_builder import q6k_blocks

torch = pytest.importorskip("torch")

from q6k_kernels.ops import reference
from q6k_kernels.ops.accuracy import error_in_tolerances, linear_fp64, tolerance
from q6k_kernels.ops.reference import dequantize, linear, quantize_activations, roundings

F64 = npt.NDArray[np.float64]
Q6_K = gguf.GGMLQuantizationType.Q6_K
SHAPES = {"genuine": (5, 768), "heavy-tailed": (1, 512), "random": (7, 768), "extreme": (9, 256)}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@cache
def blocks(name: str) -> bytes:
    """The Q6_K rows of a shape in SHAPES."""
    n, k = SHAPES[name]
    rng = np.random.default_rng(11)
    if name == "genuine":
        return bytes(libgguf.quantize_rows((rng.normal(size=(n, k)) * 0.02).astype(np.float32), int(Q6_K)))
    if name == "heavy-tailed":
        return bytes(libgguf.quantize_rows((rng.standard_t(2, (n, k)) * 0.01).astype(np.float32), int(Q6_K)))
    if name == "random":
        return q6k_blocks(n * k // 256, seed=5)
    # Codes all -32, all 31 or random; sub-scales of every extreme; d zero, subnormal, normal, of both signs.
    rows = rng.integers(0, 256, (n, 210), dtype=np.uint8)
    rows[0:3, :192], rows[3:6, :192] = 0, 0xFF
    rows[:, 192:208] = [0x80, 0, 0x7F, 0xFF] * 4
    rows[0, 192:208] = 0x80
    steps = [-0.0, 5.96e-8, -5.96e-8, 6.09e-5, -6.1e-5, 0.015, -3e-6, 2e-7, 0.0]
    rows[:, 208:] = np.array(steps, dtype="<f2").view(np.uint8).reshape(n, 2)
    return rows.tobytes()


def planes(data: bytes, shape: tuple[int, int], scales: str) -> dict[str, torch.Tensor]:
    """Blocks as a bundle has them, by the per-element oracle."""
    dtypes = {"scale": torch.bfloat16 if scales == "bf16" else torch.int8, "steps": torch.float16}
    return {
        role: torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        .view(dtypes.get(role, torch.uint8))
        .view(shape[0], -1)
        for role, raw in oracles.bundle_arrays(data, scales).items()
    }


@cache
def parts(data: bytes, shape: tuple[int, int], scales: str) -> tuple[F64, F64]:
    """Blocks as weights -32..31 (N, K) and scales (N, K/16), element by element."""
    decoded = [oracles.q6k_block(data[at : at + 210]) for at in range(0, len(data), 210)]
    q = np.array([q for q, _ in decoded], dtype=np.float64).reshape(shape)
    s = np.array([s for _, s in decoded], dtype=np.float64).reshape(shape[0], -1)
    return q, bf16(s) if scales == "bf16" else s


def bf16(values: F64) -> F64:
    """Each value rounded to bf16, one by one."""
    bits = np.array([oracles.bf16(value) for value in values.ravel()], dtype=np.uint32) << 16
    return bits.view(np.float32).astype(np.float64).reshape(values.shape)


def rounded(values: F64, dtype: torch.dtype) -> F64:
    """Weights rounded to the dtype of the activations."""
    if dtype == torch.bfloat16:
        return bf16(values)
    return values.astype(np.float16).astype(np.float64) if dtype == torch.float16 else values


def quantised(x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Finite activations to 8 bits, group by group, value by value."""
    a, d_a = np.zeros(x.shape, dtype=np.int64), np.zeros((len(x), x.shape[1] // 32), dtype=np.float32)
    for row in range(x.shape[0]):
        for group in range(x.shape[1] // 32):
            values = x[row, 32 * group : 32 * group + 32]
            d_a[row, group] = step = max(abs(value) for value in values) / np.float32(127)
            for at, value in enumerate(values):
                if step:
                    # Python's round goes to even; the division is numpy's, in fp32.
                    a[row, 32 * group + at] = max(-127, min(127, round(float(value / step))))
    return a, d_a


def expected(x: torch.Tensor, q: F64, s: F64, activations: str) -> tuple[F64, F64]:
    """Output and sum of |terms|, by a loop over groups."""
    x32 = x.float().numpy()
    y, magnitude = np.zeros((len(x), len(q))), np.zeros((len(x), len(q)))
    a, d_a = quantised(x32) if activations == "int8" else (x32, x32)
    for group in range(q.shape[1] // 16):
        at = slice(16 * group, 16 * group + 16)
        if activations == "int8":
            term = (a[:, at] @ q[:, at].T) * s[:, group] * d_a[:, group // 2, None].astype(np.float64)
            y, magnitude = y + term, magnitude + abs(term)
        else:
            terms = x32[:, None, at].astype(np.float64) * rounded(q[:, at] * s[:, group, None], x.dtype)
            y, magnitude = y + terms.sum(-1), magnitude + abs(terms).sum(-1)
    return y, magnitude


def inputs(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Activations with a row of zeros, a group of zeros, and outliers, as models have them."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(3))
    x[-1, :32] = 0
    x[0, 5::97] *= 60
    if m > 2:
        x[1] = 0
    return x.to(dtype)


def assert_within(y: torch.Tensor, exact: F64, magnitude: F64, k: int, activations: Any) -> None:
    allowed = tolerance(exact, magnitude, k, y.dtype, roundings(k, activations))
    errors = error_in_tolerances(y, exact, allowed)
    assert errors.shape == y.shape
    assert errors.max(initial=0) <= 1, f"{np.argwhere(errors > 1)[0]}: {y.numpy(force=True)} != {exact}"


@pytest.mark.parametrize("name", SHAPES)
def test_exact_planes_dequantize_to_ggmls_bits(name: str) -> None:
    n, k = SHAPES[name]
    theirs = gguf.quants.dequantize(np.frombuffer(blocks(name), dtype=np.uint8).reshape(n, -1), Q6_K)
    ours = dequantize(**planes(blocks(name), (n, k), "exact"))
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.numpy().view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("name", SHAPES)
def test_dequantize_rounds_once(name: str, scales: str, dtype: torch.dtype) -> None:
    q, s = parts(blocks(name), SHAPES[name], scales)
    weights = dequantize(**planes(blocks(name), SHAPES[name], scales), dtype=dtype)
    assert weights.dtype == dtype
    np.testing.assert_array_equal(weights.double().numpy(), rounded(q * np.repeat(s, 16, axis=1), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_quantize_as_the_formula_says(dtype: torch.dtype) -> None:
    x = inputs(17, 768, dtype)
    x[2] = torch.arange(768) % 254 - 127.0  # every code, exactly
    x[3] = x[2] / 2  # ties, in part
    x[4] *= 1e-4
    if dtype != torch.float16:
        x[5] *= 1e30
        x[6] *= 1e-38
    if dtype == torch.float32:  # where d_a is a coarse subnormal, or zero
        x[7] *= 1e-42
        x[8] *= 3e-44
        x[9] = 1.4e-45
    a, d_a = quantize_activations(x)
    assert (a.dtype, d_a.dtype) == (torch.int8, torch.float32)
    codes, steps = quantised(x.float().numpy())
    np.testing.assert_array_equal(d_a.numpy(), steps)
    np.testing.assert_array_equal(a.numpy(), codes)
    assert (a.min(), a.max()) == (-127, 127)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_poisons_its_row_alone(bad: float) -> None:
    x = inputs(3, 256, torch.bfloat16)
    x[1, 40] = bad
    a, d_a = quantize_activations(x)
    clean_a, clean_d = quantize_activations(torch.where(x.isfinite(), x, 0))
    assert torch.nonzero(d_a.isnan()).tolist() == [[1, 1]]
    assert not a[1, 32:64].any()
    keep = ~d_a.isnan()
    assert torch.equal(d_a[keep], clean_d[keep])
    assert torch.equal(a[keep.repeat_interleave(32, 1)], clean_a[keep.repeat_interleave(32, 1)])
    arrays = planes(blocks("extreme"), SHAPES["extreme"], "bf16")  # rows of zeros too
    y = linear(x, **arrays, activations="int8")
    assert y.isnan().all(1).tolist() == [False, True, False]
    for activations in ("int8", "bf16"):
        y = linear(x, **arrays, activations=activations)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()
        assert_within(y, *linear_fp64(x, **arrays, activations=activations), 256, activations)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_the_formula(
    name: str, scales: str, activations: Literal["int8", "bf16"], dtype: torch.dtype
) -> None:
    n, k = SHAPES[name]
    arrays = planes(blocks(name), (n, k), scales)
    x = inputs(17, k, dtype)
    exact, magnitude = expected(x, *parts(blocks(name), (n, k), scales), activations)
    stated, stated_magnitude = linear_fp64(x, **arrays, activations=activations)
    np.testing.assert_array_less(abs(stated - exact), k * 2.0**-52 * magnitude + 1e-300)
    np.testing.assert_allclose(stated_magnitude, magnitude, rtol=1e-12)
    bias = torch.linspace(-1, 1, n).to(dtype)
    for m in (1, 2, 17):
        y = linear(x[:m], **arrays, activations=activations)
        assert (y.shape, y.dtype) == ((m, n), dtype)
        assert_within(y, exact[:m], magnitude[:m], k, activations)
        y = linear(x[:m], **arrays, bias=bias, activations=activations)
        b = bias.double().numpy()
        assert_within(y, exact[:m] + b, magnitude[:m] + abs(b), k, activations)
    stated, stated_magnitude = linear_fp64(x, **arrays, bias=bias, activations=activations)
    np.testing.assert_allclose(stated_magnitude, magnitude + abs(b), rtol=1e-12)
    np.testing.assert_array_less(abs(stated - exact - b), k * 2.0**-52 * stated_magnitude + 1e-300)


def test_activations_of_8_bits_cost_less_than_a_hundredth() -> None:
    arrays = planes(blocks("genuine"), SHAPES["genuine"], "exact")
    x = torch.randn(17, 768, generator=torch.Generator().manual_seed(3))
    full, _ = linear_fp64(x, **arrays, activations="bf16")
    coarse = linear(x, **arrays, activations="int8").double().numpy()
    assert 1e-4 < np.linalg.norm(coarse - full) / np.linalg.norm(full) < 1e-2


def test_auto_is_the_16_bit_formula() -> None:
    arrays = planes(blocks("random"), SHAPES["random"], "bf16")
    x = inputs(2, 768, torch.bfloat16)
    assert torch.equal(linear(x, **arrays), linear(x, **arrays, activations="bf16"))
    assert not torch.equal(linear(x, **arrays), linear(x, **arrays, activations="int8"))


@pytest.mark.parametrize("activations", ["int8", "bf16"])
def test_shapes_and_strides_of_x(activations: Literal["int8", "bf16"]) -> None:
    n, k = SHAPES["random"]
    arrays = planes(blocks("random"), (n, k), "exact")
    x = inputs(12, k, torch.bfloat16)
    y = linear(x, **arrays, activations=activations)
    assert torch.equal(linear(x, **arrays, activations=activations), y)
    assert torch.equal(linear(x.view(2, 2, 3, k), **arrays, activations=activations).view(12, n), y)
    wide = torch.empty(12, 2 * k, dtype=x.dtype)[:, ::2].copy_(x)
    assert torch.equal(linear(wide, **arrays, activations=activations), y)
    assert torch.equal(linear(x.T.contiguous().T, **arrays, activations=activations), y)
    assert_within(
        linear(x[4], **arrays, activations=activations),
        *linear_fp64(x[4], **arrays, activations=activations), k, activations,
    )  # fmt: skip
    for lead in ((0,), (0, 3), (3, 0)):
        nothing = linear(x.new_empty(*lead, k), **arrays, activations=activations)
        assert (nothing.shape, nothing.dtype) == ((*lead, n), x.dtype)
        assert linear_fp64(x.new_empty(*lead, k), **arrays, activations=activations)[0].shape == (*lead, n)


@pytest.mark.parametrize("activations", ["int8", "bf16"])
def test_blocks_of_rows_join_up(activations: Literal["int8", "bf16"], monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = SHAPES["random"]
    arrays = planes(blocks("random"), (n, k), "bf16")
    x, bias = inputs(17, k, torch.bfloat16), torch.linspace(-1, 1, n)
    stated = linear_fp64(x, **arrays, bias=bias, activations=activations)
    for weights, m in ((1, 5), (2 * k, 17), (3 * k + 1, 1)):
        monkeypatch.setattr(reference, "BLOCK_WEIGHTS", weights)
        monkeypatch.setattr(reference, "BLOCK_M", m)
        assert_within(linear(x, **arrays, bias=bias, activations=activations), *stated, k, activations)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memory_stays_bounded(dtype: torch.dtype) -> None:
    n, k = 1536, 5376  # 8 million weights: unpacked all at once they would take 100 MB and more

    def memory(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) << 10

    arrays = {
        "ql": torch.zeros(n, k // 2, dtype=torch.uint8),
        "qh": torch.zeros(n, k // 4, dtype=torch.uint8),
        "scale": torch.ones(n, k // 16, dtype=torch.bfloat16),
    }
    x = torch.ones(1, k, dtype=dtype)
    for activations in ("int8", "bf16"):
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        linear(x, **arrays, activations=activations)
        assert memory("VmHWM") - before < 64 << 20


@pytest.fixture
def _coarse_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_coarse_products")
@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_matmul_precision_changes_nothing(activations: Literal["int8", "bf16"], dtype: torch.dtype) -> None:
    """Where the processor multiplies bf16, "medium" cuts fp32 operands to it."""
    rng = np.random.default_rng(0)
    data = q6k_blocks(64 * 2, seed=9)
    x = torch.from_numpy(rng.normal(size=(64, 512))).to(dtype)
    arrays = planes(data, (64, 512), "exact")
    y = linear(x, **arrays, activations=activations)
    assert_within(y, *linear_fp64(x, **arrays, activations=activations), 512, activations)


# The check itself: it must fail on what is wrong, and its bound must be right.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["int8", "bf16"])
def test_a_wrong_output_is_outside_the_tolerance(activations: Literal["int8", "bf16"], dtype: torch.dtype) -> None:
    n, k = SHAPES["genuine"]
    arrays = planes(blocks("genuine"), (n, k), "bf16")
    x = inputs(2, k, dtype)
    y = linear(x, **arrays, activations=activations)
    exact, magnitude = linear_fp64(x, **arrays, activations=activations)
    allowed = tolerance(exact, magnitude, k, dtype, roundings(k, activations))
    # Two ulps and more, wherever terms do not cancel so far that the fp32 sums are not known that well.
    info = torch.finfo(dtype)
    sharp = allowed < info.eps * np.exp2(np.floor(np.log2(abs(exact))))
    assert sharp.mean() >= 0.5
    errors = error_in_tolerances(y * (1 + 2 * info.eps), exact, allowed)
    assert (errors[sharp] > 1).all()
    for wrong in (
        -y, y.roll(1, 0), y.roll(1, 1), torch.zeros_like(y),
        torch.full_like(y, float("nan")), torch.full_like(y, float("inf")),
    ):  # fmt: skip
        assert (error_in_tolerances(wrong, exact, allowed) > 1).all()


@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("activations", ["int8", "bf16"])
def test_one_code_off_by_one_is_outside_the_tolerance(activations: Literal["int8", "bf16"], scales: str) -> None:
    """Every weight of a row in turn, seen by a row of x that looks at its group of 16 alone."""
    n, k = 1, 512
    arrays = planes(blocks("heavy-tailed"), (n, k), scales)
    q, s = parts(blocks("heavy-tailed"), (n, k), scales)
    x = torch.zeros(k, k, dtype=torch.bfloat16)
    x[range(k), range(k)] = 1.25
    exact, magnitude = linear_fp64(x, **arrays, activations=activations)
    allowed = tolerance(exact, magnitude, k, x.dtype, roundings(k, activations))
    shifted = np.where(q < 31, q + 1, q - 1).astype(int)
    ql, qh = oracles.planes_of_row(shifted[0].tolist())
    wrong = {**arrays, "ql": torch.tensor(list(ql), dtype=torch.uint8).view(1, -1)}
    wrong["qh"] = torch.tensor(list(qh), dtype=torch.uint8).view(1, -1)
    errors = error_in_tolerances(linear(x, **wrong, activations=activations), exact, allowed)
    assert (errors[:, 0] > 1)[np.repeat(s[0], 16) != 0].all()
    assert (error_in_tolerances(linear(x, **arrays, activations=activations), exact, allowed) <= 1).all()


def test_tolerance_is_the_sum_of_its_parts() -> None:
    one = np.ones(1)
    g = 11 * 2.0**-24 / (1 - 11 * 2.0**-24)
    for dtype, ulp in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10), (torch.float32, 2.0**-23)):
        np.testing.assert_allclose(tolerance(one, 2 * one, 256, dtype, 10), 2 * g + ulp / 2, rtol=1e-12)
    # Below a power of two the sum may land above it, where an ulp is twice as large.
    below = tolerance(np.array([2 - 2.0**-23]), 2 * one, 256, torch.bfloat16, 10)
    np.testing.assert_allclose(below, 2 * g + 2.0**-7, rtol=1e-12)
    # At zero and among subnormals: an ulp of the smallest, and fp32's underflow.
    tiny = tolerance(0 * one, 0 * one, 256, torch.float16, 10)
    np.testing.assert_allclose(tiny, 2.0**-25, rtol=1e-12)
    tiny = tolerance(0 * one, 0 * one, 256, torch.float32, 10)
    np.testing.assert_allclose(tiny, 2.0**-150 + 256 * 2.0**-149, rtol=1e-12)
    assert tolerance(one, 2.0**127 * one, 256, torch.float16)[0] == np.inf
    assert tolerance(one, one, 256, torch.float16)[0] > tolerance(one, one, 256, torch.float16, 10)[0]


def test_the_bound_on_fp32_sums_holds_and_is_nearly_reached() -> None:
    """Sequential sums of random terms, and the worst ones: each addition loses nearly half an ulp."""
    k = 1024
    rng = np.random.default_rng(0)
    worst = np.full(k, 2.0**-24 * (1 - 2.0**-10), dtype=np.float32)
    worst[0] = 1
    cases = [worst, *(rng.normal(size=(50, k)).astype(np.float32))]
    shares = []
    for terms in cases:
        total = np.float32(0)
        for term in terms:
            total += term
        exact, magnitude = np.array([terms.sum(dtype=np.float64)]), np.array([abs(terms).sum(dtype=np.float64)])
        allowed = tolerance(exact, magnitude, k, torch.float32)
        shares.append(float(error_in_tolerances(torch.tensor([total]), exact, allowed)[0]))
    assert max(shares) <= 1
    assert shares[0] > 0.95


def test_what_is_not_finite_must_be_met_exactly() -> None:
    nan, inf = float("nan"), float("inf")
    #         right: NaN, inf, -inf, rounds past fp16's largest number; wrong: all the rest
    exact = np.array([nan, inf, -inf, 65530.0, -65519.9, nan, nan, 1.0, 1.0, inf, inf, 65500.0, 65530.0, inf])
    found = torch.tensor([nan, inf, -inf, inf, -inf, 1.0, inf, nan, inf, -inf, 1.0, inf, -inf, nan])
    allowed = tolerance(exact, np.abs(exact), 256, torch.float16, 10)
    errors = error_in_tolerances(found.half(), exact, allowed)
    assert errors[:5].tolist() == [0] * 5
    assert (errors[5:] > 1).all()
    anything = error_in_tolerances(found[:2].half(), np.ones(2), np.full(2, np.inf))
    assert anything.tolist() == [0, 0]


def test_weights_past_the_range_of_fp16_become_infinite() -> None:
    block = bytearray(q6k_blocks(1, seed=1))
    block[208:] = np.array([60000], dtype="<f2").tobytes()
    arrays = planes(bytes(block), (1, 256), "exact")
    x = torch.zeros(2, 256, dtype=torch.float16)
    x[0, torch.nonzero(dequantize(**arrays, dtype=torch.float16)[0].isinf())[0]] = 1
    y = linear(x, **arrays, activations="bf16")
    assert not y.isfinite().any()
    assert_within(y, *linear_fp64(x, **arrays, activations="bf16"), 256, "bf16")


GOOD = {
    "x": torch.zeros(2, 512, dtype=torch.bfloat16),
    "ql": torch.zeros(3, 256, dtype=torch.uint8),
    "qh": torch.zeros(3, 128, dtype=torch.uint8),
    "scale": torch.zeros(3, 32, dtype=torch.bfloat16),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 256)}, r"x: expected .*\(\.\.\., 512\), found float32 \(2, 256\)"),
        ({"x": torch.zeros(2, 512, dtype=torch.float64)}, r"found float64 \(2, 512\)"),
        ({"x": torch.tensor(1.0)}, r"found float32 \(\)"),
        ({"ql": GOOD["ql"].to(torch.int8)}, r"ql: expected uint8 \(N, K/2\).* 256, found int8 \(3, 256\)"),
        ({"ql": torch.zeros(3, 64, dtype=torch.uint8)}, r"found uint8 \(3, 64\)"),
        ({"ql": torch.zeros(0, 256, dtype=torch.uint8)}, r"N >= 1.*found uint8 \(0, 256\)"),
        ({"ql": GOOD["ql"][None]}, r"found uint8 \(1, 3, 256\)"),
        ({"qh": GOOD["ql"]}, r"qh: with ql of shape \(3, 256\) expected uint8 \(3, 128\), found uint8 \(3, 256\)"),
        ({"scale": GOOD["scale"].half()}, r"scale without steps: .*bfloat16 \(3, 32\), found float16 \(3, 32\)"),
        ({"steps": torch.zeros(3, 2).half()}, r"scale with steps: .*int8 \(3, 32\), found bfloat16"),
        (
            {"scale": torch.zeros(3, 32, dtype=torch.int8), "steps": torch.zeros(2, 2).half()},
            r"steps: .*expected float16 \(3, 2\), found float16 \(2, 2\)",
        ),
        ({"bias": torch.zeros(2)}, r"bias: expected .*\(3,\), found float32 \(2,\)"),
        ({"bias": torch.zeros(3, dtype=torch.int32)}, r"found int32 \(3,\)"),
        ({"activations": "fp8"}, "activations: expected auto, int8 or bf16, found 'fp8'"),
        ({"x": torch.zeros(2, 512, device="meta")}, "on one device, found them on cpu, meta"),
    ],
)
def test_linear_says_what_it_refuses(change: dict[str, Any], message: str) -> None:
    assert not linear(**GOOD).any()
    with pytest.raises(ValueError, match=message):
        linear(**(GOOD | change))


def test_the_others_say_what_they_refuse() -> None:
    arrays = {role: GOOD[role] for role in ("ql", "qh", "scale")}
    with pytest.raises(ValueError, match="dtype: expected bfloat16, float16 or float32, found torch.float64"):
        dequantize(**arrays, dtype=torch.float64)
    for x in (torch.zeros(2, 33), torch.zeros(32), torch.zeros(2, 32, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"\(M, K\) with K a multiple of 32, found"):
            quantize_activations(x)
