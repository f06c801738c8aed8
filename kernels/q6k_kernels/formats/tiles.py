"""The layout of packed weights in memory: tiles, as the matrix units of a GPU read them.

A bundle keeps a weight as planes (see `formats.planes`), which any program can make and read. Kernels want each
byte where the thread that needs it reads. So a weight's planes become tiles when it is loaded: the same bits in
another order, in as many bytes.

A weight (N, K) of one of `formats.types` is one uint8 tensor `tiles` (T, B, tile_bytes), T = ceil(N / 16)
tiles of rows, B = K / 256 super-blocks; a stack (E, N, K) is (E, T, B, tile_bytes), so that `tiles[e]` is an
expert, without a copy. It is contiguous and 16-byte aligned. Rows past N are zero bytes, which are weights of zero.

A tile is 16 rows of 256 weights, q in -32..31 as two's complement of 6 bits:

    v = q & 63,  high = v >> 2 (4 bits),  low = v & 3
    lane = 4g + t         g = 0..7, t = 0..3: a thread of a warp
    row r = g + 8h        h = 0..1
    group j = 0..15       16 weights with one scale
    element e = 2t + (b & 1) + 8(b >> 1)    of a group; b = 0..3 are the four that a lane holds

    [0, 2048)     byte (2h + c) 512 + 16 lane + 4i + b, c = 0..1, i = 0..3: row r, element e, high of group 8c + 2i
                  in bits 0-3, of group 8c + 2i + 1 in bits 4-7
    [2048, 3072)  byte 2048 + 512h + 16 lane + 4i + b: row r, element e, low of groups 4i + {0,1,2,3} in bits
                  {0-1,2-3,4-5,6-7}
    q6_k, tile_bytes = 3584:
    [3072, 3584)  bfloat16 at 3072 + 32r + 2j: the scale of row r, group j
    q6_k_exact, tile_bytes = 3360:
    [3072, 3328)  byte 3072 + 16r + j: sub-scale + 128 of row r, group j
    [3328, 3360)  float16 at 3328 + 2r: d of row r

Lane and b are the order of fragment A of `mma.m16n8k16` with 16-bit types (PTX ISA, "Matrix Fragments for
mma.m16n8k16"): a lane's 16 bytes are its fragments of eight groups. Two's complement needs no offset of 32. A
row of a tile lies in pieces of 64 bytes, so that gathering one row reads little else.

Everything here is torch and runs on any device. Bits move in 64-bit words: single bytes would take far longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from q6k_kernels.formats.checks import PLANE_DTYPES, check_planes, found
from q6k_kernels.formats.ggml import SUPER_BLOCK
from q6k_kernels.formats.types import TILE_ROWS, WeightType

HIGH_BYTES, LOW_BYTES = 2048, 1024
PACK_WEIGHTS = 1 << 19
"""Weights packed or unpacked at a time; at most 8 bytes each, so that 4 MB stay in a cache."""

_CODES = HIGH_BYTES + LOW_BYTES
# The same bits of each of the eight bytes of a word.
_PAIRS, _NIBBLES, _SIX, _SIGNS = 0x0303030303030303, 0x0F0F0F0F0F0F0F0F, 0x3F3F3F3F3F3F3F3F, 0x2020202020202020


def tiles_shape(shape: tuple[int, ...], row: WeightType) -> tuple[int, ...]:
    """Return the shape of the tiles of a weight (N, K) or a stack (E, N, K)."""
    *lead, n, k = shape
    return *lead, -(-n // TILE_ROWS), k // SUPER_BLOCK, row.tile_bytes


def check_tiles(tiles: Tensor, n: int, row: WeightType, *, stack: bool = False) -> int:
    """Check the tiles of a weight with n rows, or of a stack of such weights, and return K.

    Raises:
        ValueError: they are not uint8 (T, B, tile_bytes) or, with `stack`, (E, T, B, tile_bytes), or not of n rows.
    """
    shape = tiles.shape
    if (
        tiles.dtype is not torch.uint8
        or not (len(shape) == 3 or (stack and len(shape) == 4 and shape[0] > 0))
        or shape[-1] != row.tile_bytes
        or shape[-2] < 1
        or not tiles.is_contiguous()
    ):
        shapes = "(T, B, tile_bytes)" + (" or (E, T, B, tile_bytes)" if stack else "")
        more = "" if stack or len(shape) != 4 else "; of a stack of experts take one, weight[expert]"
        raise ValueError(
            f"tiles of {row.name}: expected contiguous uint8 {shapes} with tile_bytes {row.tile_bytes}, found "
            f"{found(tiles)}, strides {tiles.stride()}{more}"
        )
    if n < 1 or shape[-3] != (n + TILE_ROWS - 1) // TILE_ROWS:
        raise ValueError(
            f"n: {shape[-3]} tiles of {TILE_ROWS} hold {TILE_ROWS * (shape[-3] - 1) + 1} to "
            f"{TILE_ROWS * shape[-3]} rows, found {n}"
        )
    return shape[-2] * SUPER_BLOCK


def pack(planes: Sequence[Tensor], row: WeightType) -> Tensor:
    """Pack planes into tiles.

    Args:
        planes: one tensor for each of `row.arrays`: (N, width) or (E, N, width), N >= 1.
        row: the weight type.

    Returns:
        New uint8 (T, B, tile_bytes) or (E, T, B, tile_bytes) on the planes' device.

    Raises:
        ValueError: a dtype is wrong, or the shapes do not agree.
    """
    shape = check_planes(planes, row, stack=True)
    tiles = torch.empty(tiles_shape(shape, row), dtype=torch.uint8, device=planes[0].device)
    pack_into(tiles, planes, row)
    return tiles


def pack_into(tiles: Tensor, planes: Sequence[Tensor], row: WeightType) -> None:
    """Pack planes into existing tiles: uint8, contiguous, of the shape that `tiles_shape` returns."""
    stack = planes[0].ndim == 3
    for index in range(len(planes[0]) if stack else 1):
        out, *matrix = (each[index] if stack else each for each in (tiles, *planes))
        for rows, part in _blocks(matrix[0].shape[0], out):
            _pack_block(part, [plane[rows] for plane in matrix], row)


def unpack(tiles: Tensor, n: int, row: WeightType) -> list[Tensor]:
    """Turn tiles back into planes, the inverse of `pack`.

    Args:
        tiles: uint8 (T, B, tile_bytes) or (E, T, B, tile_bytes).
        n: rows N.
        row: the weight type.

    Returns:
        New planes on the tiles' device, as `pack` takes them.

    Raises:
        ValueError: the dtype, the shape or n is wrong.
    """
    k, stack = check_tiles(tiles, n, row, stack=True), tiles.ndim == 4
    planes = [
        torch.empty(*tiles.shape[:-3], n, k // each.weights, dtype=PLANE_DTYPES[each.dtype], device=tiles.device)
        for each in row.arrays
    ]
    for index in range(len(tiles) if stack else 1):
        source, *matrix = (each[index] if stack else each for each in (tiles, *planes))
        for rows, part in _blocks(n, source):
            for plane, values in zip(matrix, _unpack_block(part, row), strict=True):
                plane[rows] = values[: rows.stop - rows.start]
    return planes


def order_rows(tiles: Tensor, order: Tensor, row: WeightType) -> None:
    """Reorder the rows of a weight in place: the new row i is the old row `order[i]`.

    Takes temporary memory of 0.6 times the size of the tiles.

    Args:
        tiles: uint8 (T, B, tile_bytes).
        order: int64 (N,), each of 0 to N-1 once, on the tiles' device.
        row: the weight type.
    """
    rest = torch.arange(len(order), TILE_ROWS * len(tiles), device=order.device)
    rows = torch.cat([order, rest]).view(-1, 2, 8)
    for field in _fields(tiles, row):
        field.copy_(field[rows // TILE_ROWS, rows // 8 % 2, rows % 8])


def codes_and_scales(tiles: Tensor, rows: slice | Tensor, row: WeightType) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of some rows of a weight.

    Args:
        tiles: uint8 (T, B, tile_bytes).
        rows: a slice from start to stop, or an integer tensor (R,) of rows in any order.
        row: the weight type.

    Returns:
        q float32 (R, K), the codes minus their offset, and s float32 (R, K/group), the scales.
    """
    if isinstance(rows, slice):
        first = rows.start // TILE_ROWS
        fields = _fields(tiles[first : -(-rows.stop // TILE_ROWS)], row)
        part = slice(rows.start - first * TILE_ROWS, rows.stop - first * TILE_ROWS)
        high, low, *scales = (field.flatten(0, 2)[part] for field in fields)
    else:
        at = rows // TILE_ROWS, rows // 8 % 2, rows % 8
        high, low, *scales = (field[at] for field in _fields(tiles, row))
    q = _four_q(high, low).view(torch.int8).float().mul_(0.25)
    return q, group_scales(_scales(scales, row), row)


def group_scales(scales: Sequence[Tensor], row: WeightType) -> Tensor:
    """Return the scales of groups, float32 (N, K/group), computed without rounding from the arrays of scales."""
    if not row.stepped:
        return scales[0].float()
    return scales[0].float() * scales[1].float().repeat_interleave(SUPER_BLOCK // row.group, -1)


def _blocks(n: int, tiles: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows with their tiles, about `PACK_WEIGHTS` weights at a time."""
    step = max(1, PACK_WEIGHTS // (TILE_ROWS * SUPER_BLOCK * tiles.shape[1]))
    for at in range(0, len(tiles), step):
        part = tiles[at : at + step]
        yield slice(at * TILE_ROWS, min((at + len(part)) * TILE_ROWS, n)), part


def _fields(tiles: Tensor, row: WeightType) -> list[Tensor]:
    """Return views of the fields of tiles: high, low and the arrays of scales. T, h and g of each number the row.

    high is int16 (T, h, g, B, c, i, b >> 1, t), low (T, h, g, B, i, b >> 1, t), so that a row's elements are in
    order, two in each word. The array scale is bfloat16 or uint8 (T, h, g, B, j), steps float16 (T, h, g, B).
    """
    t, b, _ = tiles.shape
    high = tiles[..., :HIGH_BYTES].view(torch.int16).view(t, b, 2, 2, 8, 4, 4, 2).permute(0, 2, 4, 1, 3, 6, 7, 5)
    low = tiles[..., HIGH_BYTES:_CODES].view(torch.int16).view(t, b, 2, 8, 4, 4, 2).permute(0, 2, 3, 1, 5, 6, 4)
    fields, at = [high, low], _CODES
    for array in row.scales:
        dtype = torch.uint8 if array.dtype == "I8" else PLANE_DTYPES[array.dtype]  # sub-scales are stored plus 128
        each = SUPER_BLOCK // array.weights
        end = at + TILE_ROWS * each * dtype.itemsize
        fields.append(tiles[..., at:end].view(dtype).view(t, b, 2, 8, each).movedim(1, 3))
        at = end
    return fields


def _pack_block(tiles: Tensor, planes: Sequence[Tensor], row: WeightType) -> None:
    """Pack rows of planes into their tiles. Works in place where it can, because fresh memory is slow."""
    ql, qh, *scales = planes
    n, b = len(ql), tiles.shape[1]
    # Two elements for every byte of ql, in the order of the weights.
    nibbles = ql.contiguous().to(torch.int16)
    nibbles |= nibbles << 4
    v = nibbles.view(torch.int64)  # (R, K/8)
    v &= _NIBBLES
    # qh's bytes of even and of odd elements side by side, then their four pairs apart.
    pairs, odd = (qh.reshape(n, -1, 2, 4)[:, :, parity].to(torch.int64) for parity in (0, 1))  # (R, K/32, 4)
    pairs |= odd.bitwise_left_shift_(8)
    pairs |= pairs << 28
    pairs &= 0x00000F0F00000F0F
    pairs |= pairs << 14
    pairs &= _PAIRS
    v |= pairs.bitwise_left_shift_(4).view(v.shape)
    v ^= _SIGNS  # q + 32 to two's complement
    high = (v >> 2).bitwise_and_(_NIBBLES).view(n, b, 8, 2, 2)  # (R, B, byte, group of it, b >> 1)
    low = v.bitwise_and_(_PAIRS).view(n, b, 4, 4, 2)
    packed = [
        (high[..., 0, :] | high[..., 1, :] << 4).view(torch.int16),
        (low[..., 0, :] | low[..., 1, :] << 2 | low[..., 2, :] << 4 | low[..., 3, :] << 6).view(torch.int16),
        *(scale.view(torch.uint8) ^ 0x80 if scale.dtype == torch.int8 else scale for scale in scales),
    ]
    for field, rows in zip(_fields(tiles, row), packed, strict=True):
        if n % TILE_ROWS:
            rows = torch.cat((rows, rows.new_zeros(-n % TILE_ROWS, *rows.shape[1:])))
        field.copy_(rows.reshape(field.shape))


def _unpack_block(tiles: Tensor, row: WeightType) -> list[Tensor]:
    """Return the planes of all rows of some tiles."""
    high, low, *scales = (field.flatten(0, 2) for field in _fields(tiles, row))
    n = len(high)
    u = (_four_q(high, low) >> 2 & _SIX) ^ _SIGNS
    nibbles = (u & _NIBBLES).view(torch.int16)
    ql = (nibbles | nibbles >> 4).to(torch.uint8)
    pairs = (u >> 4 & _PAIRS).view(n, -1, 4)
    both = pairs | pairs >> 14 | pairs >> 28 | pairs >> 42
    qh = torch.stack((both & 0xFF, both >> 8 & 0xFF), dim=2).to(torch.uint8).view(n, -1)
    return [ql, qh, *_scales(scales, row)]


def _four_q(high: Tensor, low: Tensor) -> Tensor:
    """Return int64 (R, K/8) with 4 * q in each byte, so that the byte's sign is that of q.

    Args:
        high: int16 (R, B, c, i, b >> 1, t), a field of some rows.
        low: int16 (R, B, i, b >> 1, t).
    """
    r, b = high.shape[:2]
    high_words = high.contiguous().view(r, b, 64).view(torch.int64).view(r, b, 4, 2, 2)
    low_words = low.contiguous().view(r, b, 32).view(torch.int64).view(r, b, 4, 2)
    halves = (high_words & _NIBBLES) << 4, high_words & ~_NIBBLES
    out = torch.empty(r, b, 4, 4, 2, dtype=torch.int64, device=high.device)  # (R, B, i of low, which, b >> 1)
    for which in range(4):
        pair = low_words << 2 if which == 0 else low_words >> 2 * (which - 1)
        torch.bitwise_or(halves[which % 2][:, :, :, which // 2], pair & _PAIRS << 2, out=out[:, :, :, which])
    return out.view(r, 32 * b)


def _scales(fields: Sequence[Tensor], row: WeightType) -> list[Tensor]:
    """Return the arrays of scales (R, K/weights) from the fields of some rows."""
    planes = [field.reshape(len(field), field.shape[1:].numel()) for field in fields]
    return [
        (plane ^ 0x80).view(torch.int8) if array.dtype == "I8" else plane
        for plane, array in zip(planes, row.scales, strict=True)
    ]
