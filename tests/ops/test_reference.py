"""The reference operations against the formulas: `accuracy` for products, the per-element oracles for the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest

import oracles
import packed
from gguf_builder import q6k_blocks

torch = pytest.importorskip("torch")

from packed import dequantized as dequantize
from packed import multiplied as linear
from packed import planes_of
from q6k_cases import Q6_K, SHAPES, blocks, inputs, name_of, parts, planes
from q6k_kernels.ops import accuracy, reference
from q6k_kernels.ops.reference import quantize_activations, roundings

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_right(
    y: torch.Tensor,
    x: torch.Tensor,
    arrays: dict[str, torch.Tensor],
    bias: torch.Tensor | None = None,
    *,
    activations: Literal["int8", "bf16"],
) -> None:
    """Within the tolerance of the reference's order of summation."""
    exact = accuracy.linear(x, packed.exact_of(**arrays), bias, activations=activations)
    found = accuracy.compare(y, exact, roundings(x.shape[-1], packed.row(packed.given(**arrays)), activations))
    assert found.first is None, found


@pytest.mark.parametrize("name", SHAPES)
def test_exact_planes_dequantize_to_ggmls_bits(name: str) -> None:
    n, _ = SHAPES[name]
    theirs = gguf.quants.dequantize(np.frombuffer(blocks(name), dtype=np.uint8).reshape(n, -1), Q6_K)
    ours = dequantize(**planes(name, "exact"))
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours.numpy().view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("name", SHAPES)
def test_dequantize_rounds_once(name: str, scales: str, dtype: torch.dtype) -> None:
    q, s = parts(name, scales)
    weights = dequantize(**planes(name, scales), dtype=dtype)
    assert weights.dtype == dtype
    np.testing.assert_array_equal(
        weights.double().numpy(), oracles.rounded(oracles.weights(q, s, None), name_of(dtype))
    )


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
    codes, steps = oracles.quantised(x.float().numpy())
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
    arrays = planes("extreme", "bf16")  # rows of zeros too
    y = linear(x, **arrays, activations="int8")
    assert y.isnan().all(1).tolist() == [False, True, False]
    for activations in ("int8", "bf16"):
        y = linear(x, **arrays, activations=activations)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()
        assert_right(y, x, arrays, activations=activations)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_the_formula(
    name: str, scales: str, activations: Literal["int8", "bf16"], dtype: torch.dtype
) -> None:
    n, k = SHAPES[name]
    arrays = planes(name, scales)
    x = inputs(17, k, dtype)
    bias = torch.linspace(-1, 1, n).to(dtype)
    for m in (1, 2, 17):
        for b in (None, bias):
            y = linear(x[:m], **arrays, bias=b, activations=activations)
            assert (y.shape, y.dtype) == ((m, n), dtype)
            assert_right(y, x[:m], arrays, b, activations=activations)


def test_activations_of_8_bits_cost_less_than_a_hundredth() -> None:
    arrays = planes("genuine", "exact")
    x = torch.randn(17, 768, generator=torch.Generator().manual_seed(3))
    full = accuracy.linear(x, packed.exact_of(**arrays), activations="bf16").y
    coarse = linear(x, **arrays, activations="int8").double()
    assert 1e-4 < (coarse - full).norm() / full.norm() < 1e-2


def test_auto_is_the_16_bit_formula() -> None:
    arrays = planes("random", "bf16")
    x = inputs(2, 768, torch.bfloat16)
    assert torch.equal(linear(x, **arrays), linear(x, **arrays, activations="bf16"))
    assert not torch.equal(linear(x, **arrays), linear(x, **arrays, activations="int8"))


@pytest.mark.parametrize("activations", ["int8", "bf16"])
def test_shapes_and_strides_of_x(activations: Literal["int8", "bf16"]) -> None:
    n, k = SHAPES["random"]
    arrays = planes("random", "exact")
    x = inputs(12, k, torch.bfloat16)
    y = linear(x, **arrays, activations=activations)
    assert torch.equal(linear(x, **arrays, activations=activations), y)
    assert torch.equal(linear(x.view(2, 2, 3, k), **arrays, activations=activations).view(12, n), y)
    wide = torch.empty(12, 2 * k, dtype=x.dtype)[:, ::2].copy_(x)
    assert torch.equal(linear(wide, **arrays, activations=activations), y)
    assert torch.equal(linear(x.T.contiguous().T, **arrays, activations=activations), y)
    assert_right(linear(x[4], **arrays, activations=activations), x[4], arrays, activations=activations)
    for lead in ((0,), (0, 3), (3, 0)):
        nothing = linear(x.new_empty(*lead, k), **arrays, activations=activations)
        assert (nothing.shape, nothing.dtype) == ((*lead, n), x.dtype)


@pytest.mark.parametrize("activations", ["int8", "bf16"])
def test_blocks_of_rows_join_up(activations: Literal["int8", "bf16"], monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = SHAPES["random"]
    arrays = planes("random", "bf16")
    x, bias = inputs(17, k, torch.bfloat16), torch.linspace(-1, 1, n)
    for weights, m in ((1, 5), (2 * k, 17), (3 * k + 1, 1)):
        monkeypatch.setattr(reference, "BLOCK_WEIGHTS", weights)
        monkeypatch.setattr(reference, "BLOCK_M", m)
        y = linear(x, **arrays, bias=bias, activations=activations)
        assert_right(y, x, arrays, bias, activations=activations)


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
    arrays = planes_of(data, (64, 512), "exact")
    y = linear(x, **arrays, activations=activations)
    assert_right(y, x, arrays, activations=activations)


def test_weights_past_the_range_of_fp16_become_infinite() -> None:
    block = bytearray(q6k_blocks(1, seed=1))
    block[208:] = np.array([60000], dtype="<f2").tobytes()
    arrays = planes_of(bytes(block), (1, 256), "exact")
    x = torch.zeros(2, 256, dtype=torch.float16)
    x[0, torch.nonzero(dequantize(**arrays, dtype=torch.float16)[0].isinf())[0]] = 1
    y = linear(x, **arrays, activations="bf16")
    assert not y.isfinite().any()
    assert_right(y, x, arrays, activations="bf16")


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
        (
            {"qh": GOOD["ql"]},
            r"qh of q6_k: with ql of shape \(3, 256\) expected uint8 \(3, 128\), found uint8 \(3, 256\)",
        ),
        ({"scale": GOOD["scale"].half()}, r"scale of q6_k: .*bfloat16 \(3, 32\), found float16 \(3, 32\)"),
        ({"steps": torch.zeros(3, 2).half()}, r"scale of q6_k_exact: .*int8 \(3, 32\), found bfloat16"),
        (
            {"scale": torch.zeros(3, 32, dtype=torch.int8), "steps": torch.zeros(2, 2).half()},
            r"steps of q6_k_exact: .*expected float16 \(3, 2\), found float16 \(2, 2\)",
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
