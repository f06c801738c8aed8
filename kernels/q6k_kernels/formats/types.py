"""Weight types that stay packed, one row each; planes, tiles, kernels' macros and sizes are derived from it.

    weight = scale * code - min      in fp32, in this order, of GGUF's own numbers: it equals ggml's bit for bit

`code` is the stored code, minus an offset or looked up in a code book where the type has one. A stored code has
`bits` bits: the low four lie in `X.ql`, the others in `X.qh` (see `formats.planes`); eight are `X.q`. Weights of a
group share a scale, and a min if there is one. The scale of a group is its element of `X.scale`, times that of
`X.steps` if there are steps; the min likewise of `X.min` and `X.min_steps`. A bundle's arrays, in this order, each
(..., K / weights an element), and the bits of a weight in all of them:

| row        | code          | code planes            | scale arrays                                   | bits   |
|------------|---------------|------------------------|------------------------------------------------|--------|
| q6_k       | stored - 32   | ql uint8 2, qh uint8 4 | scale bf16 16: d * sub-scale, rounded to even  | 7.0    |
| q6_k_exact | stored - 32   | ql uint8 2, qh uint8 4 | scale int8 16, steps fp16 256                  | 6.5625 |
| q4_k       | stored        | ql uint8 2             | scale, min uint8 32, steps, min_steps fp16 256 | 4.625  |
| q5_k       | stored        | ql uint8 2, qh uint8 8 | scale, min uint8 32, steps, min_steps fp16 256 | 5.625  |
| q8_0       | stored        | q int8 1               | scale fp16 32                                  | 8.5    |
| q5_0       | stored - 16   | ql uint8 2, qh uint8 8 | scale fp16 32                                  | 5.5    |
| q4_0       | stored - 8    | ql uint8 2             | scale fp16 32                                  | 4.5    |
| q4_1       | stored        | ql uint8 2             | scale, min fp16 32                             | 5.0    |
| q5_1       | stored        | ql uint8 2, qh uint8 8 | scale, min fp16 32                             | 6.0    |
| iq4_nl     | IQ4 [stored]  | ql uint8 2             | scale fp16 32                                  | 4.5    |
| iq4_xs     | IQ4 [stored]  | ql uint8 2             | scale int8 32, steps fp16 256                  | 4.3125 |
| mxfp4      | E2M1 [stored] | ql uint8 2             | scale uint8 32: half of 2 ** (element - 127)   | 4.25   |

To add a type: a row here, a block reader in `blocks` and in the repacker, and tests. A kind of code or scale that
no row has yet also needs its lines in `planes`, `tiles` and `cuda/common.cuh`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from q6k_kernels.formats.ggml import SUPER_BLOCK

TILE_ROWS = 16
"""Rows of a tile; it has `SUPER_BLOCK` columns."""

LINE_BYTES = 128
"""Bytes of a line of a GPU's memory. Tiles begin at lines: copies of those that do not take up to 5% longer."""

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
KIND_OF_SCALE = {("BF16", False): 0, ("I8", True): 1, ("U8", True): 2, ("F16", False): 3, ("U8", False): 4}
"""Dtype of the array `scale`, and whether there are steps -> `Q6K_SCALES`, of which `cuda/common.cuh` has names."""

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The code book of ggml's IQ4_NL and IQ4_XS."""
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""The code book of MXFP4: twice the values of its 4-bit floats, as ggml has them; scales are halved instead."""
BOOKS = ((), IQ4, E2M1)
"""Code books, in the order of `Q6K_BOOK` in `cuda/common.cuh`; the first is none."""


@dataclass(frozen=True, eq=False)
class WeightType:
    """A weight type: one row of the table.

    Attributes:
        name: what operations, manifests and messages call it.
        ggml: the GGML type it holds.
        block: weights of a GGML block; K is a multiple of it.
        bits: bits of a stored code.
        scales: the arrays of scales, in a bundle's order.
        offset: what is subtracted from a stored code.
        book: the values of stored codes, or nothing.
        chosen_by: the value of `--scales` that picks it; None where it is the only row of its GGML type.
    """

    name: str
    ggml: str
    block: int
    bits: int
    scales: tuple[PlaneArray, ...]
    offset: int = 0
    book: tuple[int, ...] = ()
    chosen_by: Scales | None = None

    @cached_property
    def arrays(self) -> tuple[PlaneArray, ...]:
        """All arrays: code planes, then scales."""
        if self.bits == 8:
            return PlaneArray("q", "I8", 1), *self.scales
        high = (PlaneArray("qh", "U8", 8 // self.high_bits),) if self.high_bits else ()
        return PlaneArray("ql", "U8", 2), *high, *self.scales

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles of `arrays`."""
        return tuple(array.role for array in self.arrays)

    @property
    def high_bits(self) -> int:
        """Bits of a stored code in `X.qh`."""
        return self.bits - 4 if self.bits < 8 else 0

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
        """Size in bytes of 16 rows of 256 weights: the same bits as in the arrays, in whole lines of memory."""
        weights = TILE_ROWS * SUPER_BLOCK
        size = sum(weights // array.weights * DTYPE_BYTES[array.dtype] for array in self.arrays)
        return -(-size // LINE_BYTES) * LINE_BYTES

    @cached_property
    def macros(self) -> tuple[tuple[str, int], ...]:
        """Macros that specialise `cuda/common.cuh`, with their values."""
        return (
            ("Q6K_BITS", self.bits),
            ("Q6K_OFFSET", self.offset),
            ("Q6K_BOOK", BOOKS.index(self.book)),
            ("Q6K_GROUP", self.group),
            ("Q6K_MINIMUM", int(self.minimum)),
            ("Q6K_SCALES", KIND_OF_SCALE[self.scales[0].dtype, self.stepped]),
        )

    @cached_property
    def minimum(self) -> bool:
        """Whether groups have a min."""
        return "min" in self.roles

    @cached_property
    def stepped(self) -> bool:
        """Whether a group's scale is an integer times its super-block's fp16 step."""
        return "steps" in self.roles


def _each(group: int, dtype: str, *roles: str) -> tuple[PlaneArray, ...]:
    return tuple(PlaneArray(role, dtype, group) for role in roles)


_K_QUANT = (*_each(32, "U8", "scale", "min"), *_each(256, "F16", "steps", "min_steps"))
_SIX_EXACT = (*_each(16, "I8", "scale"), *_each(256, "F16", "steps"))
_IQ4_XS = (*_each(32, "I8", "scale"), *_each(256, "F16", "steps"))
_HALF, _TWO_HALVES = _each(32, "F16", "scale"), _each(32, "F16", "scale", "min")
_ROWS = (
    WeightType("q6_k", "Q6_K", 256, 6, _each(16, "BF16", "scale"), offset=32, chosen_by="bf16"),
    WeightType("q6_k_exact", "Q6_K", 256, 6, _SIX_EXACT, offset=32, chosen_by="exact"),
    WeightType("q4_k", "Q4_K", 256, 4, _K_QUANT),
    WeightType("q5_k", "Q5_K", 256, 5, _K_QUANT),
    WeightType("q8_0", "Q8_0", 32, 8, _HALF),
    WeightType("q5_0", "Q5_0", 32, 5, _HALF, offset=16),
    WeightType("q4_0", "Q4_0", 32, 4, _HALF, offset=8),
    WeightType("q4_1", "Q4_1", 32, 4, _TWO_HALVES),
    WeightType("q5_1", "Q5_1", 32, 5, _TWO_HALVES),
    WeightType("iq4_nl", "IQ4_NL", 32, 4, _HALF, book=IQ4),
    WeightType("iq4_xs", "IQ4_XS", 256, 4, _IQ4_XS, book=IQ4),
    WeightType("mxfp4", "MXFP4", 32, 4, _each(32, "U8", "scale"), book=E2M1),
)
WEIGHT_TYPES = {row.name: row for row in _ROWS}
"""Name -> row."""
PACKED_TYPES = frozenset(row.ggml for row in _ROWS)
"""GGML types that have a row."""
DEFAULT = _ROWS[0].name
"""The weight type of Q6_K in a conversion without options, of new layers, and of ExecuTorch's class."""
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
