"""The blocks of GGUF files, decoded in numpy: the definition, for checks, tools and small data.

A block, field by field; d, m and dmin are fp16, `u8[n]` are n bytes:

    Q4_0, IQ4_NL  d, qs u8[16]                         Q4_K  d, dmin, scales u8[12], qs u8[128]
    Q4_1          d, m, qs u8[16]                      Q5_K  d, dmin, scales u8[12], qh u8[32], qs u8[128]
    Q5_0          d, qh u8[4], qs u8[16]               Q6_K  ql u8[128], qh u8[64], scales i8[16], d
    Q5_1          d, m, qh u8[4], qs u8[16]            IQ4_XS  d, scales_h u16, scales_l u8[4], qs u8[128]
    Q8_0          d, qs i8[32]                         MXFP4 e u8, qs u8[16]

Stored codes. In blocks of 32 weights, and in each 32 of IQ4_XS, weight j is the low nibble of `qs[j]`, weight 16 + j
the high one; bit j of `qh`, a little-endian number, is the fifth bit of weight j. In Q4_K and Q5_K `qs[32c + l]` has
weight l of group 2c in its low nibble and of group 2c + 1 in its high one; bit g of `qh[l]` is the fifth bit of weight
l of group g. Q6_K is two halves of 128 weights: weight 32j + l of a half has its low nibble in `ql[32 (j % 2) + l]` of
that half (low nibble for j < 2, high for the rest) and its high pair in bits 2j of `qh[l]`.

Scales. Q4_K and Q5_K have eight 6-bit sub-scales and mins in 12 bytes: those of groups 0..3 are the low six bits of
bytes 0..3 and 4..7; of group 4 + j the low four bits are the nibbles of byte 8 + j, the high two those of bytes j and
4 + j. IQ4_XS has the low four bits of group g's sub-scale plus 32 in nibble g of `scales_l`, the high two in bits 2g of
`scales_h`. Q4_1 and Q5_1 add m, so that min = -m.
Source: the structures block_* in ggml-common.h and dequantize_row_* in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from q6k_kernels.formats.ggml import SUPER_BLOCK, TYPE_SIZES, GGMLType
from q6k_kernels.formats.types import WeightType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]


class ScaleNumber(NamedTuple):
    """A floating-point scale of a block, and what makes it NaN or infinite.

    Attributes:
        name: what ggml calls it.
        at: its byte offset in the block.
        size: bytes of the little-endian word there; an fp16 unless it is given.
        mask: bits of that word that are all set if, and only if, the number is NaN or infinite.
    """

    name: str
    at: int
    size: int = 2
    mask: int = 0x7C00


_D, _TWO = ScaleNumber("d", 0), (ScaleNumber("d", 0), ScaleNumber("dmin", 2))
STEPS: dict[str, tuple[ScaleNumber, ...]] = {
    "Q4_0": (_D,),
    "Q4_1": (_D, ScaleNumber("m", 2)),
    "Q5_0": (_D,),
    "Q5_1": (_D, ScaleNumber("m", 2)),
    "Q8_0": (_D,),
    "Q8_1": (_D, ScaleNumber("s", 2)),
    "Q2_K": (ScaleNumber("d", 80), ScaleNumber("dmin", 82)),
    "Q3_K": (ScaleNumber("d", 108),),
    "Q4_K": _TWO,
    "Q5_K": _TWO,
    "Q6_K": (ScaleNumber("d", 208),),
    "Q8_K": (ScaleNumber("d", 0, 4, 0x7F800000),),
    "IQ2_XXS": (_D,),
    "IQ2_XS": (_D,),
    "IQ2_S": (_D,),
    "IQ3_XXS": (_D,),
    "IQ3_S": (_D,),
    "IQ1_S": (_D,),
    # Four nibbles of d, lowest first, are the top ones of four 16-bit words.
    "IQ1_M": (ScaleNumber("d", 48, 8, 0x7000_C000_0000_0000),),
    "IQ4_NL": (_D,),
    "IQ4_XS": (_D,),
    "TQ1_0": (ScaleNumber("d", 52),),
    "TQ2_0": (ScaleNumber("d", 64),),
    "MXFP4": (ScaleNumber("e", 0, 1, 0xFF),),
    "NVFP4": tuple(ScaleNumber(f"d[{group}]", group, 1, 0x7F) for group in range(4)),
    "Q1_0": (_D,),
}
"""GGML type -> the floating-point scales of its block, for every type that has blocks.

ggml takes the NaN of MXFP4's E8M0 for 2 ** 127 and that of NVFP4's E4M3 for 0; no quantiser writes either.
"""


class Decoded(NamedTuple):
    """Decoded blocks of a weight type.

    Attributes:
        codes: stored codes, uint8 (..., K).
        arrays: the arrays of scales by role, (..., K / weights), of numpy's dtype for the row's (bf16: uint16 bits).
    """

    codes: Bytes
    arrays: dict[str, npt.NDArray[np.generic]]


def decode(blocks: Bytes, row: WeightType) -> Decoded:
    """Decode blocks to what a bundle holds of them, before codes are packed into planes.

    Args:
        blocks: uint8 (..., bytes), the last dimension a whole number of blocks.
        row: the weight type.

    Raises:
        ValueError: the dtype is wrong, or the last block is incomplete.
    """
    import numpy as np  # imported here: a conversion starts sooner without it

    size = block_bytes(row)
    if blocks.dtype != np.uint8 or blocks.ndim == 0 or blocks.shape[-1] % size:
        raise ValueError(
            f"expected uint8 (..., n * {size}), found {blocks.dtype} {blocks.shape}: "
            f"the last dimension holds whole {row.ggml} blocks"
        )
    lead, k = blocks.shape[:-1], blocks.shape[-1] // size * row.block
    codes, arrays = _READERS[row.ggml](np.ascontiguousarray(blocks).reshape(-1, size), row)
    shaped = {each.role: arrays[each.role].reshape(*lead, k // each.weights) for each in row.scales}
    return Decoded(codes.reshape(*lead, k), shaped)


def block_bytes(row: WeightType) -> int:
    """Return the bytes of a GGML block of a weight type."""
    return TYPE_SIZES[GGMLType[row.ggml]][1]


_Arrays = dict[str, "npt.NDArray[np.generic]"]


def _halves(blocks: Bytes, at: int) -> npt.NDArray[np.float16]:
    """Return the fp16 number at byte `at` of each block."""
    import numpy as np

    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0]


def _nibbles(qs: Bytes) -> Bytes:
    """Return the codes (blocks, 32 n) of bytes (blocks, 16 n): of each 16, low nibbles first."""
    import numpy as np

    sixteen = qs.reshape(len(qs), -1, 1, 16)
    return np.concatenate([sixteen & 15, sixteen >> 4], axis=2).reshape(len(qs), -1)


def _bits(qh: Bytes) -> Bytes:
    """Return the bits (blocks, 32) of four bytes, lowest first, as 0 or 16."""
    import numpy as np

    return np.unpackbits(qh, axis=1, bitorder="little") << 4


def _read_32(scales_end: int, minimum: bool, fifth: bool) -> Callable[[Bytes, WeightType], tuple[Bytes, _Arrays]]:
    """Return a reader of blocks of 32 weights: fp16 scale, m if `minimum`, fifth bits if there are, nibbles."""

    def read(blocks: Bytes, row: WeightType) -> tuple[Bytes, _Arrays]:
        del row
        arrays: _Arrays = {"scale": _halves(blocks, 0)}
        if minimum:
            arrays["min"] = (_halves(blocks, 2).view("<u2") ^ 0x8000).view("<f2")
        codes = _nibbles(blocks[:, scales_end + 4 * fifth :])
        if fifth:
            codes |= _bits(blocks[:, scales_end : scales_end + 4])
        return codes, arrays

    return read


def _read_q8_0(blocks: Bytes, row: WeightType) -> tuple[Bytes, _Arrays]:
    del row
    return blocks[:, 2:], {"scale": _halves(blocks, 0)}


def _read_mxfp4(blocks: Bytes, row: WeightType) -> tuple[Bytes, _Arrays]:
    del row
    return _nibbles(blocks[:, 1:]), {"scale": blocks[:, 0]}


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Return sub-scales and mins (blocks, 8) of 12 bytes."""
    import numpy as np

    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    least = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scale, least


def _read_k_quant(blocks: Bytes, row: WeightType) -> tuple[Bytes, _Arrays]:
    import numpy as np

    scale, least = _six_bits(blocks[:, 4:16])
    qs = blocks[:, -128:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(-1, 8, 32)
    if row.bits == 5:
        codes |= (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    steps = {"steps": _halves(blocks, 0), "min_steps": _halves(blocks, 2)}
    return codes.reshape(-1, SUPER_BLOCK), {"scale": scale, "min": least, **steps}


def _read_q6_k(blocks: Bytes, row: WeightType) -> tuple[Bytes, _Arrays]:
    import numpy as np

    from q6k_kernels.formats.planes import round_to_bf16

    nibble_shifts, pair_shifts = np.array([0, 4], dtype=np.uint8), np.array([0, 2, 4, 6], dtype=np.uint8)
    # (block, half, nibble, 64) flattens to weight order: low nibbles of ql[0..63], then high ones.
    low = blocks[:, None, :128].reshape(-1, 2, 1, 64) >> nibble_shifts[:, None] & 15
    high = blocks[:, None, 128:192].reshape(-1, 2, 1, 32) >> pair_shifts[:, None] & 3
    codes = low.reshape(-1, SUPER_BLOCK) | high.reshape(-1, SUPER_BLOCK) << 4
    scale, d = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8), _halves(blocks, 208)
    if row.stepped:
        return codes, {"scale": scale, "steps": d}
    with np.errstate(invalid="ignore"):  # an infinite d times a zero sub-scale
        return codes, {"scale": round_to_bf16(d.astype(np.float32)[:, None] * scale.astype(np.float32))}


def _read_iq4_xs(blocks: Bytes, row: WeightType) -> tuple[Bytes, _Arrays]:
    import numpy as np

    del row
    low = blocks[:, 4:8, None] >> np.array([0, 4], dtype=np.uint8) & 15
    high = blocks[:, 2:4, None] >> np.array([0, 2, 4, 6], dtype=np.uint8) & 3
    scale = (low.reshape(-1, 8) | high.reshape(-1, 8) << 4).view(np.int8) - np.int8(32)
    return _nibbles(blocks[:, 8:]), {"scale": scale, "steps": _halves(blocks, 0)}


_READERS = {
    "Q6_K": _read_q6_k,
    "Q4_K": _read_k_quant,
    "Q5_K": _read_k_quant,
    "Q8_0": _read_q8_0,
    "Q5_0": _read_32(2, minimum=False, fifth=True),
    "Q4_0": _read_32(2, minimum=False, fifth=False),
    "Q4_1": _read_32(4, minimum=True, fifth=False),
    "Q5_1": _read_32(4, minimum=True, fifth=True),
    "IQ4_NL": _read_32(2, minimum=False, fifth=False),
    "IQ4_XS": _read_iq4_xs,
    "MXFP4": _read_mxfp4,
}
"""GGML type -> its reader: blocks (n, bytes) and the row -> codes (n, weights) and arrays (n,) or (n, groups)."""
