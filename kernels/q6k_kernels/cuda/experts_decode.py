"""Products of a few rows with the experts that each has chosen, activations in 8 bits: `cuda/experts_decode.cuh`.

Each pair of a token and one of its experts reads the expert's tiles for itself, and every block quantises the one
or two rows that it needs. Grouping pairs of one expert took longer wherever it was measured (kernels/NOTES.md).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda.decode_plan import activation_bytes
from q6k_kernels.cuda.device import Device, Variant, bias_arguments, common_macros, pointer
from q6k_kernels.formats.ggml import super_blocks
from q6k_kernels.formats.types import TILE_ROWS, WEIGHT_TYPES, WeightType
from q6k_kernels.jit import loader

FILE, KERNEL = "experts_decode.cuh", "q6k_experts_decode"
MOST_PAIRS = 256
"""Most pairs of a launch."""
PAIRS = 2
"""Most pairs of a block."""
MOST_PRODUCT = 1 << 31
"""Row tiles of all pairs times blocks stay below it: the kernel divides them with 32 bits."""

Shape = tuple[int, int, int]
"""Warps, stages and occupancy, as in `decode_plan`."""
SHORT: Shape = (4, 6, 2)
SHAPES: tuple[Shape, ...] = ((8, 3, 2), (8, 2, 2), (8, 2, 1))
"""The first that fits is taken; `SHORT` where it fits and a launch or its rows are short."""
SHORT_TILES, BESIDE_TILES = 24, 80
"""Tiles a multiprocessor up to which `SHORT` is best, and up to which one block each is best: the next launch's
blocks then fit beside it. Measured on an H200."""
SHALLOW = 3
"""Super-blocks of a row up to which two blocks each of `SHORT` are best, beside which others still fit."""
_ARGUMENTS = struct.Struct("@PPPPPPqiiiiiiiiii")


@dataclass(frozen=True)
class ExpertsPlan:
    """One launch of the kernel.

    Attributes:
        shape: warps, stages and occupancy that the kernel is compiled for.
        blocks: blocks of the grid.
        shared_bytes: shared memory of a block.
    """

    shape: Shape
    blocks: int
    shared_bytes: int


@lru_cache(maxsize=4096)
def plan(pairs: int, n: int, k: int, row: WeightType, device: Device) -> ExpertsPlan | None:
    """Return the launch for so many pairs of a token and an expert; None if activations do not fit.

    Args:
        pairs: number of pairs.
        n: rows of each expert's weight.
        k: columns.
        row: the weight type.
        device: the GPU's limits.
    """
    row_tiles, blocks = -(-n // TILE_ROWS), super_blocks(k)
    codes, steps, parts = activation_bytes(1, fused=True)
    of_row = blocks * (codes + steps * (2 if row.offset else 1) + (parts if row.minimum else 0))
    tiles = -(-pairs * row_tiles * blocks // device.multiprocessors)
    for shape in (SHORT, *SHAPES) if tiles <= SHORT_TILES or blocks <= SHALLOW else SHAPES:
        warps, stages, occupancy = shape
        shared = warps * stages * row.tile_bytes + PAIRS * of_row + 2 * warps * TILE_ROWS * 4
        limit = min(device.shared_bytes, device.multiprocessor_shared_bytes // occupancy - 1024)
        resident = 1 if tiles <= BESIDE_TILES and blocks > SHALLOW else occupancy
        grid = max(pairs, min(pairs * row_tiles, resident * device.multiprocessors))
        if shared <= limit and pairs * row_tiles * grid < MOST_PRODUCT:
            return ExpertsPlan(shape, grid, shared)
    return None


def fits(n: int, k: int, row: WeightType, device: Device) -> bool:
    """Check whether the activations of one token's experts fit in a block's shared memory."""
    return plan(1, n, k, row, device) is not None


def multiply(
    x: Tensor,
    tiles: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    n: int,
    row: WeightType,
    y: Tensor,
    device: Device,
    *,
    early: bool = True,
    gated: tuple[Tensor, int] | None = None,
    chosen: ExpertsPlan | None = None,
) -> None:
    """Launch the products; `cuda.experts_dispatch` has checked the arguments.

    Args:
        x: bf16 or fp16 (M, K), the same row for all experts of a token, or (M * top, K); rows 16-byte aligned.
        tiles: uint8 (E, T, ceil(K/256), tile_bytes).
        experts: int32 or int64 (M, top), contiguous, M * top >= 1.
        bias: (E, n), contiguous, or None.
        n: rows of each expert's weight.
        row: the weight type.
        y: x's dtype (M, top, n), contiguous.
        device: the GPU of all tensors.
        early: whether tiles are loaded before the launch before has ended, of the experts that memory has then. It
            is right either way, but useless after a kernel of ours that writes them.
        gated: what x is the gate of, of the same strides, and the activation, a `Gate` of `cuda/gates.cuh`: the
            kernel multiplies what they make. None if x has the activations.
        chosen: forces a plan, to measure it.

    Raises:
        ValueError: a row of activations does not fit in the GPU's shared memory.
    """
    (m, top), k = experts.shape, x.shape[1]
    at_once = max(1, MOST_PAIRS // top)
    if m > at_once:
        apart = len(x) // m
        for at in range(0, m, at_once):
            part, rows = slice(at, at + at_once), slice(at * apart, (at + at_once) * apart)
            beside = None if gated is None else (gated[0][rows], gated[1])
            given: Any = x[rows], tiles, experts[part], bias, n, row, y[part], device
            multiply(*given, early=early, gated=beside, chosen=chosen)
        return
    launch = chosen or plan(m * top, n, k, row, device)
    if launch is None:
        raise ValueError(
            f"activations int8: rows of K = {k} do not fit in the {device.shared_bytes} bytes of shared memory of "
            f"this GPU's blocks; use activations='bf16'"
        )
    bias_at, bias_kind = bias_arguments(bias)
    up, gate = gated or (None, 0)
    arguments = _ARGUMENTS.pack(
        tiles.data_ptr(),
        experts.data_ptr(),
        x.data_ptr(),
        pointer(up),
        y.data_ptr(),
        bias_at,
        x.stride(0),
        gate,
        int(experts.dtype is torch.int64),
        bias_kind,
        m * top,
        top if len(x) == m else 1,
        n,
        k,
        tiles.shape[1],
        tiles.shape[0],
        int(early),
    )
    loader.load(*_variant(launch.shape, row, y.dtype is torch.float16), device.index).launch(
        (launch.blocks, 1, 1),
        launch.shape[0] * 32,
        arguments,
        stream=launching.stream(device),
        shared_bytes=launch.shared_bytes,
        dependent=device.arch >= 90,
    )


@cache
def _variant(shape: Shape, row: WeightType, fp16: bool) -> Variant:
    names = "Q6K_TOKENS", "Q6K_FUSED", "Q6K_WARPS", "Q6K_STAGES", "Q6K_OCCUPANCY"
    macros = zip(names, (1, 1, *shape), strict=True)
    return FILE, KERNEL, (*common_macros(row, fp16), *macros)


def variants() -> list[Variant]:
    """Return every variant that this module may load."""
    return [_variant(*each) for each in product((SHORT, *SHAPES), WEIGHT_TYPES.values(), (False, True))]
