"""Prefill with 16-bit activations on Hopper: the launch of `cuda/gemm_wgmma.cuh`.

A block computes ROWS x TOKENS outputs. Few tokens take small blocks, two to a multiprocessor. Many tokens take the
largest blocks, since weights are expanded once for each block of tokens. Outputs that do not fill the GPU evenly
are cut along K: then every block has the same share, and partial sums of another block's output pass through
scratch memory.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count, product
from typing import Literal

import torch
from torch import Tensor

from q6k_kernels.cuda.device import Device, Variant, bias_arguments, common_macros, stream
from q6k_kernels.formats.ggml import super_blocks
from q6k_kernels.formats.types import TILE_ROWS, WEIGHT_TYPES, WeightType
from q6k_kernels.jit import driver, loader, tensor_map

FILE, KERNEL = "gemm_wgmma.cuh", "q6k_gemm_wgmma"
ARCH = 90
"""The only compute capability with these instructions."""
SHARED_BYTES = 228 << 10
"""Shared memory of its multiprocessors, of which each block takes 1 KB more than it asks for."""
_ARGUMENTS = struct.Struct("@PPPPQiiiiii48x128s128s")
_tickets = count(int.from_bytes(os.urandom(8), "little") >> 1)
"""Numbers that mark a launch's words in reused memory. Replays of a graph share one, as they run one by one."""


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for; the macros of `cuda/gemm_wgmma.cuh` say more.

    Attributes:
        tokens: tokens of a block's outputs.
        consumers: warpgroups that multiply, 64 rows each.
        tile_stages: depth of the ring of tiles, in super-blocks, where it fits.
        x_stages: depth of the ring of activations, in steps of 64 columns.
        occupancy: blocks on a multiprocessor.
        cycles: clock cycles that a super-block takes one of `occupancy` blocks, divided by `occupancy`; fitted
            to measurements on an H200, like the constants of `_cost`.
    """

    tokens: int
    consumers: int
    tile_stages: int
    x_stages: int
    occupancy: int
    cycles: int

    @property
    def rows(self) -> int:
        """Rows of a block's outputs."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block: the consumers, and those that copy."""
        return self.consumers * 128 + (128 if self.tokens > 128 else 64)

    def stages(self, row: WeightType) -> int:
        """Return the depth of the ring of tiles of a weight type: `tile_stages`, or less so that all blocks fit."""
        room = SHARED_BYTES // self.occupancy - 1024 - self.bytes_with(row, 0)
        return min(self.tile_stages, room // (self.bytes_with(row, 1) - self.bytes_with(row, 0)))

    def shared_bytes(self, row: WeightType) -> int:
        """Return the bytes of shared memory of a block."""
        return self.bytes_with(row, self.stages(row))

    def bytes_with(self, row: WeightType, stages: int) -> int:
        """Return the bytes of shared memory of a block whose ring of tiles has `stages` super-blocks."""
        rings = self.x_stages * self.tokens * 128 + stages * self.rows // TILE_ROWS * row.tile_bytes
        return rings + self.consumers * 4 * 512 + (self.x_stages + stages) * 16


CONFIGS = (
    Config(16, 2, 2, 4, 2, 1590),
    Config(32, 2, 2, 4, 2, 1650),
    Config(64, 2, 2, 4, 2, 1960),
    Config(128, 1, 3, 4, 2, 1740),
    Config(128, 2, 4, 4, 1, 3290),
    Config(256, 2, 3, 4, 1, 5000),
)


@dataclass(frozen=True)
class WgmmaPlan:
    """One launch of the kernel.

    Attributes:
        config: the kernel.
        token_blocks: number of blocks of tokens.
        row_blocks: number of blocks of rows.
        blocks: number of thread blocks.
        whole: number of outputs that one thread block computes alone; thread blocks share the others.
    """

    config: Config
    token_blocks: int
    row_blocks: int
    blocks: int
    whole: int

    @property
    def shared(self) -> int:
        """Number of outputs that thread blocks share."""
        return self.token_blocks * self.row_blocks - self.whole

    @property
    def scratch_floats(self) -> int:
        """Number of fp32 values in scratch memory: the sums that each thread block may leave to another."""
        return self.blocks * self.config.rows * self.config.tokens if self.shared else 0

    @property
    def scratch_flags(self) -> int:
        """Number of 8-byte words in scratch memory: a flag for each warp that leaves sums."""
        return self.blocks * self.config.consumers * 4 if self.shared else 0


def plan_of(config: Config, resident: int, share: bool, m: int, n: int, k: int, device: Device) -> WgmmaPlan:
    """Return the launch of a configuration.

    Args:
        config: the configuration.
        resident: thread blocks on a multiprocessor, at most what the configuration is compiled for.
        share: whether thread blocks share the outputs that are left after the last full round of the GPU.
        m: rows of activations.
        n: rows of the weight.
        k: columns of both.
        device: the GPU's limits.
    """
    token_blocks, row_blocks = -(-m // config.tokens), -(-n // config.rows)
    outputs, blocks = token_blocks * row_blocks, device.multiprocessors * resident
    whole = outputs // blocks * blocks if share else outputs
    pairs = (outputs - whole) * super_blocks(k)
    if not 0 < pairs < 1 << 31:
        return WgmmaPlan(config, token_blocks, row_blocks, min(outputs, blocks), outputs)
    return WgmmaPlan(config, token_blocks, row_blocks, blocks if whole else min(pairs, blocks), whole)


@lru_cache(maxsize=4096)
def plan(m: int, n: int, k: int, device: Device) -> WgmmaPlan:
    """Return the launch that should be fastest.

    Args:
        m: rows of activations, at least 1.
        n: rows of the weight.
        k: columns of both.
        device: the GPU's limits.
    """
    candidates = [
        plan_of(config, resident, share, m, n, k, device)
        for config in CONFIGS
        for resident, share in product({1, config.occupancy}, (False, True))
    ]
    return min(candidates, key=lambda candidate: _cost(candidate, k, device))


def _cost(candidate: WgmmaPlan, k: int, device: Device) -> float:
    """Estimate the clock cycles of the fullest multiprocessor."""
    config, depth = candidate.config, super_blocks(k)
    resident = -(-candidate.blocks // device.multiprocessors)
    rounds = -(-candidate.whole // candidate.blocks)
    # Blocks that share are at different columns of x, so all of it should be in the L2 cache.
    x_mb = candidate.token_blocks * config.tokens * k * 2 / 1e6
    far = 1 + min(0.25, max(0.0, x_mb - 10) / 200)
    pairs = rounds * depth + -(-candidate.shared * depth // candidate.blocks) * far
    # A block alone hides no waits; with many tokens, blocks wait for the tensor cores rather than for memory.
    alone = 1.0
    if resident < config.occupancy:
        alone = 1.35 if config.tokens <= 64 else 1.2 if candidate.shared else 1.5
    ends = 4000.0
    if candidate.shared:
        # The time to leave sums, and to collect those of an output's other parts.
        sums = config.tokens * config.consumers
        ends += 4500 + 10 * sums + 3000 * (resident - 1)
        ends += 4 * sums * min(3.0, max(0.0, candidate.blocks / candidate.shared - 1))
    return pairs * resident * config.cycles * alone + ends


class Product:
    """The product of activations of one shape with one weight, y = x Wᵀ (+ bias): all that can be found once.

    Args:
        m: rows of activations, at least 1.
        k: columns of both.
        fp16: whether activations are fp16, not bf16.
        tiles: uint8 (T, ceil(K/256), tile_bytes).
        bias: (n,), contiguous, or None.
        n: rows of the weight.
        row: the weight type.
        device: the GPU of all tensors, of compute capability 9.0.
        chosen: forces a plan, to measure it.
    """

    def __init__(
        self,
        m: int,
        k: int,
        fp16: bool,
        tiles: Tensor,
        bias: Tensor | None,
        n: int,
        row: WeightType,
        device: Device,
        chosen: WgmmaPlan | None = None,
    ) -> None:
        self._plan = launch = plan(m, n, k, device) if chosen is None else chosen
        file, kernel, macros = _variant(launch.config, row, fp16)
        self._kernel = loader.load(file, kernel, macros, device.index)
        self._shape, self._fp16, self._bias, self._device = (m, n, k), fp16, bias, device
        self._bias_arguments = bias_arguments(bias)
        self._map = tile_map(device.index, tiles.data_ptr(), *tiles.shape[:2], row, launch.config.rows)
        self._shared_bytes = launch.config.shared_bytes(row)
        self._sums = 4 * launch.scratch_floats
        self.tiles = tiles

    @property
    def scratch_bytes(self) -> int:
        """Bytes of memory for sums and flags."""
        return self._sums + 8 * self._plan.scratch_flags

    def __call__(self, x: Tensor, y: Tensor, scratch: Tensor | None = None) -> None:
        """Launch the product.

        Args:
            x: bf16 or fp16 (M, K), rows and start 16-byte aligned.
            y: x's dtype (M, n), contiguous.
            scratch: uint8, `scratch_bytes` or more, with anything in it; launches of one stream may share it. By
                default it is allocated.
        """
        (m, n, k), launch, device = self._shape, self._plan, self._device
        if scratch is None:
            scratch = _scratch(launch, y.device)
        at, (bias_at, bias_kind) = scratch.data_ptr(), self._bias_arguments
        arguments = _ARGUMENTS.pack(
            *(y.data_ptr(), bias_at, at, at + self._sums, next(_tickets)),
            *(bias_kind, m, n, k, y.stride(0), launch.whole, self._map),
            x_map(device.index, x.data_ptr(), self._fp16, m, k, x.stride(0) * 2, launch.config.tokens),
        )
        self._kernel.launch(
            (launch.blocks, 1, 1),
            launch.config.threads,
            arguments,
            stream=stream(device),
            shared_bytes=self._shared_bytes,
            dependent=True,
        )


def linear(
    x: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    n: int,
    row: WeightType,
    y: Tensor,
    device: Device,
    chosen: WgmmaPlan | None = None,
) -> None:
    """Launch the product y = x Wᵀ (+ bias), see `Product`; `cuda.dispatch.linear` has checked the arguments."""
    m, k = x.shape
    Product(m, k, x.dtype is torch.float16, tiles, bias, n, row, device, chosen)(x, y)


def _scratch(launch: WgmmaPlan, device: torch.device) -> Tensor:
    """Return uninitialised memory for a launch's sums, then its flags."""
    return torch.empty(4 * launch.scratch_floats + 8 * launch.scratch_flags, dtype=torch.uint8, device=device)


# The driver encodes for a thread's current context only, and a thread that has not used CUDA yet has none.


def tile_pieces(row: WeightType) -> int:
    """Return the rows in which a tile is copied: at most 256 words wide, and multiples of 16 bytes."""
    return next(
        count for count in range(-(-row.tile_bytes // 1024), row.tile_bytes) if row.tile_bytes % (16 * count) == 0
    )


@lru_cache(maxsize=4096)
def tile_map(device: int, pointer: int, row_tiles: int, blocks: int, row: WeightType, rows: int) -> bytes:
    """Return the map by which tiles, `row_tiles` x `blocks` of them, are copied: `rows` rows at a time."""
    pieces = tile_pieces(row)
    width = row.tile_bytes // pieces
    with driver.current(driver.primary_context(device)):
        return tensor_map.encode(
            pointer,
            "uint32",
            sizes=(width // 4, blocks * pieces, row_tiles),
            strides=(width, blocks * row.tile_bytes),
            box=(width // 4, pieces, rows // TILE_ROWS),
        )


@lru_cache(maxsize=256)
def x_map(device: int, pointer: int, fp16: bool, m: int, k: int, stride: int, tokens: int) -> bytes:
    """Return the map by which x (m, k), rows `stride` bytes apart, is copied: 64 columns of `tokens` rows each."""
    dtype: Literal["bf16", "fp16"] = "fp16" if fp16 else "bf16"
    with driver.current(driver.primary_context(device)):
        return tensor_map.encode(
            pointer, dtype, sizes=(k, m), strides=(stride,), box=(64, tokens), swizzle_bytes=128
        )


@cache
def _variant(config: Config, row: WeightType, fp16: bool) -> Variant:
    macros = (
        ("Q6K_TOKENS", config.tokens),
        ("Q6K_CONSUMERS", config.consumers),
        ("Q6K_TILE_STAGES", config.stages(row)),
        ("Q6K_X_STAGES", config.x_stages),
        ("Q6K_OCCUPANCY", config.occupancy),
    )
    return FILE, KERNEL, common_macros(row, fp16) + macros


def variants(device: Device) -> list[Variant]:
    """Return every variant that `linear` may load on a GPU."""
    if device.arch != ARCH:
        return []
    kinds = product(CONFIGS, WEIGHT_TYPES.values(), (False, True))
    return [_variant(config, row, fp16) for config, row, fp16 in kinds]
