"""How kernels are launched, from sizes alone: every plan fits the GPU and covers the product exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from q6k_kernels.cpp import variants
from q6k_kernels.cuda import decode, decode_plan, dispatch, expand, gemm_wgmma
from q6k_kernels.cuda.device import Device
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType, weight_type

H200 = Device(0, 90, 132, 227 << 10, 228 << 10)
SHAPES = [
    *((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)),  # Llama 3 8B
    *((21504, 5376), (5376, 21504), (4096, 5376), (2048, 5376), (5376, 4096), (262144, 5376)),  # Gemma 3 27B
    *((12288, 4096), (4096, 12288), (151936, 4096)),  # Qwen3 8B
    *((1, 256), (17, 768), (17, 800), (1001, 2560), (1, 21504), (4000000, 256), (1 << 20, 13568)),
]
BF16, EXACT = weight_type("q6_k"), weight_type("q6_k_exact")
GPUS = [variants.device_like(arch) for arch in variants.ARCHITECTURES]


def part(total: int, index: int, parts: int) -> int:
    """`share` of the kernels."""
    return total * index // parts


@pytest.mark.parametrize("gpu", [*GPUS, H200], ids=lambda gpu: f"sm_{gpu.arch}-{gpu.multiprocessors}")
@pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("m", range(1, 9))
def test_decode_plans_fit_and_cover(gpu: Device, row: WeightType, m: int) -> None:
    for n, k in SHAPES:
        plan = decode_plan.plan(m, n, k, row, gpu)
        if plan is None:  # then fewer rows at a time; one always fits
            assert m > 1
            continue
        row_tiles, blocks = -(-n // 16), -(-k // 256)
        assert plan.tokens >= m
        assert not plan.fused or plan.tokens <= 4
        assert plan.early or plan.fused  # nothing is asked for before a ring that only the fused kernel fills late
        assert plan.shared_bytes <= gpu.shared_bytes
        assert plan.occupancy * (plan.shared_bytes + 1024) <= gpu.multiprocessor_shared_bytes
        assert plan.cluster == 1 or gpu.arch >= 90
        assert plan.cluster <= min(8, blocks)
        assert 1 <= plan.ranges <= row_tiles
        assert row_tiles * plan.ranges < 1 << 31
        rows = max(
            part(row_tiles, i + 1, plan.ranges) - part(row_tiles, i, plan.ranges) for i in range(plan.ranges)
        )
        depth = -(-blocks // plan.cluster)
        assert rows * depth * plan.warps < 1 << 31
        # What cuda/decode.cuh lays out: ring, activations, their scales, sums and parts for minimums, sums of rows.
        ring = plan.warps * plan.stages * row.tile_bytes
        codes = depth * 4 * (64 * plan.tokens + (16 if plan.fused else 0))
        steps = depth * (32 * plan.tokens if plan.tokens <= 4 else 256) * (2 if row.offset else 1)
        parts = depth * 64 * plan.tokens if row.minimum else 0
        slots = 2 * plan.warps if plan.cluster == 1 else rows + plan.warps
        assert plan.shared_bytes >= ring + codes + steps + parts + slots * 16 * plan.tokens * 4


def test_decode_splits_k_where_activations_would_not_fit() -> None:
    assert decode_plan.plan(8, 5376, 21504, BF16, H200).cluster > 1
    assert decode_plan.plan(1, 5376, 21504, BF16, H200).cluster == 1
    assert decode_plan.plan(8, 5376, 21504, BF16, replace(H200, arch=80)) is None


def test_decode_never_copies_activations_for_row_tile_after_row_tile() -> None:
    for n in (262144, 1 << 20):
        plan = decode_plan.plan(8, n, 13568, EXACT, H200)
        assert plan is None or plan.ranges <= 4 * H200.multiprocessors * plan.occupancy


@pytest.mark.parametrize(("arch", "most"), [(80, 65536), (86, 33792), (90, 262144)])
def test_activations_that_fit_are_known(arch: int, most: int) -> None:
    gpu = variants.device_like(arch)
    assert decode_plan.fits(4096, most, BF16, gpu)
    assert not decode_plan.fits(4096, 1 << 20, BF16, gpu)


def test_a_forced_plan_is_taken_or_refused() -> None:
    choice = decode_plan.Choice.of((8, 2, 2), fused=True, early=False, resident=1)
    plan = decode_plan.plan(4, 4096, 4096, BF16, H200, (2, choice))
    assert (plan.warps, plan.stages, plan.occupancy, plan.cluster) == (8, 2, 2, 2)
    assert (plan.fused, plan.early, plan.ranges * plan.cluster) == (True, False, 132)
    assert decode_plan.plan(8, 4096, 21504, BF16, H200, (1, decode_plan.Choice.of((16, 3, 1), fused=False))) is None


def test_activations_too_long_for_shared_memory_are_an_error() -> None:
    x = torch.zeros(1, 256 * 1024, dtype=torch.bfloat16)
    tiles = torch.zeros(1, 1024, 3584, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"rows of K = 262144 do not fit .* use activations='bf16'"):
        decode.linear(x, tiles, None, 1, BF16, torch.empty(1, 1), replace(H200, arch=80))


@pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("config", gemm_wgmma.CONFIGS, ids=str)
def test_gemm_configurations_fit(config: gemm_wgmma.Config, row: WeightType) -> None:
    shared = config.shared_bytes(row)
    assert shared <= H200.shared_bytes
    assert config.occupancy * (shared + 1024) <= H200.multiprocessor_shared_bytes


@pytest.mark.parametrize("m", [1, 9, 16, 17, 33, 64, 127, 128, 129, 256, 512, 1000, 2048, 4096, 100000])
def test_gemm_plans_cover_every_output_once(m: int) -> None:
    """As the kernel counts: rounds of outputs computed whole, then equal parts of the pairs of the others."""
    for n, k in SHAPES:
        plan, depth = gemm_wgmma.plan(m, n, k, H200), -(-k // 256)
        assert plan.token_blocks * plan.config.tokens >= m
        assert plan.row_blocks * plan.config.rows >= n
        assert 1 <= plan.blocks <= 132 * plan.config.occupancy
        pairs = plan.shared * depth
        assert 0 <= pairs < 1 << 31
        if plan.shared:
            assert plan.whole % plan.blocks == 0
            assert plan.whole or plan.blocks <= pairs  # no block has nothing to do
        assert 4 * plan.scratch_floats + 8 * plan.scratch_flags <= 64 << 20


def test_outputs_that_leave_some_of_the_gpu_idle_are_shared() -> None:
    config = next(c for c in gemm_wgmma.CONFIGS if c.tokens == 256)
    plan = gemm_wgmma.plan_of(config, 1, True, 512, 21504, 5376, H200)
    assert (plan.blocks, plan.whole, plan.shared) == (132, 264, 336 - 264)
    assert gemm_wgmma.plan_of(config, 1, False, 512, 21504, 5376, H200).shared == 0
    even = gemm_wgmma.plan_of(config, 1, True, 512, 132 * 128, 5376, H200)
    assert (even.whole, even.shared, even.scratch_floats) == (264, 0, 0)


@pytest.mark.parametrize(("m", "k"), [(256, 4096), (4096, 21504), (100000, 256)])
def test_a_slice_for_cublas_stays_in_its_scratch(m: int, k: int) -> None:
    rows = expand.slice_rows(m, k)
    assert rows % 16 == 0
    assert rows * (2 * k + 4 * m) <= expand.SCRATCH_BYTES or rows == 16


def test_rows_are_copied_only_where_a_kernel_could_not_read_them() -> None:
    wide = torch.zeros(8, 1024, dtype=torch.bfloat16)
    for x in (wide, wide[:, :512], wide[::2], wide[:3], wide.view(2, 4, 1024)):
        assert dispatch.aligned_rows(x).data_ptr() == x.data_ptr()
    flat = torch.zeros(8 * 1025, dtype=torch.bfloat16)
    for x in (
        wide.T.contiguous().T,
        flat[1 : 1 + 8 * 1024].view(8, 1024),
        wide[:1].expand(8, 1024),
        flat.view(8, 1025)[:, :512],
    ):
        rows = dispatch.aligned_rows(x)
        assert rows.data_ptr() != x.data_ptr()
        assert rows.is_contiguous()
        assert torch.equal(rows, x)
