"""The launch of products of up to 8 rows of activations, chosen from sizes alone: it can be tested anywhere.

`ROWS` is the choice; `plan` takes its first row for a size and then the first of the row's shapes that fits:

1. A block's shared memory holds a ring of tiles for each warp, the activations of its part of K and the sums
   of row tiles that several warps share. More tokens than fit are done in several launches.
2. With clusters (sm_90 and later) blocks may split K, so that long rows of activations fit. K is split over no more
   blocks than needed.

The C++ library chooses from the same rows, and `decode_kernels` derives from them which kernels there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from q6k_kernels.cuda.device import Device
from q6k_kernels.formats.ggml import SUPER_BLOCK, super_blocks
from q6k_kernels.formats.types import TILE_ROWS, WEIGHT_TYPES, WeightType

MOST_TOKENS = 8
TOKENS = (1, 2, 4, 8)
FUSED_TOKENS = 4
"""Most rows of activations for which it may pay that every block quantises them for itself."""
CLUSTERS = (1, 2, 4, 8)
CLUSTER_ARCH = 90
"""The least compute capability that has clusters."""
MOST_WAVES = 4
"""Most rounds of blocks. Each quantises or copies the activations again: if sums need more, K is split further."""


Shape = tuple[int, int, int]
"""Warps, stages and occupancy that the kernel is compiled for. Two blocks a multiprocessor overlap with the
launches before and after, worth most where a launch is short; one larger block sums fewer parts."""
TWO: tuple[Shape, ...] = ((8, 3, 2), (8, 2, 2))
DEEP: tuple[Shape, ...] = ((8, 4, 2), *TWO)
LARGE: tuple[Shape, ...] = ((16, 3, 1), (16, 2, 1))
LONG: tuple[Shape, ...] = ((8, 5, 1), (8, 3, 1))
SMALL: tuple[Shape, ...] = ((8, 2, 1),)
SHAPES = DEEP + LARGE + LONG + SMALL
LARGE_SHARED = 160 << 10
"""Bytes of a block's shared memory from which clusters are all that long activations need. With less, or without
clusters, `SMALL` is tried after a row's shapes: its rings leave the most room."""

Kernel = tuple[int, bool, int, int, int]
"""What the kernel is compiled for: tokens, fused, warps, stages, occupancy."""


@dataclass(frozen=True)
class DecodePlan:
    """One launch of the decode kernel.

    Attributes:
        tokens: rows of activations the kernel is compiled for.
        fused: whether every block quantises the activations for itself.
        warps: warps of a block.
        stages: tiles of a warp's ring.
        occupancy: blocks on a multiprocessor.
        cluster: blocks that split K.
        ranges: blocks, or clusters, that split the row tiles.
        early: whether tiles are requested before activations: all stages of a ring, two of them if `fused`.
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
    def kernel(self) -> Kernel:
        """What the kernel is compiled for."""
        return self.tokens, self.fused, self.warps, self.stages, self.occupancy


@dataclass(frozen=True)
class Choice:
    """A way to launch: shape, `fused` and `early` as in `DecodePlan`, and most blocks on a multiprocessor."""

    shape: Shape
    fused: bool
    early: bool
    resident: int

    @classmethod
    def of(cls, shape: Shape, fused: bool, early: bool = True, resident: int = 2) -> Choice:
        """Return a way to launch with `resident` blocks on a multiprocessor, or the shape's occupancy if lower."""
        return cls(shape, fused, early or not fused, min(resident, shape[2]))


@dataclass(frozen=True)
class Row:
    """A range of sizes, and the ways to launch them, the best first.

    Attributes:
        formats: weight types.
        tokens: rows of activations the kernel is compiled for.
        k: columns, rounded up to super-blocks, at most.
        tiles: tiles of weights a multiprocessor, rounded up, at most.
        fused: as in `DecodePlan`.
        early: as in `DecodePlan`.
        shapes: tried in this order.
        resident: blocks on a multiprocessor, at most.
    """

    formats: tuple[str, ...]
    tokens: tuple[int, ...]
    k: int
    tiles: int
    fused: bool
    early: bool
    shapes: tuple[Shape, ...]
    resident: int = 2

    def holds(self, format: str, tokens: int, k: int, tiles: int) -> bool:
        """Check whether the row is for a size."""
        return format in self.formats and tokens in self.tokens and k <= self.k and tiles <= self.tiles


BF16 = tuple(name for name, row in WEIGHT_TYPES.items() if row.scales[0].dtype == "BF16")
"""Weight types with a bf16 scale for each group."""
FOUR = tuple(name for name, row in WEIGHT_TYPES.items() if row.bits == 4)
"""Weight types with codes of four bits, whose tiles are the smallest."""
BOOKS = tuple(name for name, row in WEIGHT_TYPES.items() if row.book)
"""Weight types whose codes are looked up."""
FINE = tuple(name for name, row in WEIGHT_TYPES.items() if row.stepped and row.group == 16)
"""Weight types with two stepped scales for each 32 weights, whose kernels need the most registers."""
WIDER = tuple(name for name in WEIGHT_TYPES if name not in BF16 + FOUR)
OTHERS = FOUR + WIDER
ALL = BF16 + OTHERS
ANY = 1 << 62
"""More than any size."""
# `fused` and `early`: every block quantises, and requests activations after its first tiles (EARLY) or before them
# (LATE); or a separate launch quantises (APART).
EARLY, LATE, APART = (True, True), (True, False), (False, True)

# Fitted to measurements on an H200, see kernels/NOTES.md. Activations that are requested after a full ring of
# tiles wait for it. So where a launch is short, or activations are long, blocks that quantise request them first.
# The last row of a weight type and a number of tokens is for any size.
#   weight types, tokens, K and tiles at most; fused and early, shapes
ROWS = (
    Row(ALL, (1, 2), 8192, 10, *EARLY, LARGE),
    Row(ALL, (1, 2), 16383, 10, *LATE, LARGE),
    Row(FOUR, (1,), 16383, 48, *LATE, DEEP + LARGE, resident=1),
    Row(ALL, (1, 2), 16383, 48, *LATE, TWO + LARGE, resident=1),
    Row(BF16, (1,), 4096, ANY, *EARLY, ((8, 3, 2), *LARGE)),
    Row(OTHERS, (1,), 4096, ANY, *EARLY, (*DEEP, *LARGE)),
    Row(BOOKS, (1,), 16383, ANY, *APART, LARGE),
    Row(OTHERS, (1,), 16383, ANY, *APART, (*DEEP, *LARGE)),
    Row(ALL, (2,), 4096, ANY, *EARLY, LARGE),
    Row(ALL, (2,), 8192, ANY, *APART, TWO + LARGE),
    Row(ALL, (2,), 16383, ANY, *LATE, LARGE),
    Row(FINE, (2,), ANY, ANY, *APART, ((16, 3, 1), *SMALL)),  # with two stages it would spill
    Row(ALL, (1, 2), ANY, ANY, *APART, LARGE),
    Row(ALL, (4,), 8192, 10, *APART, LARGE),
    Row(ALL, (4,), 4096, ANY, *LATE, LARGE),
    Row(ALL, (4,), 8192, ANY, *APART, TWO + LARGE),
    Row(OTHERS, (8,), 8192, 10, *APART, LARGE),
    Row(BF16, (8,), 8192, 250, *APART, SMALL + LARGE),
    Row(FOUR, (8,), 8192, 60, *APART, LONG + LARGE),
    Row(FOUR, (8,), 8192, 400, *APART, LARGE + LONG),
    Row(WIDER, (8,), 8192, 150, *APART, ((8, 3, 1), *LARGE)),
    Row(ALL, (8,), 8192, ANY, *APART, LONG + LARGE),
    Row(ALL, (4, 8), ANY, ANY, *APART, SMALL + LARGE),
)


def choices(row: Row, device: Device, quantized: bool) -> list[tuple[int, Choice]]:
    """Return the cluster sizes and ways to launch a row's sizes, the best first; see `plan` for `quantized`."""
    small = device.arch < CLUSTER_ARCH or device.shared_bytes < LARGE_SHARED
    shapes = row.shapes + SMALL if small else row.shapes
    how = APART if quantized else (row.fused, row.early, row.resident)
    ways = [Choice.of(shape, *how) for shape in shapes]
    return list(product(CLUSTERS if device.arch >= CLUSTER_ARCH else (1,), ways))


@lru_cache(maxsize=4096)
def plan(
    m: int,
    n: int,
    k: int,
    row: WeightType,
    device: Device,
    forced: tuple[int, Choice] | None = None,
    quantized: bool = False,
) -> DecodePlan | None:
    """Return the launch for `m` rows (1..8) of activations, or None if so many do not fit in shared memory.

    Args:
        m: rows of activations.
        n: rows of the weight.
        k: columns of both.
        row: the weight type.
        device: the GPU's limits.
        forced: a cluster size and a choice, to measure them.
        quantized: whether the activations come in 8 bits.
    """
    tokens = tokens_of(m)
    row_tiles, blocks = -(-n // TILE_ROWS), super_blocks(k)
    tiles = -(-row_tiles * blocks // device.multiprocessors)
    chosen = next(each for each in ROWS if each.holds(row.name, tokens, blocks * SUPER_BLOCK, tiles))
    tried = choices(chosen, device, quantized) if forced is None else [forced]
    for cluster, way in tried:
        room = room_of(cluster, way, tokens, blocks, row, device)
        ranges = ranges_of(cluster, way, row_tiles, room, device)
        if ranges is not None:
            warps = way.shape[0]
            sums = 2 * warps if cluster == 1 else -(-row_tiles // ranges) + warps
            shared = room.taken + sums * room.sums_bytes
            return DecodePlan(tokens, way.fused, *way.shape, cluster, ranges, way.early, shared)
    return None


@dataclass(frozen=True)
class Room:
    """Shared memory of a block.

    Attributes:
        taken: bytes of its ring and activations.
        sums_bytes: bytes of a warp's sums of a row tile that it shares with others.
        row_tiles: most row tiles of a range whose sums fit in the rest; 0 or less if none.
    """

    taken: int
    sums_bytes: int
    row_tiles: int


def room_of(cluster: int, way: Choice, tokens: int, blocks: int, row: WeightType, device: Device) -> Room:
    """Return the room for sums beside a block's ring and its part of `blocks` super-blocks of activations."""
    warps, stages, occupancy = way.shape
    limit = min(device.shared_bytes, device.multiprocessor_shared_bytes // occupancy - 1024)
    codes, steps, parts = activation_bytes(tokens, way.fused)
    needed = codes + steps * (2 if row.offset else 1) + (parts if row.minimum else 0)
    activations = -(-blocks // cluster) * needed
    taken = warps * stages * row.tile_bytes + activations
    sums_bytes = TILE_ROWS * tokens * 4
    slots = (limit - taken) // sums_bytes
    if cluster == 1:  # only the first and the last row tile of a warp are shared
        return Room(taken, sums_bytes, ANY if slots >= 2 * warps else 0)
    return Room(taken, sums_bytes, slots - warps if cluster <= blocks else 0)


def ranges_of(cluster: int, way: Choice, row_tiles: int, room: Room, device: Device) -> int | None:
    """Return the number of ranges: as many as run at once, more if sums need it, None if they do not fit."""
    if room.row_tiles < 1:
        return None
    at_once = device.multiprocessors * way.resident
    ranges = max(min(row_tiles, max(1, at_once // cluster)), -(-row_tiles // room.row_tiles))
    return ranges if ranges <= MOST_WAVES * at_once and row_tiles * ranges < 1 << 31 else None


def activation_bytes(tokens: int, fused: bool) -> tuple[int, int, int]:
    """Return the bytes of a super-block's quantised activations, of their scales, and of their parts for minimums.

    As in `cuda/quantize.cuh`. The sums, for codes with an offset, take as many bytes as the scales.
    """
    return 4 * (64 * tokens + (16 if fused else 0)), 32 * tokens if tokens <= 4 else 256, 64 * tokens


def fits(n: int, k: int, row: WeightType, device: Device, m: int = 1) -> bool:
    """Check whether so many rows of activations of that length, 1 to 8, fit in a block's shared memory."""
    return plan(m, n, k, row, device) is not None


def tokens_of(m: int) -> int:
    """Return the rows that the kernel for `m` rows of activations is compiled for; 0 for more than there are."""
    return next((tokens for tokens in TOKENS if tokens >= m), 0)


def code_bytes(k: int, tokens: int = 1) -> tuple[int, int]:
    """Return the bytes of quantised rows of k activations, and of their scales, sums and parts, which follow."""
    blocks, (codes, steps, parts) = super_blocks(k), activation_bytes(tokens, False)
    return blocks * codes, blocks * (2 * steps + parts)
