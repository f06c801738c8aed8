"""Make random packed weights, their planes and their values, and call operations on tiles alone.

Tests of one layer often have planes or tiles without their weight type. Here it follows from the number of arrays
or the size of a tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracles
from gguf_builder import q6k_blocks
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.checks import PLANE_DTYPES
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType, row_of
from q6k_kernels.ops import accuracy, reference, schema
from q6k_kernels.weights.weight import PackedWeight


def given(*planes: Tensor | None, **by_role: Tensor | None) -> list[Tensor]:
    """Return the planes that are given, in order."""
    return [plane for plane in (*planes, *by_role.values()) if plane is not None]


def row(tensors: list[Tensor] | Tensor) -> WeightType:
    """Return the weight type of planes or of tiles, or the default one."""
    rows = list(WEIGHT_TYPES.values())
    if isinstance(tensors, Tensor):
        return next((each for each in rows if each.tile_bytes == tensors.shape[-1]), rows[0])
    return next((each for each in rows if _fits(tensors, each)), rows[len(tensors) > len(rows[0].arrays)])


def _fits(planes: list[Tensor], row: WeightType) -> bool:
    """Check whether planes may be those of a weight type; of types with equal arrays the first is meant."""
    k = planes[0].shape[-1] * row.arrays[0].weights if planes and planes[0].ndim else 0
    return len(planes) == len(row.arrays) and all(
        plane.ndim and plane.dtype == PLANE_DTYPES[array.dtype] and plane.shape[-1] == k // array.weights
        for plane, array in zip(planes, row.arrays, strict=True)
    )


def width(tiles: Tensor) -> int:
    """Return K of a weight of whole tiles."""
    return 256 * tiles.shape[-2]


def planes(shape: tuple[int, ...], scales: str, seed: int = 5) -> dict[str, Tensor]:
    """Return the planes of random blocks."""
    return planes_of(q6k_blocks(int(np.prod(shape)) // 256, seed), shape, scales)


def planes_of(blocks: bytes, shape: tuple[int, ...], scales: str) -> dict[str, Tensor]:
    """Return the planes of blocks, by the oracle that works element by element."""
    dtypes = {"scale": torch.bfloat16 if scales == "bf16" else torch.int8, "steps": torch.float16}
    return {
        role: torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        .view(dtypes.get(role, torch.uint8))
        .view(*shape[:-1], -1)
        for role, raw in oracles.bundle_arrays(blocks, scales).items()
    }


def weight(shape: tuple[int, ...], scales: str = "bf16", seed: int = 5) -> PackedWeight:
    return PackedWeight.from_planes(given(**planes(shape, scales, seed)), row_of("Q6_K", scales).name)


def numbers(
    shape: tuple[int, ...], scales: str = "bf16", seed: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return the weights of planes, by the reference."""
    flat = {role: plane.flatten(0, -2) for role, plane in planes(shape, scales, seed).items()}
    return dequantized(**flat, dtype=dtype).view(shape)


def dequantized(*arrays: Tensor | None, dtype: torch.dtype = torch.float32, **by_role: Tensor | None) -> Tensor:
    """Call `reference.dequantize` on planes."""
    found = given(*arrays, **by_role)
    return reference.dequantize(found, row(found), dtype)


def multiplied(
    x: Tensor, *arrays: Tensor | None, bias: Any = None, activations: Any = "auto", **by_role: Any
) -> Tensor:
    """Call `reference.linear` on planes."""
    found = given(*arrays, **by_role)
    return reference.linear(x, found, row(found), bias, activations=activations)


def exact_of(*arrays: Tensor | None, **by_role: Tensor | None) -> accuracy.Weight:
    """Call `accuracy.of_planes` on planes."""
    found = given(*arrays, **by_role)
    return accuracy.of_planes(found, row(found))


def tiles_of(*arrays: Tensor | None, **by_role: Tensor | None) -> Tensor:
    """Call `formats.tiles.pack` on planes."""
    found = given(*arrays, **by_role)
    return layout.pack(found, row(found))


def untiled(tiles: Tensor, n: int) -> list[Tensor]:
    """Call `formats.tiles.unpack` on tiles."""
    return layout.unpack(tiles, n, width(tiles), row(tiles))


def op_pack(*arrays: Tensor | None, **by_role: Tensor | None) -> Tensor:
    """Call `torch.ops.q6k.pack` on planes."""
    found = given(*arrays, **by_role)
    return schema.pack(found, row(found).name)


def op_linear(x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, activations: str) -> Tensor:
    """Call `torch.ops.q6k.linear` with tiles alone."""
    return schema.linear(x, tiles, bias, n, row(tiles).name, activations)


def op_embedding(indices: Tensor, tiles: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Call `torch.ops.q6k.embedding` with tiles alone."""
    return schema.embedding(indices, tiles, n, width(tiles), row(tiles).name, dtype)


def op_dequantize(tiles: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Call `torch.ops.q6k.dequantize` with tiles alone."""
    return schema.dequantize(tiles, n, width(tiles), row(tiles).name, dtype)
