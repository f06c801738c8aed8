"""The schedule of a persistent kernel (`cuda/persist.cuh`): a decoding step as rows of data, see `planning`."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from torch import Tensor

from q6k_kernels.cuda import decode_plan
from q6k_kernels.cuda.device import BIAS_KINDS
from q6k_kernels.formats.ggml import SUPER_BLOCK, super_blocks
from q6k_kernels.formats.types import TILE_ROWS, WeightType
from q6k_kernels.generate import attend_cuda

if TYPE_CHECKING:
    import torch

WARPS = 16
"""Warps of a block."""
CACHED_ROWS = 8
"""Rows that a block keeps in shared memory."""
CHUNKS = 4
"""Chunks of a stage."""
ATTENDING = 8
"""Warps of a block that attend."""
TILE_SUM_BYTES = 4 * TILE_ROWS * WARPS
"""Bytes of the sums of a row tile, of each row and warp."""
PRODUCT, ATTENTION = 0, 1
"""Kinds of rows, as the enum `RowKind` of `cuda/schedule.cuh`."""
NORM, VALUES, SAME = 0, 1, 2
"""What a product multiplies: its enum `Source`."""
WORDS, GATED, MEMORY = 0, 1, 2
"""What becomes of its outputs: its enum `Output`."""
BIAS_BYTES = {number: dtype.itemsize for dtype, number in BIAS_KINDS.items()}
_ROW = struct.Struct("@16P4f20i")
ROW_BYTES = _ROW.size


@dataclass
class ScheduleRow:
    """A row of the schedule, in the order of the struct `Row` of `cuda/schedule.cuh`.

    Attributes:
        tiles: the tiles of a product's weight.
        bias: its bias, or 0.
        input: words that it multiplies or sums up, or 0 in the first row; queries of attention.
        of_keys, of_values: words of the token's keys and values.
        output: words, or 16-bit values.
        after, weight: weights of the norms of the summand, or 0, and of the sum.
        keys, values: the cache of attention.
        cosines, sines: of rotary angles.
        q_norm, k_norm: norms of heads, or 0.
        growth: factors of scores by position, or 0.
        partials: words for the sums of blocks.
        factor, scale: of the summand and of the sum; `scale` also of scores.
        epsilon: of norms.
        softcap: of scores, 0 for none.
        kind, source, result: see above.
        gate: number of the activation function.
        type: 0, or 1 for the second weight type.
        bias_kind: its dtype.
        k, n: columns and rows of the weight; of attention, n is the size of all heads.
        row_tiles: row tiles of the weight.
        begin, total: the first unit among those of all rows that share their input, and how many these have; a unit
            is a row tile, or one of gates and one of what they gate.
        expects, tag: tags of the words that are read and written, counted from the step's first.
        slots, window: of the cache.
        heads: query heads of a block of attention.
        group: query heads of a key head.
        splits: blocks that share the keys of a head.
        rotated: values of a head that rotate.
        values_normed: whether values have a norm.
    """

    tiles: int = 0
    bias: int = 0
    input: int = 0
    of_keys: int = 0
    of_values: int = 0
    output: int = 0
    after: int = 0
    weight: int = 0
    keys: int = 0
    values: int = 0
    cosines: int = 0
    sines: int = 0
    q_norm: int = 0
    k_norm: int = 0
    growth: int = 0
    partials: int = 0
    factor: float = 1.0
    scale: float = 1.0
    epsilon: float = 0.0
    softcap: float = 0.0
    kind: int = PRODUCT
    source: int = VALUES
    result: int = WORDS
    gate: int = 0
    type: int = 0
    bias_kind: int = 0
    k: int = 0
    n: int = 0
    row_tiles: int = 0
    begin: int = 0
    total: int = 0
    expects: int = 0
    tag: int = 0
    slots: int = 0
    window: int = 0
    heads: int = 0
    group: int = 0
    splits: int = 0
    rotated: int = 0
    values_normed: int = 0

    @property
    def units(self) -> int:
        """Units of the row alone."""
        return self.row_tiles // 2 if self.result == GATED else self.row_tiles

    def packed(self) -> bytes:
        """Return the row as the kernel reads it."""
        return _ROW.pack(*vars(self).values())


@dataclass(frozen=True)
class Schedule:
    """A planned step.

    Attributes:
        rows: in their order.
        types: the one or two weight types of products.
        head_dim: size of attention's heads.
        hidden: hidden size.
        grid: blocks.
        logits: what the last row writes, (1, V) in 16 bits.
        memory: tensors that the rows point to, which must live as long.
    """

    rows: list[ScheduleRow]
    types: tuple[WeightType, ...]
    head_dim: int
    hidden: int
    grid: int
    logits: Tensor
    memory: list[Tensor]

    @property
    def most_tiles(self) -> int:
        """The most row tiles of a block in one row."""
        products = (row for row in self.rows if row.kind == PRODUCT)
        return max(-(-row.total // self.grid) * (2 if row.result == GATED else 1) for row in products)

    @property
    def spare_tiles(self) -> int:
        """Row tiles of a block whose sums fit where all rows but the last, or attention, need room anyway."""
        others = replace(self, rows=self.rows[:-1])
        room = max(self.activation_bytes + others.most_tiles * TILE_SUM_BYTES, attention_bytes(self.head_dim))
        return (room - self.activation_bytes) // TILE_SUM_BYTES

    @property
    def stage_bytes(self) -> int:
        """Bytes of a tile's place in the ring."""
        return max(row.tile_bytes for row in self.types)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the longest row of activations: codes, scales, sums, and parts for minimums."""
        blocks = max(super_blocks(row.k) for row in self.rows if row.kind == PRODUCT)
        return sum(decode_plan.code_bytes(blocks * SUPER_BLOCK))

    def shared_bytes(self, stages: int) -> int:
        """Return the shared memory of a block, whose ring of tiles has so many stages."""
        ring = WARPS * stages * self.stage_bytes + -(-(2 * stages * CHUNKS + 1) * 8 // 16) * 16
        small = CACHED_ROWS * ROW_BYTES + -(-self.hidden * 2 // 16) * 16 + 2 * WARPS * 4 + 16
        sums = self.most_tiles * TILE_SUM_BYTES
        return ring + small + max(self.activation_bytes + sums, attention_bytes(self.head_dim))


def attention_bytes(dim: int) -> int:
    """Return the shared memory of attention with heads of a size, as in `cuda/persist_attend.cuh`."""
    heads = attend_cuda.MOST_HEADS
    shared = (heads + 1) * (dim + 8) * 2 + dim * 2 + 2 * ATTENDING * heads * 4
    block = attend_cuda.Block(dim, ATTENDING, 1, codes=False)
    return -(-shared // 16) * 16 + (heads + 2) * dim * 2 + block.shared_bytes


def count_units(rows: list[ScheduleRow]) -> int:
    """Count the units of all products, and return how many all blocks await of every layer.

    If each block has a unit there, none begins a layer before all have read what was published two layers earlier,
    whose memory is used again.
    """
    widest, attended = [0], {row.expects for row in rows if row.kind == ATTENTION}
    for (kind, tag), group in groupby(rows, key=lambda row: (row.kind, row.tag)):
        together = list(group)
        if kind == ATTENTION:
            widest.append(0)
            continue
        at = 0
        for row in together:
            row.begin, at = at, at + row.units
        for row in together:
            row.total = at
        if tag not in attended:  # of which each block awaits only a part
            widest[-1] = max(widest[-1], at)
    return min(widest[1:])


def pieces(row: ScheduleRow, most: int, weights: WeightType, dtype: torch.dtype) -> list[ScheduleRow]:
    """Divide a product that writes to memory, whose sums do not fit in shared memory all at once.

    Args:
        row: its row.
        most: row tiles of a piece, at most.
        weights: its weight type.
        dtype: dtype of what it writes.
    """
    found = list[ScheduleRow]()
    for at in range(0, row.row_tiles, most):
        count, first = min(most, row.row_tiles - at), at * TILE_ROWS
        piece = replace(
            row,
            tiles=row.tiles + at * super_blocks(row.k) * weights.tile_bytes,
            bias=row.bias and row.bias + first * BIAS_BYTES[row.bias_kind],
            output=row.output + first * dtype.itemsize,
            n=min(row.n - first, count * TILE_ROWS),
            row_tiles=count,
            total=count,
            source=row.source if at == 0 else SAME,
        )
        found.append(piece)
    return found
