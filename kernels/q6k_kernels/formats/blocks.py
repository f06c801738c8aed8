"""The blocks of GGUF files, decoded in numpy: the definition, for checks, tools and small data.

A block, field by field; d, m and dmin are fp16, `u8[n]` are n bytes:

    Q4_0, IQ4_NL  d, qs u8[16]                         Q4_K  d, dmin, scales u8[12], qs u8[128]
    Q4_1          d, m, qs u8[16]                      Q5_K  d, dmin, scales u8[12], qh u8[32], qs u8[128]
    Q5_0          d, qh u8[4], qs u8[16]               Q6_K  ql u8[128], qh u8[64], scales i8[16], d
    Q5_1          d, m, qh u8[4], qs u8[16]            IQ4_XS  d, scales_h u16, scales_l u8[4], qs u8[128]
    Q8_0          d, qs i8[32]                         MXFP4 e u8, qs u8[16]

Stored codes. In blocks of 32 weights, and in each 32 of IQ4_XS, weight j is the low nibble of `qs[j]`, weight
16 + j the high one; bit j of `qh`, a little-endian number, is the fifth bit of weight j. In Q4_K and Q5_K
`qs[32c + l]` has weight l of group 2c in its low nibble and of group 2c + 1 in its high one; bit g of `qh[l]` is
the fifth bit of weight l of group g. Q6_K is two halves of 128 weights: weight 32j + l of a half has its low nibble
in `ql[32 (j % 2) + l]` of that half (low nibble for j < 2, high for the rest), its high pair in bits 2j of `qh[l]`.

Scales. Q4_K and Q5_K have eight 6-bit sub-scales and mins in 12 bytes: those of groups 0..3 are the low six bits of
bytes 0..3 and 4..7; of group 4 + j the low four bits are the nibbles of byte 8 + j, the high two those of bytes j
and 4 + j. IQ4_XS has the low four bits of group g's sub-scale plus 32 in nibble g of `scales_l`, the high two in
bits 2g of `scales_h`. Q4_1 and Q5_1 add m, so that min = -m.
Source: the structures block_* in ggml-common.h and dequantize_row_* in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from q6k_kernels.formats.ggml import SUPER_BLOCK, TYPE_SIZES, GGMLType
from q6k_kernels.formats.types import WeightType, row_of

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
    "Q2_0": (_D,),
}
"""GGML type -> the floating-point scales of its block, for every type that has blocks.

ggml takes the NaN of MXFP4's E8M0 for 2 ** 127 and that of NVFP4's E4M3 for 0; no quantiser writes either.
"""


class Decoded(NamedTuple):
    """Decoded blocks of a weight type.

    Attributes:
        codes: stored codes, uint8 (..., K).
        arrays: the arrays of scales by role, (..., K / weights), of numpy's dtype for the row's (bf16: its bits).
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
    exact = row_of(row.ggml, "exact")
    codes, arrays = _READERS[row.ggml](np.ascontiguousarray(blocks).reshape(-1, size))
    shaped = {each.role: arrays[each.role].reshape(*lead, k // each.weights) for each in exact.scales}
    if exact is not row:
        from q6k_kernels.formats.planes import round_scales

        shaped = round_scales(shaped, exact)
    return Decoded(codes.reshape(*lead, k), shaped)


def block_bytes(row: WeightType) -> int:
    """Return the bytes of a GGML block of a weight type."""
    return TYPE_SIZES[GGMLType[row.ggml]][1]


def not_finite(blocks: Bytes, ggml: str) -> Iterator[tuple[ScaleNumber, npt.NDArray[np.intp]]]:
    """Yield each scale of a GGML type's block, and the indices of the blocks in which it is NaN or infinite.

    Args:
        blocks: contiguous uint8 (n, bytes).
        ggml: name of the GGML type; nothing is yielded if it is not in `STEPS`.
    """
    import numpy as np

    for number in STEPS.get(ggml, ()):
        words = _field(blocks, number.at, number.size).view(f"<u{number.size}")[:, 0]
        yield number, np.flatnonzero(words & number.mask == number.mask)


_Arrays = dict[str, "npt.NDArray[np.generic]"]

# Codes are computed eight at a time, in 64-bit words: the same byte in every byte of a word.
_EACH_BYTE = 0x0101010101010101
_NIBBLE = 0x0F * _EACH_BYTE


def _field(blocks: Bytes, at: int, size: int) -> Bytes:
    """Return `size` bytes from byte `at` of each block, contiguous (blocks, size).

    As one item of `size` bytes a field is copied about eight times as fast as byte by byte.
    """
    import numpy as np

    return np.ascontiguousarray(blocks[:, at : at + size].view(f"V{size}")).view(np.uint8)


def _halves(blocks: Bytes, at: int) -> npt.NDArray[np.float16]:
    """Return the fp16 number at byte `at`, an even one, of each block."""
    import numpy as np

    return np.ascontiguousarray(blocks.view("<f2")[:, at // 2])


def _nibbles(qs: Bytes, run: int) -> Bytes:
    """Return the codes (blocks, 2 n) of bytes (blocks, n): of each `run` bytes, low nibbles first."""
    import numpy as np

    words = qs.reshape(-1).view("<u8")
    codes = np.empty((qs.size // run, 2), f"V{run}")
    codes[:, 0] = (words & _NIBBLE).view(f"V{run}")
    codes[:, 1] = (words >> 4 & _NIBBLE).view(f"V{run}")
    return codes.view(np.uint8).reshape(len(qs), 2 * qs.shape[1])


def _add_high(codes: Bytes, qh: Bytes, bits: int) -> None:
    """Add the high `bits` bits to codes: of each 32 bytes, the lowest bits of all first, then the next."""
    import numpy as np

    words, count = qh.reshape(-1).view("<u8"), 8 // bits
    high = np.empty((qh.size // 32, count), "V32")
    for turn in range(count):
        shift = 4 - bits * turn
        part = words << shift if shift > 0 else words >> -shift
        part &= ((1 << bits) - 1 << 4) * _EACH_BYTE
        high[:, turn] = part.view("V32")
    view = codes.reshape(-1).view("<u8")
    view |= high.view("<u8").reshape(-1)


def _spread(fields: npt.NDArray[np.unsignedinteger], bits: int) -> npt.NDArray[np.uint64]:
    """Spread eight fields of `bits` bits, the lowest first, over the eight bytes of a 64-bit word."""
    import numpy as np

    words = fields.astype(np.uint64)
    for count in (4, 2, 1):
        # Of each twice `count` neighbours the upper `count` move up, until each has a byte.
        words |= words << count * (8 - bits)
        words &= sum((1 << count * bits) - 1 << at for at in range(0, 64, 8 * count))
    return words


def _read_32(scales_end: int, minimum: bool, fifth: bool) -> Callable[[Bytes], tuple[Bytes, _Arrays]]:
    """Return a reader of blocks of 32 weights: fp16 scale, m if `minimum`, fifth bits if there are, nibbles."""

    def read(blocks: Bytes) -> tuple[Bytes, _Arrays]:
        arrays: _Arrays = {"scale": _halves(blocks, 0)}
        if minimum:
            arrays["min"] = (_halves(blocks, 2).view("<u2") ^ 0x8000).view("<f2")
        codes = _nibbles(_field(blocks, scales_end + 4 * fifth, 16), 16)
        if fifth:
            words = codes.view("<u8")
            words |= _spread(_field(blocks, scales_end, 4), 1) << 4
        return codes, arrays

    return read


def _read_q8_0(blocks: Bytes) -> tuple[Bytes, _Arrays]:
    return _field(blocks, 2, 32), {"scale": _halves(blocks, 0)}


def _read_mxfp4(blocks: Bytes) -> tuple[Bytes, _Arrays]:
    return _nibbles(_field(blocks, 1, 16), 16), {"scale": _field(blocks, 0, 1)}


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Return sub-scales and mins (blocks, 8) of 12 bytes, four at a time."""
    import numpy as np

    first, second, third = packed.view("<u4").T
    six, four, top = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030
    scale = np.stack([first & six, third & four | first >> 2 & top], axis=1)
    least = np.stack([second & six, third >> 4 & four | second >> 2 & top], axis=1)
    return scale.view(np.uint8), least.view(np.uint8)


def _read_k_quant(blocks: Bytes) -> tuple[Bytes, _Arrays]:
    qs = blocks.shape[1] - SUPER_BLOCK // 2
    codes = _nibbles(_field(blocks, qs, 128), 32)
    if qs > 16:
        _add_high(codes, _field(blocks, 16, 32), 1)
    scale, least = _six_bits(_field(blocks, 4, 12))
    steps = {"steps": _halves(blocks, 0), "min_steps": _halves(blocks, 2)}
    return codes, {"scale": scale, "min": least, **steps}


def _read_q6_k(blocks: Bytes) -> tuple[Bytes, _Arrays]:
    import numpy as np

    codes = _nibbles(_field(blocks, 0, 128), 64)
    _add_high(codes, _field(blocks, 128, 64), 2)
    return codes, {"scale": _field(blocks, 192, 16).view(np.int8), "steps": _halves(blocks, 208)}


def _read_iq4_xs(blocks: Bytes) -> tuple[Bytes, _Arrays]:
    import numpy as np

    sub_scales = _spread(_field(blocks, 4, 4).view("<u4"), 4)
    sub_scales |= _spread(_field(blocks, 2, 2).view("<u2"), 2) << 4
    arrays: _Arrays = {"scale": sub_scales.view(np.int8) - np.int8(32), "steps": _halves(blocks, 0)}
    return _nibbles(_field(blocks, 8, 128), 16), arrays


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
"""GGML type -> its reader: blocks (n, bytes) -> codes (n, weights) and exact arrays (n,) or (n, groups)."""
