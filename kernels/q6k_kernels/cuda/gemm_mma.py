"""Prefill with some rows of 16-bit activations on GPUs without wgmma: the launch of `cuda/gemm_mma.cuh`.

A plan is chosen from sizes alone, by a rough model of time. It counts the steps of the fullest multiprocessor, a
step being a super-block of a block's rows, and adds the cost of splitting K. With few tokens and rows the warps of
a block split K. With fewer still, blocks split it too, and a second kernel adds their sums.
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
from q6k_kernels.cuda.device import Device, Variant, bias_arguments, common_macros
from q6k_kernels.formats.ggml import super_blocks
from q6k_kernels.formats.types import TILE_ROWS, WEIGHT_TYPES, WeightType
from q6k_kernels.jit import loader

FILE, KERNEL, REDUCE = "gemm_mma.cuh", "q6k_gemm_mma", "q6k_reduce"
CONFIGS = ((16, 1), (16, 4), (32, 1), (32, 2), (64, 1))
"""Tokens of a block, and parts of K that its warps sum separately: Q6K_BN and Q6K_KW."""
WARPS, THREADS, REDUCE_THREADS = 8, 256, 256
STAGE_BYTES = 8192
"""Bytes of a stage of activations in shared memory; there are two."""
MOST_SPLITS = 16
MOST_WORKSPACE = 64 << 20
"""Most bytes of partial sums: these stay in an L2 cache or near it."""
SMALL_SHARED = (86, 89, 120, 121)
"""Compute capabilities with 100 KB of shared memory a multiprocessor."""
_ARGUMENTS, _REDUCE_ARGUMENTS = struct.Struct("@PPPPPqiiii"), struct.Struct("@PPPiiii")


@dataclass(frozen=True)
class MmaPlan:
    """One launch, and a second one to add sums if `splits` is more than 1.

    Attributes:
        tokens: tokens of a block's outputs.
        parts: parts of K that a block's warps sum separately.
        splits: parts of K that blocks sum separately.
        slots: tiles that each warp has room for.
        grid: blocks in x, y and z.
        shared_bytes: dynamic shared memory of a block.
    """

    tokens: int
    parts: int
    splits: int
    slots: int
    grid: tuple[int, int, int]
    shared_bytes: int

    @property
    def rows(self) -> int:
        """Rows of a block's outputs."""
        return TILE_ROWS * WARPS // self.parts

    def steps(self, k: int) -> int:
        """Return the most super-blocks that a warp multiplies."""
        return math.ceil(math.ceil(super_blocks(k) / self.splits) / self.parts)

    def roundings(self, k: int) -> int:
        """Return the most fp32 roundings that any term goes through, for `accuracy.tolerance`.

        Every product of matrix units adds 17 numbers, each of which may be cut (two roundings' worth) before and
        once after: 36. Then come the sums of parts, of splits, and the bias.
        """
        return 36 * 16 * self.steps(k) + self.parts + self.splits + 1


@lru_cache(maxsize=4096)
def plan(m: int, n: int, k: int, row: WeightType, device: Device) -> MmaPlan:
    """Return the launch for `m` rows of activations.

    Args:
        m: at least 1.
        n: rows of the weight.
        k: columns of both.
        row: the weight type.
        device: the GPU's limits.
    """
    tokens = min(max(16, 1 << (m - 1).bit_length()), 64)
    splits = range(1, min(MOST_SPLITS, super_blocks(k), max(1, MOST_WORKSPACE // (4 * m * n))) + 1)
    candidates = [
        _plan(config, split, m, n, row, device)
        for config, split in product((config for config in CONFIGS if config[0] == tokens), splits)
    ]
    return min(candidates, key=lambda candidate: _cost(candidate, m, n, k, device))


def _plan(config: tuple[int, int], splits: int, m: int, n: int, row: WeightType, device: Device) -> MmaPlan:
    (tokens, parts), slots = config, slots_of(device.arch)
    blocks = -(-m // tokens) * -(-n // (TILE_ROWS * WARPS // parts))
    shared = 2 * STAGE_BYTES + WARPS * slots * row.tile_bytes
    return MmaPlan(tokens, parts, splits, slots, (blocks, splits, 1), shared)


def slots_of(arch: int) -> int:
    """Return the tiles that each warp has room for, such that two blocks fit on a multiprocessor."""
    return 1 if arch in SMALL_SHARED else 2


def _cost(candidate: MmaPlan, m: int, n: int, k: int, device: Device) -> float:
    """Estimate the time in steps of about a microsecond, by a model that is not measured."""
    blocks = candidate.grid[0] * candidate.grid[1]
    fullest = -(-blocks // device.multiprocessors)
    alone = 1.3 if fullest == 1 else 1.0  # a block alone leaves memory idle at times
    adding = 2.0 + candidate.splits * m * n * 8 / 4e6 if candidate.splits > 1 else 0.0
    return fullest * alone * (candidate.steps(k) + 0.5) + 0.1 * candidate.parts + adding


def linear(x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, row: WeightType, y: Tensor) -> None:
    """Launch the product y = x Wᵀ (+ bias); `cuda.dispatch.linear` has checked the arguments.

    Args:
        x: bf16 or fp16 (M, K), M >= 1, rows 16-byte aligned and contiguous, any distance apart.
        tiles: uint8 (T, ceil(K/256), tile_bytes).
        bias: (n,), contiguous, or None.
        n: rows of the weight.
        row: the weight type.
        y: x's dtype (M, n), contiguous.

    Raises:
        CudaError: a kernel cannot be compiled or launched.
    """
    (m, k), fp16 = x.shape, x.dtype is torch.float16
    device = launching.device(x.device.index)
    chosen = plan(m, n, k, row, device)
    split = chosen.splits > 1
    workspace = torch.empty(chosen.splits, m, n, dtype=torch.float32, device=x.device) if split else None
    sums = 0 if workspace is None else workspace.data_ptr()
    bias_at, bias_kind = bias_arguments(bias)
    stream = launching.stream(device)
    variant = _variant((chosen.tokens, chosen.parts), chosen.slots, row, fp16)
    loader.load(*variant, device.index).launch(
        chosen.grid,
        THREADS,
        _ARGUMENTS.pack(
            tiles.data_ptr(), x.data_ptr(), y.data_ptr(), sums, bias_at, x.stride(0), bias_kind, m, n, k
        ),
        stream=stream,
        shared_bytes=chosen.shared_bytes,
        dependent=device.arch >= 90,
    )
    if split:
        loader.load(FILE, REDUCE, variant[2], device.index).launch(
            (-(-m * n // REDUCE_THREADS), 1, 1),
            REDUCE_THREADS,
            _REDUCE_ARGUMENTS.pack(sums, y.data_ptr(), bias_at, bias_kind, m, n, chosen.splits),
            stream=stream,
            dependent=device.arch >= 90,
        )


@cache
def _variant(config: tuple[int, int], slots: int, row: WeightType, fp16: bool) -> Variant:
    macros = ("Q6K_BN", config[0]), ("Q6K_KW", config[1]), ("Q6K_SLOTS", slots)
    return FILE, KERNEL, (*common_macros(row, fp16), *macros)


def variants(arch: int) -> list[Variant]:
    """Return every variant that `linear` may load on a GPU of that compute capability, 90 for 9.0."""
    found = [
        _variant(config, slots_of(arch), row, fp16)
        for config, row, fp16 in product(CONFIGS, WEIGHT_TYPES.values(), (False, True))
    ]
    return [(FILE, kernel, macros) for _, _, macros in found for kernel in (KERNEL, REDUCE)]
