"""The decode kernels that a build compiles: those that the rows of `cuda.decode_plan` choose for some size.

At one K the rows split the numbers of row tiles into intervals, and a way to launch that fits a number of row tiles
fits every smaller one. So within an interval the ways follow one another, each up to the most row tiles that it
fits. These limits only fall as K grows: it is enough to look at the K where a row ends or a way last fits, and one
super-block further.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache

from q6k_kernels.cuda.decode_plan import ANY, ROWS, TOKENS, Choice, Kernel, choices, ranges_of, room_of
from q6k_kernels.cuda.device import Device
from q6k_kernels.formats.ggml import SUPER_BLOCK
from q6k_kernels.formats.types import WeightType

MOST_BLOCKS = 1 << 14
"""Super-blocks in a block's part of K: more than fit in any shared memory."""
MOST_ROW_TILES = 1 << 27
"""Row tiles of 2^31 rows."""


@lru_cache
def reached(weights: WeightType, device: Device) -> tuple[tuple[Kernel, bool], ...]:
    """Return the kernels that a weight type needs for some size, each with whether blocks split K."""
    kinds = [(tokens, quantized) for tokens in TOKENS for quantized in (False, True)]
    return tuple(sorted({each for kind in kinds for each in _reached(weights, *kind, device)}))


def _reached(weights: WeightType, tokens: int, quantized: bool, device: Device) -> Iterator[tuple[Kernel, bool]]:
    rows = [row for row in ROWS if weights.name in row.formats and tokens in row.tokens]
    tried = {row: choices(row, device, quantized) for row in rows}
    ends = {row.k // SUPER_BLOCK for row in rows if row.k < ANY}
    ends |= {_most_blocks(*way, tokens, weights, device) for ways in tried.values() for way in ways}
    for blocks in {1, *ends, *(end + 1 for end in ends)} - {0}:
        done = 0  # row tiles up to which something is chosen already
        for row in (row for row in rows if blocks * SUPER_BLOCK <= row.k):
            last = min(row.tiles * device.multiprocessors // blocks, MOST_ROW_TILES)
            for cluster, way in tried[row] if done < last else ():
                most = min(last, _most_row_tiles(cluster, way, tokens, blocks, weights, device))
                if most > done:
                    done = most
                    yield (tokens, way.fused, *way.shape), cluster > 1
            done = max(done, last)


@lru_cache
def _most_blocks(cluster: int, way: Choice, tokens: int, weights: WeightType, device: Device) -> int:
    """Return the most super-blocks of K at which a way to launch fits; 0 if it never fits."""

    def too_many(part: int) -> bool:
        return room_of(cluster, way, tokens, cluster * part, weights, device).row_tiles < 1

    return cluster * bisect_left(range(1, MOST_BLOCKS), True, key=too_many)


@lru_cache
def _most_row_tiles(
    cluster: int, way: Choice, tokens: int, blocks: int, weights: WeightType, device: Device
) -> int:
    """Return the most row tiles at which a way to launch fits for one K; 0 if it never fits."""
    room = room_of(cluster, way, tokens, blocks, weights, device)

    def too_many(row_tiles: int) -> bool:
        return ranges_of(cluster, way, row_tiles, room, device) is None

    return bisect_left(range(1, MOST_ROW_TILES + 1), True, key=too_many)
