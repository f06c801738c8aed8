"""Tiles against the text of their layout, written out again element by element."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

import any_type
import ggml_blocks
import packed
from fp64 import assert_same_bits
from q6k_kernels.formats import blocks, words
from q6k_kernels.formats import planes as numpy_planes
from q6k_kernels.formats import tiles as prepack
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType, weight_type

Bytes = npt.NDArray[np.uint8]

ROWS = pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)
SHAPES = [(1, 1), (16, 1), (17, 2), (5, 3), (2, 16, 1), (3, 18, 2), (2, 1, 1)]
"""(N, tiles along K) or (E, N, tiles along K), see `shape_of`."""


def shape_of(shape: tuple[int, ...], row: WeightType) -> tuple[int, ...]:
    """Return (..., N, K): of blocks of 32 an odd number, 1, 9 or 17, so that the last tile is not full."""
    *lead, count = shape
    return *lead, count * 256 if row.block == 256 else 32 * (8 * (count - 1) + 1)


def planes(shape: tuple[int, ...], row: WeightType) -> list[torch.Tensor]:
    *lead, n, k = shape
    return any_type.planes(row, n, k, tuple(lead))


def stored_codes(arrays: Sequence[torch.Tensor], row: WeightType) -> Bytes:
    """Return the stored codes (N, K) of planes (N, width)."""
    codes = arrays[: len(arrays) - len(row.scales)]
    return numpy_planes.unpack([plane.view(torch.uint8).numpy() for plane in codes], row)


def expected_tiles(arrays: Sequence[torch.Tensor], row: WeightType) -> Bytes:
    """Return (T, B, tile_bytes) of planes (N, width), one weight at a time."""
    codes = stored_codes(arrays, row)
    n, k = codes.shape
    tiles = np.zeros((-(-n // 16), -(-k // 256), row.tile_bytes), dtype=np.uint8)
    for at in range(n):
        for column, u in enumerate(codes[at].tolist()):
            put(tiles[at // 16, column // 256], at % 16, column % 256, u, row)
    begin = 16 * 256 * row.bits // 8
    for array, plane in zip(row.scales, arrays[len(arrays) - len(row.scales) :], strict=True):
        each = 256 // array.weights
        raw = plane.view(torch.uint8).numpy().reshape(n, k // array.weights, -1)
        raw = raw ^ np.uint8(0x80) if array.dtype == "I8" else raw
        size = raw.shape[-1]
        for at in range(n):
            for element in range(raw.shape[1]):
                place = begin + (at % 16 * each + element % each) * size
                tiles[at // 16, element // each, place : place + size] = raw[at, element]
        begin += 16 * each * size
    return tiles


def put(tile: Bytes, r: int, column: int, u: int, row: WeightType) -> None:
    """Put stored code u of row r and a column into a tile."""
    g, h, (q, s), e = r % 8, r // 8, divmod(column // 16, 4), column % 16
    t, b = e % 8 // 2, e % 2 + 2 * (e // 8)
    lane = 4 * g + t
    if row.bits == 8:
        tile[(4 * h + q) * 512 + 16 * lane + 4 * s + b] = u
        return
    if row.book:
        tile[(2 * h + q // 2) * 512 + 16 * lane + 8 * (q % 2) + 2 * s + b // 2] |= u << 4 * (b % 2)
        return
    rest = row.bits - 4
    w = 2 * q + s % 2
    four, other = (u & 15, u >> 4) if s < 2 else (u >> rest, u & (1 << rest) - 1)
    tile[(2 * h + w // 4) * 512 + 16 * lane + 4 * (w % 4) + b] |= four << (0 if s < 2 else 4)
    if rest == 1:
        bit = 4 * (q % 2) + 2 * (s % 2) + (s < 2)
        tile[2048 + 256 * h + 8 * lane + 4 * (q // 2) + b] |= other << bit
    elif rest == 2:
        bit = 4 * (s % 2) + 2 * (s < 2)
        tile[2048 + 512 * h + 16 * lane + 4 * q + b] |= other << bit


@ROWS
@pytest.mark.parametrize("blocks", SHAPES)
def test_tiles_are_what_the_text_says(blocks: tuple[int, ...], row: WeightType) -> None:
    shape = shape_of(blocks, row)
    arrays = planes(shape, row)
    tiles = prepack.pack(arrays, row)
    assert (tiles.dtype, tiles.shape) == (torch.uint8, prepack.tiles_shape(shape, row))
    assert tiles.is_contiguous()
    for expert in range(shape[0] if len(shape) == 3 else 1):
        found, of = (tiles[expert], [a[expert] for a in arrays]) if len(shape) == 3 else (tiles, arrays)
        np.testing.assert_array_equal(found.numpy(), expected_tiles(of, row))
    for plane, back in zip(arrays, prepack.unpack(tiles, shape[-2], shape[-1], row), strict=True):
        assert_same_bits(back, plane)


@ROWS
def test_every_code_has_its_place(row: WeightType) -> None:
    """Each code at each place of a tile: one place that is mixed up with another differs somewhere."""
    count = 1 << row.bits
    places = np.random.default_rng(1).integers(0, count, (16, 256))
    scales = any_type.planes(row, 16, 256)[len(row.arrays) - len(row.scales) :]
    for shift in range(0, count, max(1, count // 64)):
        codes = ((places + shift) % count).astype(np.uint8)
        arrays = [torch.from_numpy(plane.copy()) for plane in numpy_planes.pack(codes, row)]
        arrays = [plane.view(torch.int8) for plane in arrays] if row.bits == 8 else arrays
        found, *_ = prepack.codes_and_scales(prepack.pack([*arrays, *scales], row), slice(0, 16), 256, row)
        np.testing.assert_array_equal(found.numpy(), numpy_planes.code_values(codes, row))


@ROWS
def test_every_bit_pattern_survives(row: WeightType) -> None:
    """NaN scales with their payloads too, negative zeros, subnormals."""
    n, every = 64, torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    arrays = []
    for array, plane in zip(row.arrays, any_type.planes(row, n, 256 * 16), strict=True):
        raw = every.repeat(n) if plane.dtype.itemsize == 2 else every.to(torch.uint8).repeat(n)
        arrays.append(raw[: plane.numel()].view(plane.dtype).view(plane.shape))
        assert array.weights <= 32 or arrays[-1].numel() == n * 16
    for plane, back in zip(arrays, prepack.unpack(prepack.pack(arrays, row), n, 256 * 16, row), strict=True):
        assert_same_bits(back, plane)


@pytest.mark.parametrize("weights", [1, 3 * 16 * 512, 1 << 30])
@ROWS
def test_blocks_of_rows_join_up(row: WeightType, weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = planes((2, 100, 512), row)
    tiles = prepack.pack(arrays, row)
    monkeypatch.setattr(prepack, "PACK_WEIGHTS", weights)
    assert torch.equal(prepack.pack(arrays, row), tiles)
    for plane, back in zip(arrays, prepack.unpack(tiles, 100, 512, row), strict=True):
        assert_same_bits(back, plane)


@ROWS
def test_planes_with_strides(row: WeightType) -> None:
    arrays = planes((20, 512), row)
    tiles = prepack.pack(arrays, row)
    wide = [torch.stack((plane, plane), -1)[..., 0] for plane in arrays]
    assert torch.equal(prepack.pack(wide, row), tiles)
    later = prepack.pack([plane[3:].clone() for plane in arrays], row)
    assert torch.equal(prepack.pack([plane[3:] for plane in arrays], row), later)


@pytest.mark.parametrize("kind", ["edges", "random"])
@ROWS
def test_rows_are_read_from_wherever_they_are(row: WeightType, kind: str) -> None:
    """Codes, scales and mins are those of `formats.planes`, of every kind of finite scale."""
    found = ggml_blocks.every_kind(row.ggml)[kind]
    n, count = 36, found.size // ggml_blocks.SIZES[row.ggml][1] // 36
    codes, arrays = blocks.decode(
        found.reshape(-1)[: n * count * ggml_blocks.SIZES[row.ggml][1]].reshape(n, -1), row
    )
    scale, least = numpy_planes.group_values(arrays, row)
    k, values = codes.shape[1], numpy_planes.code_values(codes, row)
    tiles = prepack.pack([*code_planes(codes, row), *scale_planes(arrays, row)], row)
    at = torch.tensor([35, 0, 8, 8, 15, 16, 31, 7])
    slices = [slice(*ends) for ends in ((0, n), (0, 16), (16, 36), (5, 6), (31, 33), (35, 36), (7, 33))]
    for index in (*slices, at, at.int(), at[:0]):
        q, s, m = prepack.codes_and_scales(tiles, index, k, row)
        where = index if isinstance(index, slice) else index.numpy()
        assert (q.dtype, s.dtype) == (torch.float32, torch.float32)
        np.testing.assert_array_equal(q.numpy(), values[where])
        np.testing.assert_array_equal(s.numpy(), scale[where])
        assert (m is None) == (least is None)
        if m is not None and least is not None:
            np.testing.assert_array_equal(m.numpy(), least[where])


def code_planes(codes: Bytes, row: WeightType) -> list[torch.Tensor]:
    return words.code_planes(torch.from_numpy(codes), row)


def scale_planes(arrays: dict[str, Any], row: WeightType) -> list[torch.Tensor]:
    dtypes = [plane.dtype for plane in any_type.planes(row, 1, 256)[len(row.arrays) - len(row.scales) :]]
    raw = [torch.from_numpy(np.ascontiguousarray(arrays[each.role]).view(np.uint8)) for each in row.scales]
    return [plane.view(dtype) for plane, dtype in zip(raw, dtypes, strict=True)]


@ROWS
def test_rows_are_ordered_in_place(row: WeightType) -> None:
    arrays, order = planes((37, 512), row), torch.randperm(37, generator=torch.Generator().manual_seed(2))
    tiles = prepack.pack(arrays, row)
    prepack.order_rows(tiles, order, row)
    assert torch.equal(tiles, prepack.pack([plane[order] for plane in arrays], row))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_stays_bounded() -> None:
    n, k = 2048, 8192  # 16 million weights: their codes at once would take 32 MB and more

    def memory(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) << 10

    arrays = torch.ones(n, k // 2).byte(), torch.ones(n, k // 4).byte(), torch.ones(n, k // 16).bfloat16()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    tiles = packed.tiles_of(*arrays)
    assert memory("VmHWM") - before < tiles.nbytes + (16 << 20)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    packed.untiled(tiles, n)
    assert memory("VmHWM") - before < tiles.nbytes + (16 << 20)


GOOD = {
    "ql": torch.zeros(3, 256, dtype=torch.uint8),
    "qh": torch.zeros(3, 128, dtype=torch.uint8),
    "scale": torch.zeros(3, 32, dtype=torch.bfloat16),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ql": GOOD["ql"].to(torch.int8)}, r"ql: .*\(E, N, K/2\), N >= 1, .* 256, found int8 \(3, 256\)"),
        ({"ql": torch.zeros(3, 64, dtype=torch.uint8)}, r"found uint8 \(3, 64\)"),
        ({"ql": torch.zeros(0, 256, dtype=torch.uint8)}, r"N >= 1.*found uint8 \(0, 256\)"),
        ({"ql": torch.zeros(1, 1, 3, 256, dtype=torch.uint8)}, r"found uint8 \(1, 1, 3, 256\)"),
        (
            {"ql": GOOD["ql"][None]},
            r"qh of q6_k: with ql of shape \(1, 3, 256\) expected uint8 \(1, 3, 128\), found .*\(3,",
        ),
        ({"scale": GOOD["scale"].half()}, r"scale of q6_k: .*bfloat16 \(3, 32\), found float16 \(3, 32\)"),
        ({"steps": torch.zeros(3, 2).half()}, r"scale of q6_k_exact: .*int8 \(3, 32\), found bfloat16"),
        ({"scale": None}, "planes: q6_k has ql, qh, scale; found 2 tensors"),
    ],
)
def test_pack_says_what_it_refuses(change: dict[str, Any], message: str) -> None:
    assert packed.tiles_of(**GOOD).shape == (1, 2, 3584)
    with pytest.raises(ValueError, match=message):
        packed.tiles_of(**(GOOD | change))


TILES = torch.zeros(2, 1, 3584, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tiles", "n", "message"),
    [
        (TILES, 16, r"n: 2 tiles of 16 hold 17 to 32 rows, found 16"),
        (TILES, 33, r"n: 2 tiles of 16 hold 17 to 32 rows, found 33"),
        (TILES[:0], 0, r"n: .*found 0"),
        (TILES.view(torch.int8), 17, r"tiles of q6_k: expected contiguous uint8 .*found int8 \(2, 1, 3584\)"),
        (TILES[..., :3000], 17, r"tile_bytes 3584, found uint8 \(2, 1, 3000\)"),
        (TILES[..., :3360], 17, r"contiguous.*found uint8 \(2, 1, 3360\), strides \(3584, 3584, 1\)"),
        (TILES[0], 17, r"found uint8 \(1, 3584\)"),
        (TILES[:, :0], 17, r"found uint8 \(2, 0, 3584\)"),
        (TILES[None, :, :][:0], 17, r"found uint8 \(0, 2, 1, 3584\)"),
    ],
)
def test_unpack_says_what_it_refuses(tiles: torch.Tensor, n: int, message: str) -> None:
    assert packed.untiled(TILES, 17)[0].shape == (17, 128)
    with pytest.raises(ValueError, match=message):
        packed.untiled(tiles, n)


@ROWS
def test_the_size_of_tiles_is_that_of_their_weight_type(row: WeightType) -> None:
    for each in WEIGHT_TYPES.values():
        if each.tile_bytes != row.tile_bytes:
            tiles = torch.zeros(2, 1, each.tile_bytes, dtype=torch.uint8)
            wrong = (
                rf"tiles of {row.name}: .*with tile_bytes {row.tile_bytes}, found uint8 \(2, 1, {each.tile_bytes}\)"
            )
            with pytest.raises(ValueError, match=wrong):
                prepack.unpack(tiles, 17, 256, row)


@pytest.mark.parametrize(
    ("name", "k"),
    [("q6_k", 512), ("q6_k", 0), ("q6_k", 288), ("q6_k", 192), ("q4_0", 256), ("q4_0", 544), ("q4_0", 300)],
)
def test_k_is_of_whole_blocks_that_fill_these_tiles(name: str, k: int) -> None:
    row = weight_type(name)
    tiles = torch.zeros(2, 1 if row.block == 256 else 2, row.tile_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"k: . tiles .* and {name} has multiples of {row.block}; found {k}$"):
        prepack.check_tiles(tiles, 17, k, row)
    for good in (256,) if row.block == 256 else (288, 320, 512):
        prepack.check_tiles(tiles, 17, good, row)
