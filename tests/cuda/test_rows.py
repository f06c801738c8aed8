"""Packing, gathering and expanding on the emulated GPU, bit for bit against the CPU's implementations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import any_type
import cuda_emulator
import packed

torch = pytest.importorskip("torch")

from cuda_emulator.memory import Memory, emulate
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda import rows as row_kernels
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType, row_of, weight_type
from q6k_kernels.ops import reference

SCALES = ["bf16", "exact"]
BF16 = weight_type("q6_k")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 256), (16, 512), (37, 768), (40, 2304)]
Planes = tuple[torch.Tensor, ...]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    device = device_like(80)
    memory = emulate(monkeypatch, device)
    monkeypatch.setattr(row_kernels, "_device", lambda **tensors: device)
    yield memory
    memory.check()


@cache
def planes(shape: tuple[int, ...], scales: str) -> Planes:
    """Random codes; scales of all sizes, subnormal, zero, infinite and NaN ones among them."""
    *lead, k = shape
    rng = np.random.default_rng(sum(shape))
    ql, qh = (torch.from_numpy(rng.integers(0, 256, (*lead, k // by), dtype=np.uint8)) for by in (2, 4))
    size = {"bf16": 16, "exact": 256}[scales]
    bits = rng.integers(0, 1 << 16, (*lead, k // size), dtype=np.uint16)
    if scales == "bf16":
        return ql, qh, torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    sub_scales = torch.from_numpy(rng.integers(-128, 128, (*lead, k // 16), dtype=np.int8))
    sub_scales[..., ::5] = 0
    return ql, qh, sub_scales, torch.from_numpy(bits.view(np.float16))


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same numbers, zeros of the same sign; any NaN is like another."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    integer = torch.int32 if found.dtype == torch.float32 else torch.int16
    different = found.view(integer) != expected.view(integer)
    different &= ~(found.isnan() & expected.isnan())
    at = different.nonzero()
    assert not len(at), f"{at[0].tolist()}: {found[tuple(at[0])]} != {expected[tuple(at[0])]}, {len(at)} in all"


@cuda_emulator.requires_compiler
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 21, 512), (2, 16, 256)])
def test_packing_writes_every_byte_that_the_cpu_does(gpu: Memory, shape: tuple[int, ...], scales: str) -> None:
    wanted = packed.tiles_of(*planes(shape, scales))
    found = row_kernels.pack(planes(shape, scales), row_of("Q6_K", scales))
    assert found.shape == wanted.shape
    assert torch.equal(found, wanted)


@cuda_emulator.requires_compiler
@pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)
def test_every_weight_type_is_packed_and_expanded(gpu: Memory, row: WeightType) -> None:
    n, k = 21, 544 if row.block == 32 else 512
    given, dtype = any_type.planes(row, n, k), torch.bfloat16
    tiles, rows = row_kernels.pack(given, row), torch.tensor([20, 0, 16])
    assert torch.equal(tiles, layout.pack(given, row))
    right = reference.dequantize(given, row, dtype)
    assert_same_bits(row_kernels.dequantize(tiles, n, k, row, dtype), right)
    assert_same_bits(row_kernels.embedding(rows, tiles, n, k, row, dtype), right[rows])


@cuda_emulator.requires_compiler
@pytest.mark.parametrize("scales", SCALES)
def test_planes_may_lie_anywhere(gpu: Memory, scales: str) -> None:
    """Strided, or at an odd address: the kernel reads 16 bytes at a time."""
    shape = (19, 512)
    every_other, odd = [], []
    for plane in planes(shape, scales):
        wide = torch.stack((plane, torch.zeros_like(plane)), dim=1).view(-1, plane.shape[1])
        every_other.append(wide[::2])
        shifted = torch.cat((plane.new_zeros(1), plane.flatten()))[1:].view(plane.shape)
        assert shifted.data_ptr() % 16
        odd.append(shifted)
    wanted = packed.tiles_of(*planes(shape, scales))
    assert torch.equal(row_kernels.pack(every_other, row_of("Q6_K", scales)), wanted)
    assert torch.equal(row_kernels.pack(odd, row_of("Q6_K", scales)), wanted)


@cuda_emulator.requires_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", SCALES)
def test_all_rows_are_the_references(gpu: Memory, scales: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tiles = packed.tiles_of(*planes(shape, scales))
        assert_same_bits(
            row_kernels.dequantize(tiles, *shape, packed.row(tiles), dtype),
            packed.dequantized(*planes(shape, scales), dtype=dtype),
        )


@cuda_emulator.requires_compiler
@pytest.mark.parametrize(("first", "rows"), [(0, 37), (0, 1), (16, 16), (16, 21), (32, 5), (32, 0), (16, 9)])
def test_a_slice_of_rows_is_that_of_all(gpu: Memory, first: int, rows: int) -> None:
    shape, dtype = (37, 768), torch.bfloat16
    out = torch.empty(rows, 768, dtype=dtype)
    row_kernels.dequantize_rows(packed.tiles_of(*planes(shape, "bf16")), first, rows, 37, BF16, out)
    assert_same_bits(out, packed.dequantized(*planes(shape, "bf16"), dtype=dtype)[first : first + rows])


INDICES = {
    "one": torch.tensor([36]),
    "scalar": torch.tensor(7),
    "none": torch.zeros(2, 0, dtype=torch.int64),
    "all": torch.arange(37),
    "repeated": torch.tensor([[0, 36, 15], [16, 16, 8]]),
    "strided": torch.arange(0, 37).repeat_interleave(2)[::2],
}


@cuda_emulator.requires_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", SCALES)
def test_gathered_rows_are_the_references(gpu: Memory, scales: str, dtype: torch.dtype) -> None:
    tiles = packed.tiles_of(*planes((37, 768), scales))
    every = packed.dequantized(*planes((37, 768), scales), dtype=dtype)
    for indices in INDICES.values():
        assert_same_bits(row_kernels.embedding(indices, tiles, 37, 768, packed.row(tiles), dtype), every[indices])


@cuda_emulator.requires_compiler
@pytest.mark.parametrize(
    ("index_dtype", "bad"),
    [
        *((torch.int32, bad) for bad in (-1, 37, -(1 << 31), (1 << 31) - 1)),
        *((torch.int64, bad) for bad in (-1, 37, 1 << 31, -(1 << 31), (1 << 32) + 3, (1 << 63) - 1)),
    ],
)
def test_an_index_outside_the_rows_traps(gpu: Memory, index_dtype: torch.dtype, bad: int) -> None:
    tiles = packed.tiles_of(*planes((37, 768), "bf16"))
    with pytest.raises(cuda_emulator.EmulationError, match="q6k_gather: trap"):
        row_kernels.embedding(
            torch.tensor([3, bad, 5], dtype=index_dtype), tiles, 37, 768, packed.row(tiles), torch.bfloat16
        )
    assert_same_bits(
        row_kernels.embedding(
            torch.tensor([3], dtype=index_dtype), tiles, 37, 768, packed.row(tiles), torch.bfloat16
        ),
        packed.dequantized(*planes((37, 768), "bf16"), dtype=torch.bfloat16)[3:4],
    )


@cuda_emulator.requires_compiler
@pytest.mark.parametrize("scales", SCALES)
def test_threads_may_run_in_any_order(gpu: Memory, scales: str) -> None:
    shape, dtype = (37, 768), torch.bfloat16
    row = row_of("Q6_K", scales)
    variants = [row_kernels._pack_variant(row), row_kernels._dequantize_variant(row, dtype)]
    kernels = [cuda_emulator.load(*variant, 0) for variant in variants]
    wanted = packed.tiles_of(*planes(shape, scales))
    try:
        for order in (1, 2):
            for kernel in kernels:
                kernel.order = order
            assert torch.equal(row_kernels.pack(planes(shape, scales), row_of("Q6_K", scales)), wanted)
            assert_same_bits(
                row_kernels.dequantize(wanted, 37, 768, row, dtype),
                packed.dequantized(*planes(shape, scales), dtype=dtype),
            )
    finally:
        for kernel in kernels:
            kernel.order = 0


@pytest.mark.parametrize(("arch", "early"), [(80, False), (90, True), (100, True)])
def test_gathering_alone_may_start_early(arch: int, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the launch before; the others do not, nor must what packing writes be read too early."""
    tiles, launches = packed.tiles_of(*planes((37, 768), "bf16")), list[Any]()
    kernel = SimpleNamespace(launch=lambda *_, **how: launches.append(how.get("dependent", False)))
    monkeypatch.setattr(row_kernels.loader, "load", lambda *variant: kernel)
    monkeypatch.setattr(row_kernels.launching, "stream", lambda on: 0)
    monkeypatch.setattr(row_kernels, "_device", lambda **tensors: device_like(arch))
    row_kernels.embedding(torch.tensor([3]), tiles, 37, 768, packed.row(tiles), torch.bfloat16)
    row_kernels.dequantize(tiles, 37, 768, packed.row(tiles), torch.bfloat16)
    row_kernels.pack(planes((37, 768), "bf16"), BF16)
    assert launches == [early, False, False]


def out_of(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first_row": 8}, r"a first row that is a multiple of 16.*n = 37, found 16 from 8"),
        ({"first_row": -16}, "found 16 from -16"),
        ({"first_row": 32}, "found 16 from 32"),
        ({"rows": -1}, "found -1 from 0"),
        ({"n": 50}, "3 tiles of 16 hold 33 to 48 rows, found 50"),
        ({"out": out_of(16, 768).double()}, "dtype: expected bfloat16, float16 or float32, found torch.float64"),
        ({"out": out_of(15, 768)}, r"out: expected contiguous \(16, 768\).*found \(15, 768\)"),
        ({"out": out_of(768, 16).T}, r"strides \(1, 16\)"),
        ({"out": out_of(16 * 768 + 1)[1:].view(16, 768)}, "aligned to 16 bytes"),
        ({}, "expected all tensors on one GPU, found tiles on cpu, out on cpu"),
    ],
)
def test_slices_say_what_they_refuse(arguments: dict[str, Any], message: str) -> None:
    tiles = packed.tiles_of(*planes((37, 768), "bf16"))
    given = {"tiles": tiles, "first_row": 0, "rows": 16, "n": 37, "row": BF16, "out": out_of(16, 768)} | arguments
    with pytest.raises(ValueError, match=message):
        row_kernels.dequantize_rows(**given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": torch.tensor([1.0])}, "indices: expected int32 or int64, found float32"),
        ({"dtype": torch.float64}, "dtype: expected bfloat16"),
        ({"n": 49}, "found 49"),
        ({"tiles": torch.zeros(3, 3, 3585, dtype=torch.uint8)[..., :3584]}, "expected contiguous uint8"),
        ({"tiles": torch.zeros(9 * 3584 + 1, dtype=torch.uint8)[1:].view(3, 3, 3584)}, "clone them"),
        ({}, "expected all tensors on one GPU, found indices on cpu, tiles on cpu"),
    ],
)
def test_embedding_says_what_it_refuses(arguments: dict[str, Any], message: str) -> None:
    tiles = packed.tiles_of(*planes((37, 768), "bf16"))
    given = {
        "indices": torch.tensor([1]),
        "tiles": tiles,
        "n": 37,
        "k": 768,
        "row": BF16,
        "dtype": torch.bfloat16,
    } | arguments
    with pytest.raises(ValueError, match=message):
        row_kernels.embedding(**given)


def test_packing_refuses_planes_of_the_cpu() -> None:
    with pytest.raises(ValueError, match="on one GPU, found ql on cpu, qh on cpu, scale on cpu, steps on cpu"):
        row_kernels.pack(planes((37, 768), "exact"), weight_type("q6_k_exact"))


def test_variants_are_what_is_loaded() -> None:
    variants = row_kernels.variants(90)
    assert len(set(variants)) == len(variants) == len(WEIGHT_TYPES) * (1 + 3 + 6)
    assert {kernel for _, kernel, _ in variants} == {"q6k_pack", "q6k_dequantize", "q6k_gather"}
