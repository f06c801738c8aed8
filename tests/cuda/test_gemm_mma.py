"""Plans within every GPU's limits, and the kernel on the emulated GPU against fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

import any_type
import cuda_emulator
import packed

torch = pytest.importorskip("torch")

from cuda_emulator.memory import Memory, emulate
from q6k_kernels.cpp.variants import ARCHITECTURES, device_like
from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda import gemm_mma
from q6k_kernels.cuda.device import Device
from q6k_kernels.cuda.gemm_mma import CONFIGS, MmaPlan, plan, variants
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType, weight_type
from q6k_kernels.ops import accuracy

BF16, EXACT = weight_type("q6_k"), weight_type("q6_k_exact")
DEVICES = [device_like(arch) for arch in ARCHITECTURES]
SIZES = {
    "llama-3-8b": [(4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)],
    "llama-3-8b-head": [(128256, 4096)],
    "gemma-3-27b": [(4096, 5376), (2048, 5376), (5376, 4096), (21504, 5376), (5376, 21504), (262208, 5376)],
    "qwen-3-8b": [(12288, 4096), (4096, 12288), (151936, 4096)],
    "odd": [(1, 256), (15, 512), (17, 256), (1000, 768), (8191, 21504), (3, 21504), (4099, 2816)],
}
TOKENS = [1, 2, 9, 16, 17, 31, 33, 64, 65, 127, 128, 255, 1000, 4096]


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: str(device.arch))
def test_plans_keep_within_limits(device: Device, model: str) -> None:
    available = {variant for variant in variants(device.arch) if variant[1] == gemm_mma.KERNEL}
    for (n, k), m, row in product(SIZES[model], TOKENS, WEIGHT_TYPES.values()):
        found = plan(m, n, k, row, device)
        where = f"{m} x {n} x {k}: {found}"
        assert (found.tokens, found.parts) in CONFIGS, where
        assert found.tokens >= min(m, 64), where
        token_blocks = math.ceil(m / found.tokens)
        row_blocks = math.ceil(n / found.rows)
        assert found.grid == (token_blocks * row_blocks, found.splits, 1), where
        assert 0 < found.grid[0] < 1 << 31, where
        # Every split has a super-block at least, and the reduction's count fits in 31 bits.
        assert 1 <= found.splits <= min(k // 256, 65535), where
        assert found.splits == 1 or found.splits * m * n * 4 <= gemm_mma.MOST_WORKSPACE, where
        # What the kernel uses: two stages of activations and the tiles; then the sums, in their place.
        tiles = 8 * found.slots * row.tile_bytes
        sums = found.parts * found.tokens * (found.rows + 4) * 4
        assert found.shared_bytes == 2 * 8192 + tiles >= sums, where
        # Two blocks a multiprocessor, but one of the largest tiles.
        blocks = 1 if row.bits == 8 else 2
        assert blocks * (found.shared_bytes + 1024) <= device.multiprocessor_shared_bytes, where
        assert found.shared_bytes <= device.shared_bytes, where
        for fp16 in (False, True):
            assert gemm_mma._variant((found.tokens, found.parts), found.slots, row, fp16) in available, where


@pytest.mark.parametrize(("m", "n", "k"), [(16, 1024, 4096), (64, 4096, 4096), (16, 4096, 14336), (9, 256, 8192)])
def test_small_weights_are_spread_over_the_gpu(m: int, n: int, k: int) -> None:
    device = device_like(80)
    found = plan(m, n, k, BF16, device)
    assert found.grid[0] * found.grid[1] >= min(device.multiprocessors // 2, n // 16 * (k // 256) // 8), found


def test_large_weights_are_not_split() -> None:
    for m in (16, 64, 255):
        assert plan(m, 128256, 4096, BF16, device_like(80)).splits == 1


def test_variants_are_all_that_plans_can_want() -> None:
    for arch in ARCHITECTURES:
        found = variants(arch)
        assert len(set(found)) == len(found) == 2 * 2 * len(WEIGHT_TYPES) * len(CONFIGS)
        assert {kernel for _, kernel, _ in found} == {gemm_mma.KERNEL, gemm_mma.REDUCE}


# ---- on the emulated GPU -----------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    memory = emulate(monkeypatch, device_like(80))
    yield memory
    memory.check()


def planes(n: int, k: int, exact: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n + k)
    ql, qh = (torch.randint(0, 256, (n, k // by), dtype=torch.uint8, generator=generator) for by in (2, 4))
    if exact:
        sub_scales = torch.randint(-128, 128, (n, k // 16), dtype=torch.int8, generator=generator)
        return ql, qh, sub_scales, (torch.randn(n, k // 256, generator=generator) * 1e-5).half()
    return ql, qh, (torch.randn(n, k // 16, generator=generator) * 1e-3).bfloat16()


def activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with outliers, further apart than they are long."""
    x = torch.randn(m, k + 24, generator=torch.Generator().manual_seed(m))
    x[0, 5::97] *= 60
    return x.to(dtype)[:, :k]


def forced(config: tuple[int, int], splits: int, slots: int, m: int, n: int, row: WeightType) -> MmaPlan:
    tokens, parts = config
    blocks = -(-m // tokens) * -(-n // (128 // parts))
    shared = 2 * 8192 + 8 * slots * row.tile_bytes
    return MmaPlan(tokens, parts, splits, slots, (blocks, splits, 1), shared)


def multiply(x: torch.Tensor, tiles: torch.Tensor, bias: torch.Tensor | None, n: int) -> torch.Tensor:
    y = torch.empty(len(x), n, dtype=x.dtype)
    gemm_mma.linear(x, tiles, bias, n, packed.row(tiles), y)
    return y


def emulated_roundings(chosen: MmaPlan, k: int) -> int:
    """Fewer than on a GPU: the emulated matrix units cut once a product, and exactly."""
    return 2 * 16 * chosen.steps(k) + chosen.parts + chosen.splits + 1


CASES = [
    # config, splits, slots, m, n, k, exact, dtype, bias
    ((16, 1), 1, 2, 1, 16, 256, False, torch.bfloat16, None),
    ((16, 1), 2, 2, 16, 130, 1280, True, torch.float16, torch.float32),
    ((16, 1), 1, 1, 21, 256, 768, False, torch.float16, torch.float16),
    ((16, 4), 1, 2, 9, 37, 1280, False, torch.bfloat16, torch.float32),
    ((16, 4), 3, 1, 16, 64, 2304, True, torch.bfloat16, torch.bfloat16),
    ((16, 4), 1, 2, 5, 15, 256, True, torch.float16, None),
    ((32, 1), 1, 2, 32, 129, 1024, True, torch.bfloat16, torch.float16),
    ((32, 2), 1, 2, 20, 77, 1280, False, torch.float16, torch.float32),
    ((32, 2), 3, 1, 33, 128, 768, False, torch.bfloat16, torch.bfloat16),
    ((64, 1), 1, 2, 33, 130, 768, True, torch.bfloat16, torch.float32),
    ((64, 1), 2, 1, 70, 65, 1280, False, torch.float16, None),
]


@cuda_emulator.requires_compiler
@pytest.mark.parametrize(("config", "splits", "slots", "m", "n", "k", "exact", "dtype", "bias_dtype"), CASES)
def test_products_are_right_in_every_order_of_threads(
    gpu: Memory,
    monkeypatch: pytest.MonkeyPatch,
    config: tuple[int, int],
    splits: int,
    slots: int,
    m: int,
    n: int,
    k: int,
    exact: bool,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    row = EXACT if exact else BF16
    chosen = forced(config, splits, slots, m, n, row)
    monkeypatch.setattr(gemm_mma, "plan", lambda *sizes: chosen)
    x, weight = activations(m, k, dtype), planes(n, k, exact)
    bias = None if bias_dtype is None else torch.randn(n, generator=torch.Generator().manual_seed(1)).to(bias_dtype)
    kernel = cuda_emulator.load(*gemm_mma._variant(config, slots, row, dtype == torch.float16), 0)
    outputs = []
    for kernel.order in (3, 2, 0):
        outputs.append(multiply(x, packed.tiles_of(*weight), bias, n))
    # The order of sums is fixed, whatever that of threads.
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    right = accuracy.linear(
        x, packed.exact_of(*weight), bias, activations="bf16", scales_rounded=dtype == torch.bfloat16
    )
    found = accuracy.compare(outputs[0], right, emulated_roundings(chosen, k))
    assert found.first is None, found


@cuda_emulator.requires_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)
def test_every_weight_type_is_multiplied(
    gpu: Memory, monkeypatch: pytest.MonkeyPatch, row: WeightType, dtype: torch.dtype
) -> None:
    m, n, k = 5, 37, 544 if row.block == 32 else 512
    chosen = forced((16, 4), 1, 2, m, n, row)
    monkeypatch.setattr(gemm_mma, "plan", lambda *sizes: chosen)
    x, weight, y = activations(m, k, dtype), any_type.planes(row, n, k), torch.empty(m, n, dtype=dtype)
    gemm_mma.linear(x, layout.pack(weight, row), None, n, row, y)
    rounded = dtype == torch.bfloat16
    exact = accuracy.linear(x, accuracy.of_planes(weight, row), activations="bf16", scales_rounded=rounded)
    found = accuracy.compare(y, exact, emulated_roundings(chosen, k))
    assert found.first is None, found


@cuda_emulator.requires_compiler
@pytest.mark.parametrize(("m", "n", "k"), [(3, 50, 2048), (40, 300, 512)])
def test_what_is_planned_is_launched(gpu: Memory, m: int, n: int, k: int) -> None:
    x, weight = activations(m, k, torch.bfloat16), planes(n, k, False)
    chosen = plan(m, n, k, BF16, launching.device(0))
    right = accuracy.linear(x, packed.exact_of(*weight), activations="bf16", scales_rounded=True)
    found = accuracy.compare(multiply(x, packed.tiles_of(*weight), None, n), right, chosen.roundings(k))
    assert found.worst <= 1
    assert chosen.roundings(k) > emulated_roundings(chosen, k)


@cuda_emulator.requires_compiler
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_infinities_stay_in_their_row(gpu: Memory, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    config, m, n, k = (32, 2), 20, 77, 1280
    chosen = forced(config, 1, 2, m, n, BF16)
    monkeypatch.setattr(gemm_mma, "plan", lambda *sizes: chosen)
    weight: Any = planes(n, k, False)
    x = activations(m, k, torch.float16).clone()
    x[7, 300] = bad
    y = multiply(x, packed.tiles_of(*weight), None, n)
    assert not y[7].isfinite().any()
    assert y[torch.arange(m) != 7].isfinite().all()
    right = accuracy.linear(x, packed.exact_of(*weight), activations="bf16")
    assert accuracy.compare(y, right).worst <= 1
