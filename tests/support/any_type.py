"""Random planes of any weight type."""

from __future__ import annotations

import torch
from torch import Tensor

from q6k_kernels.formats.checks import PLANE_DTYPES
from q6k_kernels.formats.types import DTYPE_BYTES, PlaneArray, WeightType

SCALE_BITS = 6
"""Bits of GGML's integer scales without a sign."""
EXPONENTS = (118, 134)
"""Scales of 2 ** -10 to 2 ** 6 where they are exponents."""


def planes(row: WeightType, n: int, k: int, lead: tuple[int, ...] = ()) -> list[Tensor]:
    """Return planes (*lead, n, K / weights), the same for the same sizes, with all codes that there can be."""
    source = torch.Generator().manual_seed(n * k + row.bits)
    return [_plane(array, row, (*lead, n, k // array.weights), source) for array in row.arrays]


def _plane(array: PlaneArray, row: WeightType, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    dtype = PLANE_DTYPES[array.dtype]
    if DTYPE_BYTES[array.dtype] == 2:
        size = 1e-4 if row.stepped else 1e-2
        return (torch.randn(shape, generator=source) * size).to(dtype)
    if array in row.scales and array.dtype == "U8":
        low, high = (0, 1 << SCALE_BITS) if row.stepped else EXPONENTS
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=source)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=source).view(dtype)
