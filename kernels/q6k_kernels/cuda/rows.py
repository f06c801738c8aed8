"""Packing on the GPU, and rows of packed weights as numbers: the launches of `cuda/pack.cuh` and `cuda/rows.cuh`.

All are bound by memory. Results equal those of `formats.tiles.pack` and `ops.reference.dequantize` bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda.device import ALIGNMENT, Device, Variant
from q6k_kernels.formats.checks import FLOATS, check_dtype, check_planes
from q6k_kernels.formats.tiles import check_tiles, tiles_shape
from q6k_kernels.formats.types import TILE_ROWS, WEIGHT_TYPES, WeightType
from q6k_kernels.jit import loader

PACK_WARPS = 8
"""Warps of a block; each packs one tile."""
THREADS = 256
"""Threads of a block of the kernels that read tiles."""
PACKED_ROLES = (("ql", "q"), ("qh",), ("scale",), ("min",), ("steps",), ("min_steps",))
"""Arrays that `cuda/pack.cuh` takes, in its order; null where a weight type has none of that role."""
_PACK, _GATHER, _DEQUANTIZE = struct.Struct("@PPPPPPPiiq"), struct.Struct("@PPPIii"), struct.Struct("@PPiii")


def pack(planes: Sequence[Tensor], row: WeightType) -> Tensor:
    """Pack planes into tiles on a GPU; arguments and result are those of `formats.tiles.pack`.

    Raises:
        ValueError: a dtype is wrong, shapes do not agree, or the planes are not all on one GPU.
        CudaError: a kernel cannot be compiled or launched.
    """
    shape = check_planes(planes, row, stack=True)
    device = _device(**dict(zip(row.roles, planes, strict=True)))
    tiles = torch.empty(tiles_shape(shape, row), dtype=torch.uint8, device=planes[0].device)
    aligned = {role: _aligned(plane) for role, plane in zip(row.roles, planes, strict=True)}
    at = [next((aligned[role].data_ptr() for role in roles if role in aligned), 0) for roles in PACKED_ROLES]
    count = tiles.numel() // tiles.shape[-1]
    loader.load(*_pack_variant(row), device.index).launch(
        (-(-count // PACK_WARPS), 1, 1),
        32 * PACK_WARPS,
        _PACK.pack(
            *at,
            tiles.data_ptr(),
            shape[-2],
            shape[-1],
            count,
        ),
        stream=launching.stream(device),
    )
    launching.end_write(tiles)
    return tiles


def embedding(indices: Tensor, tiles: Tensor, n: int, k: int, row: WeightType, dtype: torch.dtype) -> Tensor:
    """Return rows by index.

    An index outside 0..n-1 stops the kernel, as it does in `torch.nn.functional.embedding` on a GPU: the next
    call that waits for the GPU raises, and the process can no longer use it.

    Args:
        indices: int32 or int64, any shape; it may be empty.
        tiles: uint8 (T, B, tile_bytes).
        n: rows N.
        k: weights of a row, K.
        row: the weight type.
        dtype: bfloat16, float16 or float32, rounded to once.

    Returns:
        (..., K) of `dtype`, new.

    Raises:
        ValueError: a dtype, a shape, n or k is wrong, or the tensors are not all on one GPU.
        CudaError: a kernel cannot be compiled or launched.
    """
    _check_tiles(tiles, n, k, row)
    check_dtype(dtype)
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices: expected int32 or int64, found {str(indices.dtype).removeprefix('torch.')}")
    device = _device(indices=indices, tiles=tiles)
    out = torch.empty(*indices.shape, k, dtype=dtype, device=tiles.device)
    count = indices.numel()
    if count == 0:
        return out
    rows = indices.contiguous()
    pairs = count * tiles.shape[1]
    variant = _gather_variant(row, dtype, rows.dtype is torch.int32)
    loader.load(*variant, device.index).launch(
        (-(-pairs * 4 // THREADS), 1, 1),
        THREADS,
        _GATHER.pack(tiles.data_ptr(), rows.data_ptr(), out.data_ptr(), pairs, n, k),
        stream=launching.stream(device),
        dependent=device.arch >= 90,
    )
    return out


def dequantize(tiles: Tensor, n: int, k: int, row: WeightType, dtype: torch.dtype) -> Tensor:
    """Return all rows as numbers.

    Args:
        tiles: uint8 (T, B, tile_bytes).
        n: rows N.
        k: weights of a row, K.
        row: the weight type.
        dtype: bfloat16, float16 or float32, rounded to once.

    Returns:
        (N, K) of `dtype`, new.

    Raises:
        ValueError: the dtype, the shape, n or k is wrong, or the tiles are not on a GPU.
        CudaError: a kernel cannot be compiled or launched.
    """
    _check_tiles(tiles, n, k, row)
    check_dtype(dtype)
    out = torch.empty(n, k, dtype=dtype, device=tiles.device)
    dequantize_rows(tiles, 0, n, n, row, out)
    return out


def dequantize_rows(tiles: Tensor, first_row: int, rows: int, n: int, row: WeightType, out: Tensor) -> None:
    """Write consecutive rows as numbers into an existing tensor.

    Args:
        tiles: uint8 (T, B, tile_bytes).
        first_row: a multiple of 16.
        rows: number of rows; it may be 0.
        n: rows N, at least `first_row + rows`.
        row: the weight type.
        out: bfloat16, float16 or float32 (rows, K), contiguous and 16-byte aligned.

    Raises:
        ValueError: a dtype, a shape, a row or n is wrong, or the tensors are not all on one GPU.
        CudaError: a kernel cannot be compiled or launched.
    """
    k = out.shape[-1] if out.ndim else 0
    _check_tiles(tiles, n, k, row)
    check_dtype(out.dtype)
    if first_row % TILE_ROWS or first_row < 0 or rows < 0 or first_row + rows > n:
        raise ValueError(
            f"rows: expected a first row that is a multiple of {TILE_ROWS}, and rows below n = {n}, "
            f"found {rows} from {first_row}"
        )
    if out.shape != (rows, k) or not out.is_contiguous() or out.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"out: expected contiguous ({rows}, {k}), aligned to {ALIGNMENT} bytes, found {tuple(out.shape)}, "
            f"strides {out.stride()}, at {out.data_ptr():#x}"
        )
    device = _device(tiles=tiles, out=out)
    if rows == 0:
        return
    half_tiles = 2 * -(-rows // TILE_ROWS) * tiles.shape[1]
    loader.load(*_dequantize_variant(row, out.dtype), device.index).launch(
        (-(-half_tiles * 32 // THREADS), 1, 1),
        THREADS,
        _DEQUANTIZE.pack(tiles.data_ptr(), out.data_ptr(), first_row, rows, k),
        stream=launching.stream(device),
    )


def _check_tiles(tiles: Tensor, n: int, k: int, row: WeightType) -> None:
    check_tiles(tiles, n, k, row)
    launching.check_aligned(tiles)


def _device(**tensors: Tensor | None) -> Device:
    """Return the GPU that all tensors are on."""
    found = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first, *others = found.values()
    if first.type != "cuda" or any(other != first for other in others):
        listed = ", ".join(f"{name} on {device}" for name, device in found.items())
        raise ValueError(f"expected all tensors on one GPU, found {listed}")
    return launching.device(first.index)


def _aligned(plane: Tensor) -> Tensor:
    """Return the plane contiguous and aligned: a copy if it is a view that begins elsewhere."""
    return (
        plane.clone(memory_format=torch.contiguous_format) if plane.data_ptr() % ALIGNMENT else plane.contiguous()
    )


def _pack_variant(row: WeightType) -> Variant:
    return "pack.cuh", "q6k_pack", row.macros


def _dequantize_variant(row: WeightType, dtype: torch.dtype) -> Variant:
    file, _, macros = _gather_variant(row, dtype, False)  # compiled with it, for which indices mean nothing
    return file, "q6k_dequantize", macros


def _gather_variant(row: WeightType, dtype: torch.dtype, int32: bool) -> Variant:
    macros = (*row.macros, ("Q6K_OUT", FLOATS.index(dtype)), ("Q6K_INDEX32", int(int32)))
    return "rows.cuh", "q6k_gather", macros


def variants(arch: int) -> list[Variant]:  # noqa: ARG001  # the same for all
    """Return every variant that this module may load on a GPU of that compute capability, 90 for 9.0."""
    rows = WEIGHT_TYPES.values()
    return [
        *(_pack_variant(row) for row in rows),
        *(_dequantize_variant(row, dtype) for row, dtype in product(rows, FLOATS)),
        *(_gather_variant(row, dtype, int32) for row, dtype, int32 in product(rows, FLOATS, (False, True))),
    ]
