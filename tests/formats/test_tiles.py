"""Tiles against the text of their layout, written out again element by element."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

import oracles
import packed
from gguf_builder import q6k_blocks
from packed import planes

torch = pytest.importorskip("torch")

from q6k_kernels.formats import tiles as prepack
from q6k_kernels.formats.types import row_of

Scales = Literal["bf16", "exact"]
Bytes = npt.NDArray[np.uint8]

SHAPES = [(1, 256), (16, 256), (17, 512), (5, 1024), (32, 768), (47, 256), (2, 16, 256), (3, 18, 512), (2, 1, 256)]


def expected_tiles(shape: tuple[int, ...], scales: str, expert: int = 0, seed: int = 5) -> Bytes:
    """(T, B, tile_bytes) of the same blocks, one weight at a time."""
    n, k = shape[-2:]
    data = q6k_blocks(int(np.prod(shape)) // 256, seed)[expert * n * k // 256 * 210 :]
    tiles = np.zeros((-(-n // 16), k // 256, 3584 if scales == "bf16" else 3456), dtype=np.uint8)
    for row in range(n):
        for block in range(k // 256):
            at = (row * k // 256 + block) * 210
            codes, products = oracles.q6k_block(data[at : at + 210])
            tile, r = tiles[row // 16, block], row % 16
            g, h = r % 8, r // 8
            for j in range(16):
                for element in range(16):
                    u = codes[16 * j + element] + 32
                    t, b = element % 8 // 2, element % 2 + 2 * (element // 8)
                    lane = 4 * g + t
                    q, s = j // 4, j % 4
                    w, low = 2 * q + (s & 1), s < 2
                    four, two = (u & 15, u >> 4) if low else (u >> 2, u & 3)
                    tile[(2 * h + (w >> 2)) * 512 + lane * 16 + 4 * (w & 3) + b] |= four << (0 if low else 4)
                    tile[2048 + h * 512 + lane * 16 + 4 * q + b] |= two << 4 * (s & 1) + (2 if low else 0)
                if scales == "bf16":
                    bits = oracles.bf16(products[j])
                    tile[3072 + 32 * r + 2 * j], tile[3073 + 32 * r + 2 * j] = bits & 0xFF, bits >> 8
                else:
                    tile[3072 + 16 * r + j] = data[at + 192 + j] ^ 0x80
            if scales == "exact":
                tile[3328 + 2 * r], tile[3329 + 2 * r] = data[at + 208], data[at + 209]
    return tiles


@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_what_the_text_says(shape: tuple[int, ...], scales: Scales) -> None:
    tiles = packed.tiles_of(**planes(shape, scales))
    assert (tiles.dtype, tiles.shape) == (torch.uint8, prepack.tiles_shape(shape, row_of("Q6_K", scales)))
    assert tiles.is_contiguous()
    for expert in range(shape[0] if len(shape) == 3 else 1):
        found = tiles[expert] if len(shape) == 3 else tiles
        np.testing.assert_array_equal(found.numpy(), expected_tiles(shape, scales, expert))


def test_every_code_has_its_place() -> None:
    """Each of the 64 codes at each place of a tile: one place that is mixed up with another differs somewhere."""
    places = np.random.default_rng(1).integers(0, 64, (16, 256))
    for shift in range(64):
        codes = (places + shift) % 64
        rows = [oracles.planes_of_row((row - 32).tolist()) for row in codes.astype(int)]
        ql, qh = (torch.tensor([list(row[which]) for row in rows], dtype=torch.uint8) for which in (0, 1))
        tiles = packed.tiles_of(ql, qh, torch.ones(16, 16).bfloat16())
        q, s, _ = prepack.codes_and_scales(tiles, slice(0, 16), 256, packed.row(tiles))
        np.testing.assert_array_equal(q.numpy(), codes - 32)
        assert (s == 1).all()


@pytest.mark.parametrize("scales", ["bf16", "exact"])
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_gives_the_planes_back(shape: tuple[int, ...], scales: Scales) -> None:
    arrays = planes(shape, scales)
    found = packed.untiled(packed.tiles_of(**arrays), shape[-2])
    for (role, plane), back in zip(arrays.items(), found, strict=True):
        assert (back.dtype, back.shape) == (plane.dtype, plane.shape), role
        assert torch.equal(back.view(torch.uint8), plane.view(torch.uint8)), role


def test_every_bit_pattern_survives() -> None:
    """NaN scales with their payloads too, negative zeros, subnormals."""
    ql = torch.arange(16 * 128).to(torch.uint8).view(16, 128)
    qh = torch.arange(16 * 64).mul(37).to(torch.uint8).view(16, 64)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for at in range(0, 1 << 16, 256):
        scale = every[at : at + 256].view(torch.bfloat16).view(16, 16)
        steps = every[at : at + 16].view(torch.float16).view(16, 1)
        sub_scales = torch.arange(256).to(torch.int8).view(16, 16)
        for arrays in ((ql, qh, scale), (ql, qh, sub_scales, steps)):
            for plane, back in zip(arrays, packed.untiled(packed.tiles_of(*arrays), 16), strict=True):
                assert torch.equal(plane.view(torch.uint8), back.view(torch.uint8))


@pytest.mark.parametrize("weights", [1, 3 * 16 * 512, 1 << 30])
def test_blocks_of_rows_join_up(weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack, "PACK_WEIGHTS", weights)
    arrays = planes((2, 100, 512), "exact")
    tiles = packed.tiles_of(**arrays)
    np.testing.assert_array_equal(tiles[1].numpy(), expected_tiles((2, 100, 512), "exact", 1))
    for plane, back in zip(arrays.values(), packed.untiled(tiles, 100), strict=True):
        assert torch.equal(plane, back)


@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_planes_with_strides(scales: Scales) -> None:
    arrays = planes((20, 512), scales)
    tiles = packed.tiles_of(**arrays)
    wide = {role: torch.stack((plane, plane), -1)[..., 0] for role, plane in arrays.items()}
    assert torch.equal(packed.tiles_of(**wide), tiles)
    assert torch.equal(packed.tiles_of(**{role: plane[3:] for role, plane in arrays.items()}),
                       packed.tiles_of(**{role: plane[3:].clone() for role, plane in arrays.items()}))  # fmt: skip


@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_rows_are_read_from_wherever_they_are(scales: Scales) -> None:
    n, k = 47, 512
    data = q6k_blocks(n * k // 256, 5)
    decoded = [oracles.q6k_block(data[at : at + 210]) for at in range(0, len(data), 210)]
    q = np.array([codes for codes, _ in decoded]).reshape(n, k)
    s = np.array([products for _, products in decoded], dtype=np.float32).reshape(n, -1)
    if scales == "bf16":
        s = np.vectorize(lambda value: np.uint32(oracles.bf16(value) << 16).view(np.float32))(s)
    tiles = packed.tiles_of(**planes((n, k), scales))
    for start, stop in ((0, n), (0, 16), (16, 47), (5, 6), (31, 33), (46, 47), (7, 40)):
        found, found_s, _ = prepack.codes_and_scales(tiles, slice(start, stop), k, packed.row(tiles))
        assert (found.dtype, found_s.dtype) == (torch.float32, torch.float32)
        np.testing.assert_array_equal(found.numpy(), q[start:stop])
        np.testing.assert_array_equal(found_s.numpy(), s[start:stop])
    at = torch.tensor([46, 0, 8, 8, 15, 16, 31, 7])
    for index in (at, at.int(), at[:0]):
        found, found_s, _ = prepack.codes_and_scales(tiles, index, k, packed.row(tiles))
        np.testing.assert_array_equal(found.numpy(), q[index.numpy()])
        np.testing.assert_array_equal(found_s.numpy(), s[index.numpy()])


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
        (TILES[..., :3456], 17, r"contiguous.*found uint8 \(2, 1, 3456\), strides \(3584, 3584, 1\)"),
        (TILES[0], 17, r"found uint8 \(1, 3584\)"),
        (TILES[:, :0], 17, r"found uint8 \(2, 0, 3584\)"),
        (TILES[None, :, :][:0], 17, r"found uint8 \(0, 2, 1, 3584\)"),
    ],
)
def test_unpack_says_what_it_refuses(tiles: torch.Tensor, n: int, message: str) -> None:
    assert packed.untiled(TILES, 17)[0].shape == (17, 128)
    with pytest.raises(ValueError, match=message):
        packed.untiled(tiles, n)


def test_the_size_of_tiles_is_that_of_their_weight_type() -> None:
    found = r"tiles of q6_k_exact: .*with tile_bytes 3456, found uint8 \(2, 1, 3584\)"
    with pytest.raises(ValueError, match=found):
        prepack.unpack(TILES, 17, 256, row_of("Q6_K", "exact"))
    with pytest.raises(ValueError, match=r"tiles of q6_k: .*with tile_bytes 3584, found uint8 \(2, 1, 3456\)"):
        prepack.unpack(torch.zeros(2, 1, 3456, dtype=torch.uint8), 17, 256, row_of("Q6_K", "bf16"))
