"""Every kernel and every way of launching it, forced, on small sizes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import fp64
from gpu_weights import (
    CORE,
    DEVICE,
    EVERY,
    bias_of,
    inputs,
    linear,
    poisoned_call,
    random_source,
    weight,
    width,
)
from q6k_kernels.cuda import decode, decode_plan, expand, gemm_mma, gemm_wgmma
from q6k_kernels.cuda import device as launching
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.checks import FLOATS
from q6k_kernels.ops import reference

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
FULL = (CORE[0], CORE[2])
"""Weight types with all kinds of activations; others have one of them, to compile less."""


def dtypes_of(format: str, turn: int) -> tuple[torch.dtype, ...]:
    """Return the dtypes of activations to test: both, or one that changes with the weight type and `turn`."""
    return (BF16, FP16) if format in FULL else ((BF16, FP16)[(EVERY.index(format) + turn) % 2],)


def this_gpu() -> launching.Device:
    return launching.device(torch.cuda.current_device())


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("tokens", decode_plan.TOKENS)
def test_decode_with_every_split(tokens: int, format: str) -> None:
    """Every shape of a block, activations quantised by it or before it, clusters of 1 to 8, rows that end within a
    tile, fewer tokens than there is room."""
    device, n, k, turn = this_gpu(), 133, width(2304, format), decode_plan.TOKENS.index(tokens)
    w, bias = weight("random", n, k, format), bias_of(n, BF16)
    quantised = (False, True) if tokens <= decode_plan.FUSED_TOKENS else (False,)
    if format not in FULL and len(quantised) > 1:
        quantised = (bool((EVERY.index(format) // 2 + turn) % 2),)
    clusters = [cluster for cluster in decode_plan.CLUSTERS if cluster == 1 or device.arch >= 90]
    met = set()
    for dtype in dtypes_of(format, turn):
        x = inputs(tokens, k, dtype)
        exact = fp64.linear(x, w, "int8").plus(bias)
        kinds = itertools.product(decode_plan.SHAPES, quantised, clusters, {tokens, tokens // 2 + 1})
        for shape, fused, cluster, m in kinds:
            choice = decode_plan.Choice.of(shape, fused, early=m == tokens)
            plan = decode_plan.plan(m, n, k, w.row, device, (cluster, choice))
            if plan is None:  # takes more shared memory than this GPU has
                continue
            met.add((fused, cluster))
            y = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
            decode._launch(plan, x[:m], w.tiles, bias, n, w.row, y, device)
            fp64.assert_right(y, exact[:m], f"{plan} M={m} {dtype}")
    assert met == set(itertools.product(quantised, clusters))


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("config", gemm_wgmma.CONFIGS, ids=str)
def test_gemm_wgmma_with_every_configuration(
    config: gemm_wgmma.Config, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and partial blocks of tokens and rows; outputs computed whole, in several rounds, and shared."""
    device = this_gpu()
    if device.arch != gemm_wgmma.ARCH:
        pytest.skip(f"wgmma is of compute capability 9.0, this GPU has {device.arch / 10}")
    monkeypatch.setattr(gemm_wgmma, "_scratch", poisoned)
    n, k, most = 2 * config.rows + 21, width(1280, format), config.tokens + 3
    w, bias = weight("random", n, k, format), bias_of(n, torch.float32)
    for dtype in (BF16, FP16):
        x = inputs(most, k, dtype)
        exact = fp64.linear(x, w, "bf16").plus(bias)
        for m in (1, config.tokens, most):
            # Three or six outputs of five super-blocks.
            for blocks, share in ((1, False), (2, False), (2, True), (4, True), (15, True), (30, True)):
                few = replace(device, multiprocessors=blocks)
                plan = gemm_wgmma.plan_of(config, 1, share, m, n, k, few)
                y = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
                gemm_wgmma.linear(x[:m], w.tiles, bias, n, w.row, y, device, plan)
                fp64.assert_right(y, exact[:m], f"M={m} {plan} {dtype}")


def test_gemm_wgmma_with_less_to_share_than_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six outputs of two super-blocks, by five blocks that share the sixth."""
    device, config = this_gpu(), gemm_wgmma.CONFIGS[0]
    if device.arch != gemm_wgmma.ARCH:
        pytest.skip(f"wgmma is of compute capability 9.0, this GPU has {device.arch / 10}")
    monkeypatch.setattr(gemm_wgmma, "_scratch", poisoned)
    m, n, k = config.tokens + 3, 2 * config.rows + 21, 512
    w, x = weight("random", n, k, "q6_k"), inputs(m, k, BF16)
    plan = gemm_wgmma.plan_of(config, 1, True, m, n, k, replace(device, multiprocessors=5))
    assert (plan.blocks, plan.whole, plan.shared) == (5, 5, 1)
    y = torch.full((m, n), float("nan"), dtype=BF16, device=DEVICE)
    gemm_wgmma.linear(x, w.tiles, None, n, w.row, y, device, plan)
    fp64.assert_right(y, fp64.linear(x, w, "bf16"), str(plan))


def poisoned(launch: gemm_wgmma.WgmmaPlan, device: torch.device) -> torch.Tensor:
    """Scratch memory in which every sum is NaN."""
    scratch = torch.empty(4 * launch.scratch_floats + 8 * launch.scratch_flags, dtype=torch.uint8, device=device)
    return scratch.fill_(0xFF)


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("config", gemm_mma.CONFIGS, ids=str)
def test_gemm_mma_with_every_configuration(
    config: tuple[int, int], format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every GPU, also those on which the operation has something better."""
    device, n, k, most = this_gpu(), 150, width(1280, format), config[0] + 3
    w, bias = weight("random", n, k, format), bias_of(n, torch.float32)
    for dtype in dtypes_of(format, gemm_mma.CONFIGS.index(config)):
        x = inputs(most, k, dtype)
        exact = fp64.linear(x, w, "bf16").plus(bias)
        for splits in (1, 2, 5):
            for m in (1, config[0], most):
                plan = gemm_mma._plan(config, splits, m, n, w.row, device)
                monkeypatch.setattr(gemm_mma, "plan", lambda *_, plan=plan: plan)
                y = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
                poisoned_call(gemm_mma.linear, x[:m], w.tiles, bias, n, w.row, y)
                fp64.assert_right(y, exact[:m], f"M={m}, {splits} splits, {dtype}")


@pytest.mark.parametrize("format", EVERY)
def test_expanding_slices_for_cublas(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every GPU; in one slice and in several, the last a part of a tile."""
    n, k, m = 133, width(768, format), 40
    w, bias = weight("random", n, k, format), bias_of(n, BF16)
    for scratch in (expand.SCRATCH_BYTES, 1 << 17, 1):
        monkeypatch.setattr(expand, "SCRATCH_BYTES", scratch)
        for dtype in (BF16, FP16):
            x = inputs(m, k, dtype)
            y = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
            poisoned_call(expand.linear, x, w.tiles, bias, n, w.row, y)
            fp64.assert_right(
                y, fp64.linear(x, w, "bf16", scales_rounded=False).plus(bias), f"{scratch} bytes, {dtype}"
            )


@pytest.mark.parametrize("m", [2, 17, 65, 130, 300])
def test_sixteen_bits_as_the_operation_launches_it(m: int) -> None:
    for (n, columns), format in itertools.product(((33, 512), (150, 768)), EVERY):
        k = width(columns, format)
        w, x, bias = weight("random", n, k, format), inputs(m, k, BF16), bias_of(n, FP16)
        fp64.assert_right(linear(x, w, bias, "bf16"), fp64.linear(x, w, "bf16").plus(bias), f"{n}x{k} {format}")


@pytest.mark.parametrize("formula", ["int8", "bf16"])
def test_rows_that_lie_anywhere(formula: str) -> None:
    """At the very end of an allocation of their own, unaligned, one row and several."""
    n, k = 48, 512
    w = weight("random", n, k, "q6_k")
    for m in (1, 7, 40):
        x = inputs(m, k, BF16)
        flat = torch.empty(m * k + 1, dtype=BF16, device=DEVICE)
        flat[1:] = x.flatten()
        exact = fp64.linear(x, w, formula)
        fp64.assert_right(linear(flat[1:].view(m, k), w, None, formula), exact, f"M={m}")


@pytest.mark.parametrize("format", EVERY)
def test_pack(format: str) -> None:
    for n, k, stack in ((1, 256, None), (33, width(768, format), None), (17, 512, 3)):
        w = weight("random", n, k, format, stack)
        expected = layout.pack([plane.cpu() for plane in w.planes], w.row)
        fp64.assert_same_bits(poisoned_call(torch.ops.q6k.pack, w.planes, w.format), expected)


@pytest.mark.parametrize("format", EVERY)
def test_dequantize(format: str) -> None:
    for n, k in ((1, 256), (33, width(768, format))):
        w = weight("random", n, k, format)
        planes = [plane.cpu() for plane in w.planes]
        for dtype in FLOATS:
            found = poisoned_call(torch.ops.q6k.dequantize, w.tiles, n, k, w.format, dtype)
            fp64.assert_same_bits(found, reference.dequantize(planes, w.row, dtype))


@pytest.mark.parametrize("format", EVERY)
def test_embedding(format: str) -> None:
    n, k = 33, width(768, format)
    w = weight("random", n, k, format)
    at = torch.randint(n, (7, 3), device=DEVICE, generator=random_source())
    for dtype in FLOATS:
        for index_dtype in (torch.int32, torch.int64):
            found = poisoned_call(torch.ops.q6k.embedding, at.to(index_dtype), w.tiles, n, k, w.format, dtype)
            fp64.assert_same_bits(found, w.weights(dtype)[at])
