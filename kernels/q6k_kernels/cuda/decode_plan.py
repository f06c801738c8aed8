"""How products of up to 8 rows of activations are launched: chosen from sizes alone, so it can be tested anywhere.

What decides it:

1. A block's shared memory holds a ring of tiles for each warp, the activations of its part of K and the sums
   of row tiles that several warps share. More tokens than fit are done in several launches.
2. With clusters (sm_90 and later) blocks may split K, so that long rows of activations fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from q6k_kernels.cuda.device import Device
from q6k_kernels.formats.ggml import SUPER_BLOCK
from q6k_kernels.formats.types import TILE_ROWS, WeightType

MOST_TOKENS = 8
TOKENS = (1, 2, 4, 8)
FUSED_TOKENS = 4
"""Rows of activations up to which it may pay that every block quantises them for itself."""
CLUSTERS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """One launch.

    Attributes:
        tokens: rows of activations the kernel is compiled for.
        fused: whether every block quantises the activations for itself.
        warps: of a block.
        stages: tiles of a warp's ring.
        occupancy: blocks on a multiprocessor.
        cluster: blocks that split K.
        ranges: blocks, or clusters, that split the row tiles.
        early: whether rings are filled, if `fused` two stages of them, before activations are asked for.
        shared_bytes: shared memory of a block.
    """

    tokens: int
    fused: bool
    warps: int
    stages: int
    occupancy: int
    cluster: int
    ranges: int
    early: bool
    shared_bytes: int

    @property
    def kernel(self) -> tuple[int, bool, int, int, int]:
        """What the kernel is compiled for: tokens, fused, warps, stages, occupancy."""
        return self.tokens, self.fused, self.warps, self.stages, self.occupancy


SHAPES = ((8, 3, 2), (8, 2, 2), (16, 3, 1), (16, 2, 1), (8, 2, 1))
"""Warps, stages and occupancy that the kernel is compiled for. Two blocks a multiprocessor overlap with the
launches before and after, worth most where a launch is short; one larger block sums fewer parts."""
MOST_WAVES = 4
"""Rounds of blocks: each quantises or copies the activations again, so where sums need more, K is split further."""


@dataclass(frozen=True)
class Choice:
    """A way to launch that is tried, if it fits: its shape, and what `Plan` says of the rest."""

    shape: tuple[int, int, int]
    fused: bool
    early: bool
    resident: int

    @classmethod
    def of(cls, shape: tuple[int, int, int], fused: bool, early: bool = True, resident: int = 0) -> Choice:
        """`resident` blocks a multiprocessor; by default as many as fit."""
        return cls(shape, fused, early or not fused, resident or shape[2])


def choices(tokens: int, k: int, tiles: float, exact: bool, device: Device) -> list[Choice]:
    """Ways to launch, the best first: fitted to measurements on an H200, see kernels/NOTES.md.

    Args:
        tokens: rows of activations the kernel is compiled for.
        k: columns.
        tiles: of weights, for each multiprocessor.
        row: the weight type.
        device: what the GPU offers.
    """
    # Activations that come after a full ring of tiles wait for it: where a launch is short, or activations are
    # long, blocks that quantise them ask for them first.
    short = 10 < tiles <= 48
    fused = tokens <= 2 and k < 16384 and (k <= 4096 or tiles <= 48 or (tokens == 2 and k > 8192))
    fused = fused or (2 < tokens <= FUSED_TOKENS and k <= 4096 and tiles > 10)
    early = not short and k <= 8192 and tokens <= 2
    if device.shared_bytes < 160 << 10:
        return [Choice.of((8, 2, 1), fused, early)]
    two = [Choice.of(shape, fused, early, int(fused)) for shape in SHAPES if shape[2] == 2]
    large = [Choice.of(shape, fused, early) for shape in SHAPES if shape[0] == 16]
    if device.arch < 90:  # no clusters to split long activations over: smaller rings make room
        large.append(Choice.of((8, 2, 1), fused, early))
    if tokens == 1 and not fused:
        return [Choice.of((8, 3, 2), False)] * (exact and k < 16384) + large
    if fused and tokens <= 2:
        overlapping = tokens == 1 and k <= 4096 and tiles > 48
        return two + large if short else [Choice.of((8, 2 if exact else 3, 2), fused, early)] * overlapping + large
    if fused or (tokens == 2 and k > 8192):
        return large
    small = [Choice.of((8, 2, 1), False)]
    if k > 8192:
        return small + large
    if tokens <= 4:
        return two + large if tiles > 10 else large
    if exact or tiles > 250:
        return [Choice.of((8, 2, 2), False), *large] if tiles > 10 else large
    return small + large


@lru_cache(maxsize=4096)
def plan(
    m: int,
    n: int,
    k: int,
    row: WeightType,
    device: Device,
    forced: tuple[int, Choice] | None = None,
    quantized: bool = False,
) -> Plan | None:
    """The launch for `m` rows (1..8) of activations, or None if so many do not fit in shared memory.

    K is split over no more blocks than it takes to fit.

    Args:
        m: rows of activations.
        n: rows of the weight.
        k: columns of both.
        row: the weight type.
        device: what the GPU offers.
        forced: a cluster size and a choice, to measure them.
        quantized: whether the activations come in 8 bits.
    """
    tokens = next(t for t in TOKENS if t >= m)
    row_tiles, blocks = -(-n // TILE_ROWS), k // SUPER_BLOCK
    clusters = [c for c in CLUSTERS if c <= min(blocks, 8 if device.arch >= 90 else 1)]
    tiles = row_tiles * blocks / device.multiprocessors
    tried = list(product(clusters, choices(tokens, k, tiles, row.stepped, device))) if forced is None else [forced]
    if quantized:
        tried = [(cluster, Choice.of(choice.shape, False)) for cluster, choice in tried]
    for cluster, choice in tried:
        blocks_at_once = device.multiprocessors * choice.resident
        ranges = min(row_tiles, max(1, blocks_at_once // cluster))
        kernel = tokens, choice.fused, *choice.shape
        fitting = _shared_bytes(kernel, row_tiles, blocks, cluster, ranges, row, device)
        if fitting is not None and fitting[0] <= MOST_WAVES * blocks_at_once and row_tiles * fitting[0] < 1 << 31:
            return Plan(*kernel, cluster, fitting[0], choice.early, fitting[1])
    return None


def _shared_bytes(
    kernel: tuple[int, bool, int, int, int],
    row_tiles: int,
    blocks: int,
    cluster: int,
    ranges: int,
    row: WeightType,
    device: Device,
) -> tuple[int, int] | None:
    """Ranges, more if need be, and shared memory of a block; None if it does not fit."""
    tokens, fused, warps, stages, occupancy = kernel
    limit = min(device.shared_bytes, device.multiprocessor_shared_bytes // occupancy - 1024)
    ring = warps * stages * row.tile_bytes
    activations = -(-blocks // cluster) * sum(activation_bytes(tokens, fused))
    slot = TILE_ROWS * tokens * 4  # sums of a row tile that a warp shares with others
    slots = 2 * warps
    if cluster > 1:
        most_rows = (limit - ring - activations) // slot - warps
        if most_rows < 1:
            return None
        ranges = max(ranges, -(-row_tiles // most_rows))
        slots = -(-row_tiles // ranges) + warps
    needed = ring + activations + slots * slot
    return None if needed > limit else (ranges, needed)


def activation_bytes(tokens: int, fused: bool) -> tuple[int, int]:
    """Bytes of quantised activations of a super-block, and of their scales, as `cuda/decode.cuh` lays them out."""
    return 4 * (64 * tokens + (16 if fused else 0)), 32 * tokens if tokens <= 4 else 256


def fits(n: int, k: int, row: WeightType, device: Device) -> bool:
    """Whether at least one row of activations of that length fits in a block's shared memory."""
    return plan(1, n, k, row, device) is not None


def code_bytes(k: int) -> tuple[int, int]:
    """Bytes of one quantised row of k activations, and of their scales, which lie behind them."""
    codes, steps = activation_bytes(1, False)
    return k // SUPER_BLOCK * codes, k // SUPER_BLOCK * steps
