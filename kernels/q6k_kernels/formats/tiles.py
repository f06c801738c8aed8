"""The layout of packed weights in memory: tiles, as the matrix units of a GPU read them.

A bundle keeps a weight as planes (see `formats.planes`), which any program can make and read. Kernels want each
byte where the thread that needs it reads. So a weight's planes become tiles when it is loaded: the same bits in
another order, each tile filled up with zeros to whole lines of 128 bytes.

A weight (N, K) of one of `formats.types` is one uint8 tensor `tiles` (T, B, tile_bytes), T = ceil(N / 16)
tiles of rows, B = ceil(K / 256) super-blocks; a stack (E, N, K) is (E, T, B, tile_bytes), so that `tiles[e]` is an
expert, without a copy. It is contiguous and 16-byte aligned. Rows past N and columns past K are zero bytes, which
are weights of zero.

A tile is 16 rows of 256 weights. For the matrix units, 16 weights of a row make a group, a "sixteen", whatever
the type's own groups are. Stored codes u:

    lane = 4g + t         g = 0..7, t = 0..3: a thread of a warp
    row r = g + 8h        h = 0..1
    sixteen 4q + s        q = 0..3: a quarter, 64 weights; s = 0..3
    element e = 2t + (b & 1) + 8(b >> 1)    of a sixteen; b = 0..3 are the four that a lane holds

    4, 5, 6 bits: four bits of u in one place, the other L = bits - 4 in another. For s = 0, 1 the four are the low
    bits, for s = 2, 3 the high ones: then both sixteens of a byte become numbers without moving their nibbles.
    [0, 2048)     byte (2h + (w >> 2)) 512 + 16 lane + 4(w & 3) + b, w = 2q + (s & 1): row r, element e, the four
                  bits in bits 0-3 for s = 0, 1 and in bits 4-7 for s = 2, 3
    L = 1: [2048, 2560)  byte 2048 + 256h + 8 lane + 4(q >> 1) + b: row r, element e, the other bit of s = 2, 3 in
                  bit 4(q & 1) + 2(s & 1), of s = 0, 1 in the one above
    L = 2: [2048, 3072)  byte 2048 + 512h + 16 lane + 4q + b: row r, element e, the other bits of s = 2, 3 in bits
                  4(s & 1) and above, of s = 0, 1 two bits further
    a code book:
    [0, 2048)     of the two bytes from (2h + (q >> 1)) 512 + 16 lane + 8(q & 1) + 2s on, row r, nibble b is
                  element e: in order, as a table look-up wants them
    8 bits:
    [0, 4096)     byte (4h + q) 512 + 16 lane + 4s + b: row r, element e

    Then the arrays of scales in the row's order, each with the elements of row 0, of row 1, ... one after another.
    int8 elements are kept plus 128.

Lane and b are the order of fragment A of `mma.m16n8k16` with 16-bit types (PTX ISA, "Matrix Fragments for
mma.m16n8k16"): a lane's 16 bytes are its fragments of eight sixteens. A row of a tile lies in pieces of 64 bytes,
so that gathering one row reads little else.

Everything here is torch and runs on any device; `words` moves the bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from q6k_kernels.formats import words
from q6k_kernels.formats.checks import PLANE_DTYPES, check_planes, found
from q6k_kernels.formats.ggml import SUPER_BLOCK, super_blocks
from q6k_kernels.formats.types import TILE_ROWS, WeightType

PACK_WEIGHTS = 1 << 19
"""Weights packed or unpacked at a time; at most 8 bytes each, so that 4 MB stay in a cache."""


def tiles_shape(shape: tuple[int, ...], row: WeightType) -> tuple[int, ...]:
    """Return the shape of the tiles of a weight (N, K) or a stack (E, N, K)."""
    *lead, n, k = shape
    return *lead, -(-n // TILE_ROWS), super_blocks(k), row.tile_bytes


def check_tiles(tiles: Tensor, n: int, k: int, row: WeightType, *, stack: bool = False) -> None:
    """Check the tiles of a weight (n, k), or of a stack of such weights.

    Raises:
        ValueError: they are not uint8 (T, B, tile_bytes) or, with `stack`, (E, T, B, tile_bytes), or not of n rows
            of k weights.
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
    if k < 1 or k % row.block or shape[-2] != super_blocks(k):
        raise ValueError(
            f"k: {shape[-2]} tiles of {SUPER_BLOCK} columns hold {SUPER_BLOCK * (shape[-2] - 1) + 1} to "
            f"{SUPER_BLOCK * shape[-2]} weights of a row, and {row.name} has multiples of {row.block}; found {k}"
        )


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


def unpack(tiles: Tensor, n: int, k: int, row: WeightType) -> list[Tensor]:
    """Turn tiles back into planes, the inverse of `pack`.

    Args:
        tiles: uint8 (T, B, tile_bytes) or (E, T, B, tile_bytes).
        n: rows N.
        k: weights of a row, K.
        row: the weight type.

    Returns:
        New planes on the tiles' device, as `pack` takes them.

    Raises:
        ValueError: the dtype, the shape, n or k is wrong.
    """
    check_tiles(tiles, n, k, row, stack=True)
    stack = tiles.ndim == 4
    planes = [
        torch.empty(*tiles.shape[:-3], n, k // each.weights, dtype=PLANE_DTYPES[each.dtype], device=tiles.device)
        for each in row.arrays
    ]
    for index in range(len(tiles) if stack else 1):
        source, *matrix = (each[index] if stack else each for each in (tiles, *planes))
        for rows, part in _blocks(n, source):
            for plane, values in zip(matrix, _unpack_block(part, row), strict=True):
                plane[rows] = values[: rows.stop - rows.start, : plane.shape[1]]
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


def codes_and_scales(
    tiles: Tensor, rows: slice | Tensor, k: int, row: WeightType
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the codes, scales and mins of some rows of a weight.

    Args:
        tiles: uint8 (T, B, tile_bytes).
        rows: a slice from start to stop, or an integer tensor (R,) of rows in any order.
        k: weights of a row, K.
        row: the weight type.

    Returns:
        codes float32 (R, K), minus their offset or looked up; scale and min, or None, float32 (R, K/group).
    """
    if isinstance(rows, slice):
        first = rows.start // TILE_ROWS
        part = slice(rows.start - first * TILE_ROWS, rows.stop - first * TILE_ROWS)
        fields = [field.flatten(0, 2)[part] for field in _fields(tiles[first : -(-rows.stop // TILE_ROWS)], row)]
    else:
        at = rows // TILE_ROWS, rows // 8 % 2, rows % 8
        fields = [field[at] for field in _fields(tiles, row)]
    count = _code_fields(row)
    scale, least = group_scales(_scales(fields[count:], row), row)
    groups = k // row.group
    return (
        words.code_values(words.join(fields[:count], row)[:, :k], row),
        scale[:, :groups],
        None if least is None else least[:, :groups],
    )


def group_scales(scales: Sequence[Tensor], row: WeightType) -> tuple[Tensor, Tensor | None]:
    """Return the scales and mins, or None, of groups, float32 (N, K/group), without rounding from their arrays."""
    arrays = {each.role: values for each, values in zip(row.scales, scales, strict=True)}

    def times(role: str, steps: str) -> Tensor:
        values = arrays[role].float()
        return (
            values * arrays[steps].float().repeat_interleave(SUPER_BLOCK // row.group, -1)
            if row.stepped
            else values
        )

    if row.scales[0].dtype == "U8" and not row.stepped:
        return _half_e8m0(arrays["scale"]), None
    return times("scale", "steps"), times("min", "min_steps") if row.minimum else None


def _half_e8m0(exponents: Tensor) -> Tensor:
    """Return 2 ** (e - 128) for e from 0 to 255, as float32; two of them are subnormal."""
    e = exponents.int()
    return torch.where(e < 2, 0x00200000 << e, (e - 1) << 23).view(torch.float32)


def _blocks(n: int, tiles: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows with their tiles, about `PACK_WEIGHTS` weights at a time."""
    step = max(1, PACK_WEIGHTS // (TILE_ROWS * SUPER_BLOCK * tiles.shape[1]))
    for at in range(0, len(tiles), step):
        part = tiles[at : at + step]
        yield slice(at * TILE_ROWS, min((at + len(part)) * TILE_ROWS, n)), part


def _used_bytes(row: WeightType) -> int:
    """Return the bytes of a tile without those that fill its last line."""
    weights = TILE_ROWS * SUPER_BLOCK
    return sum(weights // array.weights * PLANE_DTYPES[array.dtype].itemsize for array in row.arrays)


def _code_fields(row: WeightType) -> int:
    """Return the number of fields that hold codes."""
    return 2 if row.high_bits else 1


def _fields(tiles: Tensor, row: WeightType) -> list[Tensor]:
    """Return views of the fields of tiles, each with T, h and g, which number the row, first; then B.

    Codes are int16, so that a row's elements are in order, two in each word: four bits (T, h, g, B, w, b >> 1, t),
    or with a code book (T, h, g, B, sixteen, t); the other bits (T, h, g, B, word, b >> 1, t); the codes of 8 bits
    (T, h, g, B, sixteen, b >> 1, t). An array of scales is (T, h, g, B, element).
    """
    t, b, _ = tiles.shape
    top, low = TILE_ROWS * SUPER_BLOCK // (1 if row.bits == 8 else 2), 2 * row.high_bits
    top_bits = tiles[..., :top].view(torch.int16)
    fields = [top_bits.view(t, b, 2, -1, 8, 4, 4, 2).permute(0, 2, 4, 1, 3, 6, 7, 5)]
    at = top
    if low:
        at += 256 * low
        low_bits = tiles[..., top:at].view(torch.int16)
        fields.append(low_bits.view(t, b, 2, 8, 4, low, 2).permute(0, 2, 3, 1, 5, 6, 4))
    for array in row.scales:
        dtype = torch.uint8 if array.dtype == "I8" else PLANE_DTYPES[array.dtype]  # kept plus 128
        each = SUPER_BLOCK // array.weights
        end = at + TILE_ROWS * each * dtype.itemsize
        fields.append(tiles[..., at:end].view(dtype).view(t, b, 2, 8, each).movedim(1, 3))
        at = end
    return fields


def _pack_block(tiles: Tensor, planes: Sequence[Tensor], row: WeightType) -> None:
    """Pack rows of planes into their tiles."""
    count = len(planes) - len(row.scales)
    v = words.of_planes(planes[:count], row)
    missing = 32 * tiles.shape[1] - v.shape[1]
    packed = words.split(torch.nn.functional.pad(v, (0, missing)) if missing else v, tiles.shape[1], row)
    for plane, array in zip(planes[count:], row.scales, strict=True):
        scale = plane.view(torch.uint8) ^ 0x80 if array.dtype == "I8" else plane
        width = tiles.shape[1] * (SUPER_BLOCK // array.weights)
        if missing:
            scale = torch.cat((scale, scale.new_zeros(len(scale), width - scale.shape[1])), 1)
        packed.append(scale)
    tiles[..., _used_bytes(row) :] = 0
    for field, rows in zip(_fields(tiles, row), packed, strict=True):
        if len(v) % TILE_ROWS:
            rows = torch.cat((rows, rows.new_zeros(-len(v) % TILE_ROWS, *rows.shape[1:])))
        field.copy_(rows.reshape(field.shape))


def _unpack_block(tiles: Tensor, row: WeightType) -> list[Tensor]:
    """Return the planes of all rows of some tiles, with K rounded up to whole tiles."""
    fields, count = [field.flatten(0, 2) for field in _fields(tiles, row)], _code_fields(row)
    return [*words.code_planes(words.join(fields[:count], row), row), *_scales(fields[count:], row)]


def _scales(fields: Sequence[Tensor], row: WeightType) -> list[Tensor]:
    """Return the arrays of scales (R, elements) from the fields of some rows."""
    planes = [field.reshape(len(field), field.shape[1:].numel()) for field in fields]
    return [
        (plane ^ 0x80).view(torch.int8) if array.dtype == "I8" else plane
        for plane, array in zip(planes, row.scales, strict=True)
    ]
