"""A weight as codes and fp64 scales, and how the planes of every weight type become one.

It reads planes by the rules of the format alone and shares no formula with the code under test (see `accuracy`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from q6k_kernels.formats.types import WeightType


@dataclass(frozen=True)
class Weight:
    """A weight (N, K) of any format, as codes and scales: w = scale * code - min in each group of G weights.

    Attributes:
        codes: int8 or float64 (N, K).
        scale: float64 (N, K/G).
        min: float64 (N, K/G), or None.

    Raises:
        ValueError: the shapes do not agree.
    """

    codes: Tensor
    scale: Tensor
    min: Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        for name, each in (("scale", self.scale), ("min", self.min)):
            if each is not None and (each.shape != self.scale.shape or len(each) != n or k % each.shape[1]):
                raise ValueError(f"{name}: expected ({n}, K/G) for codes {(n, k)}, found {tuple(each.shape)}")

    @property
    def group(self) -> int:
        """Weights that share one scale: G."""
        return self.codes.shape[1] // self.scale.shape[1]

    def rows(self, which: slice | Tensor) -> Weight:
        """Return some rows, by a slice or by indices (R,)."""
        return Weight(self.codes[which], self.scale[which], None if self.min is None else self.min[which])


def of_planes(planes: Sequence[Tensor], row: WeightType) -> Weight:
    """Return the codes and scales of a bundle's planes, placed as the rules of the format say.

    Args:
        planes: one tensor for each of `row.arrays`, (N, width).
        row: the weight type.

    Raises:
        ValueError: the planes do not agree on their shape.
    """
    n, k = len(planes[0]), row.arrays[0].weights * planes[0].shape[1]
    found = [tuple(plane.shape) for plane in planes]
    expected = [(n, k // array.weights) for array in row.arrays]
    if found != expected:
        raise ValueError(f"{row.name}: expected {', '.join(row.roles)} {expected}, found {found}")
    arrays = dict(zip(row.roles, planes, strict=True))

    def times(role: str, steps: str) -> Tensor:
        values = arrays[role].double()
        if steps not in arrays:
            return values
        return values * arrays[steps].double().repeat_interleave(256 // row.group, 1)

    scale = times("scale", "steps")
    if row.scales[0].dtype == "U8" and not row.stepped:
        scale = (scale - 128).exp2()
    return Weight(_codes(arrays, k, row), scale, times("min", "min_steps") if "min" in arrays else None)


def _codes(arrays: Mapping[str, Tensor], k: int, row: WeightType) -> Tensor:
    """Return the codes, int8 (N, K), of planes by role: minus the offset, or looked up."""
    if "q" in arrays:
        return arrays["q"]
    at = torch.arange(k, device=arrays["ql"].device)
    stored = arrays["ql"][:, at // 2] >> (at % 2 * 4).to(torch.uint8) & 15
    if row.bits == 6:
        qh = arrays["qh"][:, at // 32 * 8 + at % 2 * 4 + at % 32 // 8]
        stored |= (qh >> (at % 8 // 2 * 2).to(torch.uint8) & 3) << 4
    elif row.bits == 5:
        stored |= (arrays["qh"][:, at // 8] >> (at % 2 * 4 + at % 8 // 2).to(torch.uint8) & 1) << 4
    if row.book:
        return torch.tensor(row.book, dtype=torch.int8, device=at.device)[stored.long()]
    return stored.to(torch.int8) - row.offset
