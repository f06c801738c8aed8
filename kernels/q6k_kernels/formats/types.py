"""Weight types that stay packed, one row each; planes, tiles, kernels' macros and sizes are derived from it.

    weight = scale * (code - offset)

A code has `bits` bits: the low four lie in `X.ql`, the others in `X.qh` (see `formats.planes`). Weights of a
group share a scale. A bundle's arrays, in this order, each (..., K / weights an element):

| row        | code planes              | scale arrays                                            | bits a weight |
|------------|--------------------------|---------------------------------------------------------|---------------|
| q6_k       | ql uint8 2, qh uint8 4   | scale bf16 16, fp32 d * sub-scale rounded to even       | 7.0           |
| q6_k_exact | ql uint8 2, qh uint8 4   | scale int8 16, GGUF's sub-scale; steps fp16 256, its d  | 6.5625        |

To add a type: a row here, a block reader in `blocks`, what its planes need in `planes` and `tiles`, and tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from q6k_kernels.formats.ggml import SUPER_BLOCK

TILE_ROWS = 16
"""Rows of a tile; it has `SUPER_BLOCK` columns."""

Scales = Literal["bf16", "exact"]
"""Values of `--scales`, which picks a row where a GGML type has more than one."""


class PlaneArray(NamedTuple):
    """One array of a packed tensor.

    Attributes:
        role: the suffix of its key in a bundle.
        dtype: safetensors' name of the elements' dtype.
        weights: number of weights that one element holds bits of, or is the scale of.
    """

    role: str
    dtype: str
    weights: int


DTYPE_BYTES = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2}
"""safetensors dtype -> bytes of an element, for the arrays of all rows."""
KIND_OF_SCALE = {"BF16": 0, "I8": 1}
"""Dtype of the array `scale` -> `Q6K_SCALES`: SCALES_BF16, SCALES_STEPPED in `cuda/common.cuh`."""


@dataclass(frozen=True)
class WeightType:
    """A weight type: one row of the table.

    Attributes:
        name: what operations, manifests and messages call it.
        ggml: the GGML type it holds.
        chosen_by: the value of `--scales` that picks it.
        bits: bits of a code.
        offset: what is subtracted from a stored code.
        block: weights of a GGML block; K is a multiple of it.
        scales: the arrays of scales, in a bundle's order.
    """

    name: str
    ggml: str
    chosen_by: Scales
    bits: int
    offset: int
    block: int
    scales: tuple[PlaneArray, ...]

    @cached_property
    def arrays(self) -> tuple[PlaneArray, ...]:
        """All arrays: code planes, then scales."""
        high = (PlaneArray("qh", "U8", 8 // (self.bits - 4)),) if self.bits > 4 else ()
        return PlaneArray("ql", "U8", 2), *high, *self.scales

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of `arrays`."""
        return tuple(array.role for array in self.arrays)

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.scales[0].weights

    @property
    def bits_per_weight(self) -> float:
        """Bits of all arrays together, per weight."""
        return sum(8 * DTYPE_BYTES[array.dtype] / array.weights for array in self.arrays)

    @cached_property
    def tile_bytes(self) -> int:
        """Size in bytes of 16 rows of 256 weights: a tile holds the same bits as the arrays."""
        weights = TILE_ROWS * SUPER_BLOCK
        return sum(weights // array.weights * DTYPE_BYTES[array.dtype] for array in self.arrays)

    @cached_property
    def macros(self) -> tuple[tuple[str, int], ...]:
        """Macros that specialise `cuda/common.cuh`, with their values."""
        return (
            ("Q6K_BITS", self.bits),
            ("Q6K_GROUP", self.group),
            ("Q6K_MINIMUM", int("min" in self.roles)),
            ("Q6K_SCALES", KIND_OF_SCALE[self.scales[0].dtype]),
        )

    @property
    def stepped(self) -> bool:
        """Whether a group's scale is an int8 times its super-block's fp16 step."""
        return self.scales[0].dtype == "I8"


_ROWS = (
    WeightType("q6_k", "Q6_K", "bf16", 6, 32, 256, (PlaneArray("scale", "BF16", 16),)),
    WeightType(
        "q6_k_exact", "Q6_K", "exact", 6, 32, 256, (PlaneArray("scale", "I8", 16), PlaneArray("steps", "F16", 256))
    ),
)
WEIGHT_TYPES = {row.name: row for row in _ROWS}
"""Name -> row."""
PACKED_TYPES = frozenset(row.ggml for row in _ROWS)
"""GGML types that have a row."""
DEFAULT = _ROWS[0].name
"""The weight type of a conversion without options, and of ExecuTorch's class."""
CODE_MACROS = tuple(name for name, _ in _ROWS[0].macros)
"""Names of a row's macros, in order."""


def weight_type(name: str) -> WeightType:
    """Return the weight type of that name.

    Raises:
        ValueError: there is no such weight type.
    """
    row = WEIGHT_TYPES.get(name)
    if row is None:
        raise ValueError(f"format: expected one of {', '.join(WEIGHT_TYPES)}, found {name!r}")
    return row


def row_of(ggml: str, scales: Scales) -> WeightType:
    """Return the weight type that holds a GGML type.

    Args:
        ggml: the GGML type's name, for example "Q6_K".
        scales: picks one of several weight types.

    Raises:
        ValueError: the GGML type has no row.
    """
    rows = [row for row in _ROWS if row.ggml == ggml]
    if not rows:
        raise ValueError(f"{ggml} has no packed form; {', '.join(sorted(PACKED_TYPES))} has")
    return next((row for row in rows if row.chosen_by == scales), rows[0])
