"""Products of many rows with the experts that each has chosen, 16-bit activations: sorted, then multiplied.

Three launches: pairs of a row and an expert are put into the order of experts, their rows of x are copied into that
order, and blocks of one expert's rows x some of its tokens are multiplied (`cuda/experts_wgmma.cuh` on Hopper, else
`cuda/experts_mma.cuh`). How many tokens each expert has is only known on the GPU, so the host chooses by the mean.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import torch
from torch import Tensor

from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda import gemm_mma, gemm_wgmma
from q6k_kernels.cuda.device import Device, Variant, bias_arguments, common_macros
from q6k_kernels.cuda.gemm_wgmma import CONFIGS, Config
from q6k_kernels.formats.types import TILE_ROWS, WEIGHT_TYPES, WeightType
from q6k_kernels.jit import loader

SORT_FILE, SORT, ORDER = "experts_sort.cuh", "q6k_sort_pairs", "q6k_order_rows"
WGMMA_FILE, WGMMA = "experts_wgmma.cuh", "q6k_experts_wgmma"
MMA_FILE, MMA = "experts_mma.cuh", "q6k_experts_mma"
SORT_THREADS, ORDER_THREADS = 512, 128
MOST_EXPERTS = 512
"""Experts that the kernels count tokens of, as in `cuda/experts_work.cuh`."""
COUNTS_BYTES = 4 * (MOST_EXPERTS + 4)
"""Shared memory for these counts, in bytes."""
MMA_TOKENS = (16, 32, 64)
"""Tokens of a block by mma.m16n8k16: Q6K_BN, with Q6K_KW 1."""
MMA_COSTS = (1.0, 1.25, 1.75)
"""Estimated times of these blocks; most of each is expanding weights."""
EIGHTHS = (-1.53, -0.89, -0.49, -0.16, 0.16, 0.49, 0.89, 1.53)
"""The middles of the eighths of a normal distribution."""
_SORT, _ORDER = struct.Struct("@PPPii"), struct.Struct("@PPPqii")
_WGMMA, _MMA = struct.Struct("@PPPPiiiii60x128s128s"), struct.Struct("@PPPPPPiiiii")


def _blocks(mean: float, tokens: int) -> float:
    """Estimate the blocks of tokens of an expert with `mean` pairs, which differ about as chance has it."""
    spread = math.sqrt(mean)
    return sum(math.ceil(max(1.0, mean + each * spread) / tokens) for each in EIGHTHS) / len(EIGHTHS)


@lru_cache(maxsize=1024)
def config_of(pairs: int, count: int) -> Config:
    """Return what Hopper's kernel is compiled for, best for `pairs` pairs of `count` experts."""
    mean = pairs / min(pairs, count)

    def cost(config: Config) -> float:
        return _blocks(mean, config.tokens) * config.cycles / config.consumers

    return min(CONFIGS, key=cost)


def stages(config: Config, row: WeightType) -> int:
    """Return the depth of the ring of tiles, such that all blocks of a multiprocessor fit."""
    room = gemm_wgmma.SHARED_BYTES // config.occupancy - 1024 - COUNTS_BYTES - config.bytes_with(row, 0)
    return min(config.tile_stages, room // (config.bytes_with(row, 1) - config.bytes_with(row, 0)))


def shared_bytes(config: Config, row: WeightType) -> int:
    """Return the bytes of shared memory of a block of Hopper's kernel."""
    return config.bytes_with(row, stages(config, row)) + COUNTS_BYTES


@lru_cache(maxsize=1024)
def mma_tokens(pairs: int, count: int) -> int:
    """Return the tokens of a block of the kernel for other GPUs, best for `pairs` pairs of `count` experts."""
    mean = pairs / min(pairs, count)
    return min(zip(MMA_TOKENS, MMA_COSTS, strict=True), key=lambda each: _blocks(mean, each[0]) * each[1])[0]


def multiply(
    x: Tensor,
    tiles: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    n: int,
    row: WeightType,
    y: Tensor,
    device: Device,
    config: Config | None = None,
    placed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Launch the products; `cuda.experts_dispatch` has checked the arguments.

    Args:
        x: bf16 or fp16 (M, K), the same row for all experts of a token, or (M * top, K); rows 16-byte aligned.
        tiles: uint8 (E, T, ceil(K/256), tile_bytes).
        experts: int32 or int64 (M, top), contiguous, M * top >= 1.
        bias: (E, n), contiguous, or None.
        n: rows of each expert's weight.
        row: the weight type.
        y: x's dtype (M, top, n), contiguous.
        device: the GPU of all tensors.
        config: forces what Hopper's kernel is compiled for, to measure it.
        placed: what `sort` returns of these experts, if that is known.

    Raises:
        ValueError: there are more experts than the kernels count.
        CudaError: a kernel cannot be compiled or launched.
    """
    pairs, count = experts.numel(), len(tiles)
    if count > MOST_EXPERTS:
        raise ValueError(
            f"activations bf16: kernels serve up to {MOST_EXPERTS} experts, found {count}; use activations='int8'"
        )
    order, begins = placed or sort(experts, count, device)
    rows = _in_order(x, order, pairs // len(x), device)
    product = _Sorted(rows, tiles, order, begins, bias, n, row, y, device)
    if device.arch == gemm_wgmma.ARCH:
        _wgmma(config or config_of(pairs, count), product)
    else:
        _mma(mma_tokens(pairs, count), product)


def sort(experts: Tensor, count: int, device: Device) -> tuple[Tensor, Tensor]:
    """Put pairs into the order of experts.

    Args:
        experts: int32 or int64, the expert of each pair, contiguous.
        count: number of experts.
        device: their GPU.

    Returns:
        The pairs in order, int32 (pairs,), and where each expert's begin, int32 (count + 1,).
    """
    order = torch.empty(experts.numel(), dtype=torch.int32, device=experts.device)
    begins = torch.empty(count + 1, dtype=torch.int32, device=experts.device)
    wide = int(experts.dtype is torch.int64)
    arguments = _SORT.pack(experts.data_ptr(), order.data_ptr(), begins.data_ptr(), wide, len(order))
    _launch((SORT_FILE, SORT, ()), (count, 1, 1), SORT_THREADS, arguments, device)
    return order, begins


def _in_order(x: Tensor, order: Tensor, sharing: int, device: Device) -> Tensor:
    """Return the row of x of each pair in order, (pairs, K)."""
    k = x.shape[1]
    rows = torch.empty(len(order), k, dtype=x.dtype, device=x.device)
    arguments = _ORDER.pack(x.data_ptr(), order.data_ptr(), rows.data_ptr(), x.stride(0), sharing, k // 8)
    _launch((SORT_FILE, ORDER, ()), (len(order), 1, 1), ORDER_THREADS, arguments, device)
    return rows


@dataclass(frozen=True)
class _Sorted:
    """A product whose pairs are in the order of experts; see `multiply` for the rest.

    Attributes:
        x: the row of each pair in order, (pairs, K).
        order: from `sort`.
        begins: from `sort`.
    """

    x: Tensor
    tiles: Tensor
    order: Tensor
    begins: Tensor
    bias: Tensor | None
    n: int
    row: WeightType
    y: Tensor
    device: Device

    @property
    def fp16(self) -> bool:
        """Whether activations are float16."""
        return self.x.dtype is torch.float16

    def outputs(self, tokens: int, rows: int) -> int:
        """Return the most blocks of outputs that there can be: each expert may have one that is partly filled."""
        pairs, count = len(self.x), len(self.tiles)
        return (pairs // tokens + min(pairs, count)) * -(-self.n // rows)

    def launch(self, variant: Variant, blocks: int, threads: int, arguments: bytes, shared: int) -> None:
        """Launch a kernel."""
        _launch(variant, (blocks, 1, 1), threads, arguments, self.device, shared)


def _wgmma(config: Config, of: _Sorted) -> None:
    (pairs, k), (count, row_tiles, depth, *_), device = of.x.shape, of.tiles.shape, of.device
    bias_at, bias_kind = bias_arguments(of.bias)
    arguments = _WGMMA.pack(
        *(of.y.data_ptr(), bias_at, of.order.data_ptr(), of.begins.data_ptr()),
        *(bias_kind, count, of.n, k, row_tiles),
        gemm_wgmma.tile_map(device.index, of.tiles.data_ptr(), count * row_tiles, depth, of.row, config.rows),
        gemm_wgmma.x_map(device.index, of.x.data_ptr(), of.fp16, pairs, k, 2 * k, config.tokens),
    )
    blocks = min(of.outputs(config.tokens, config.rows), device.multiprocessors * config.occupancy)
    variant = _wgmma_variant(config, of.row, of.fp16)
    of.launch(variant, blocks, config.threads, arguments, shared_bytes(config, of.row))


def _mma(tokens: int, of: _Sorted) -> None:
    count, row_tiles, *_ = of.tiles.shape
    bias_at, bias_kind = bias_arguments(of.bias)
    pointers = of.tiles.data_ptr(), of.x.data_ptr(), of.y.data_ptr(), bias_at
    places = of.order.data_ptr(), of.begins.data_ptr()
    arguments = _MMA.pack(*pointers, *places, bias_kind, count, of.n, of.x.shape[1], row_tiles)
    slots = gemm_mma.slots_of(of.device.arch)
    outputs = of.outputs(tokens, TILE_ROWS * gemm_mma.WARPS)
    variant = _mma_variant(tokens, slots, of.row, of.fp16)
    of.launch(variant, outputs, gemm_mma.THREADS, arguments, mma_bytes(of.row, of.device.arch))


def _launch(
    variant: Variant,
    grid: tuple[int, int, int],
    threads: int,
    arguments: bytes,
    device: Device,
    shared: int = 0,
) -> None:
    loader.load(*variant, device.index).launch(
        grid,
        threads,
        arguments,
        stream=launching.stream(device),
        shared_bytes=shared,
        dependent=device.arch >= 90,
    )


def mma_bytes(row: WeightType, arch: int) -> int:
    """Return the bytes of dynamic shared memory of a block of the kernel for other GPUs."""
    return 2 * gemm_mma.STAGE_BYTES + gemm_mma.WARPS * gemm_mma.slots_of(arch) * row.tile_bytes


@cache
def _wgmma_variant(config: Config, row: WeightType, fp16: bool) -> Variant:
    macros = (
        ("Q6K_TOKENS", config.tokens),
        ("Q6K_CONSUMERS", config.consumers),
        ("Q6K_TILE_STAGES", stages(config, row)),
        ("Q6K_X_STAGES", config.x_stages),
        ("Q6K_OCCUPANCY", config.occupancy),
    )
    return WGMMA_FILE, WGMMA, common_macros(row, fp16) + macros


@cache
def _mma_variant(tokens: int, slots: int, row: WeightType, fp16: bool) -> Variant:
    macros = ("Q6K_BN", tokens), ("Q6K_KW", 1), ("Q6K_SLOTS", slots)
    return MMA_FILE, MMA, (*common_macros(row, fp16), *macros)


def variants(device: Device) -> list[Variant]:
    """Return every variant that this module may load on a GPU."""
    kinds, found = (
        list(product(WEIGHT_TYPES.values(), (False, True))),
        [(SORT_FILE, SORT, ()), (SORT_FILE, ORDER, ())],
    )
    if device.arch == gemm_wgmma.ARCH:
        return [*found, *(_wgmma_variant(config, *kind) for config, kind in product(CONFIGS, kinds))]
    slots = gemm_mma.slots_of(device.arch)
    return [*found, *(_mma_variant(tokens, slots, *kind) for tokens, kind in product(MMA_TOKENS, kinds))]
