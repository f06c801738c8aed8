"""The planes of a bundle in numpy: the definition, for checks, tools and small data.

Stored codes u (..., K) of `bits` bits become

    ql  uint8 (..., K/2)   ql[j] = lo[2j] | lo[2j+1] << 4 with lo = u & 15
    qh  of 6 bits, uint8 (..., K/4), the high pairs u >> 4: 8 bytes per chunk c of 32 weights; byte w (0..3) holds
        those of weights 32c+8w+{0,2,4,6} in bits {0-1,2-3,4-5,6-7}, byte 4+w those of 32c+8w+{1,3,5,7}
    qh  of 5 bits, uint8 (..., K/8), the fifth bits: byte c holds those of weights 8c+{0,2,4,6} in bits 0-3 and of
        8c+{1,3,5,7} in bits 4-7
    q   of 8 bits, int8 (..., K): the codes

These are the layouts of ExecuTorch's dp4a-planar classes (pytorch/executorch PR 20229 and later).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from q6k_kernels.formats.types import WeightType

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

CHUNK = 32
"""Weights whose high pairs lie in the same 8 bytes of qh."""
NUMPY_DTYPES = {"U8": "u1", "I8": "i1", "BF16": "<u2", "F16": "<f2"}
"""numpy's dtype of an array, by safetensors' name; bf16 as bits."""

_PAIR_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)


def pack(codes: Bytes, row: WeightType) -> list[Bytes]:
    """Pack stored codes into code planes.

    Args:
        codes: uint8 (..., K), K a multiple of 32.
        row: the weight type.

    Returns:
        The row's code planes in order, as uint8.

    Raises:
        ValueError: the dtype, K or a code is wrong.
    """
    if codes.dtype != np.uint8 or codes.ndim == 0 or codes.shape[-1] % CHUNK:
        raise ValueError(f"expected uint8 (..., K) with K a multiple of {CHUNK}, found {codes.dtype} {codes.shape}")
    if codes.size and codes.max() >> row.bits:
        raise ValueError(f"expected codes of {row.bits} bits, found {codes.max()}")
    if row.bits == 8:
        return [codes]
    u = np.ascontiguousarray(codes)
    # Two neighbours form a 16-bit word, the first lowest: shifting by 4 joins their nibbles in its low byte.
    neighbours = (u & np.uint8(15)).view("<u2")
    neighbours |= neighbours >> 4
    planes = [neighbours.astype(np.uint8)]
    if row.high_bits == 2:
        # Eight form a 64-bit word. A product with shifts 14 apart brings weights 0, 2, 4, 6 together in byte 6, and
        # 1, 3, 5, 7 in byte 7. No two bits of its terms meet, so nothing is carried.
        joined = _high_bits(u, 0x30) * np.uint64(1 << 44 | 1 << 30 | 1 << 16 | 1 << 2)
        by_word = joined.view(np.uint8).reshape(-1, 8)
        qh = np.empty((len(by_word) // 4, 2), "<u4")
        qh[:, 0], qh[:, 1] = (np.ascontiguousarray(by_word[:, byte]).view("<u4") for byte in (6, 7))
        planes.append(qh.view(np.uint8).reshape(*u.shape[:-1], u.shape[-1] // 4))
    elif row.high_bits == 1:
        # Likewise, all eight in byte 7; shifts 15 apart for those of one parity, 11 from weight 0 to weight 1.
        shifts = [52, 48, 37, 33, 22, 18, 7, 3]
        joined = _high_bits(u, 0x10) * np.uint64(sum(1 << shift for shift in shifts))
        planes.append(np.ascontiguousarray(joined.view(np.uint8)[..., 7::8]))
    return planes


def _high_bits(codes: Bytes, mask: int) -> npt.NDArray[np.uint64]:
    return codes.view("<u8") & np.uint64(mask * 0x0101010101010101)


def unpack(planes: Sequence[Bytes], row: WeightType) -> Bytes:
    """Unpack code planes into stored codes, the inverse of `pack`.

    Args:
        planes: the row's code planes, uint8 (..., width).
        row: the weight type.

    Returns:
        uint8 (..., K).

    Raises:
        ValueError: the planes do not agree on their shape.
    """
    arrays = row.arrays[: len(row.arrays) - len(row.scales)]
    lead, k = planes[0].shape[:-1], planes[0].shape[-1] * arrays[0].weights
    expected = [(*lead, k // array.weights) for array in arrays]
    if [plane.shape for plane in planes] != expected or any(plane.dtype != np.uint8 for plane in planes):
        found = ", ".join(f"{plane.dtype} {plane.shape}" for plane in planes)
        raise ValueError(f"planes disagree: expected uint8 {expected}, found {found}")
    if row.bits == 8:
        return planes[0]
    ql = planes[0]
    codes = np.stack([ql & 15, ql >> 4], axis=-1).reshape(*lead, k)
    if row.high_bits == 2:
        by_parity = planes[1].reshape(*lead, k // CHUNK, 2, 4)  # (..., chunk, parity, w)
        pairs = (by_parity[..., None] >> _PAIR_SHIFTS) & 3  # (..., chunk, parity, w, position)
        codes |= np.moveaxis(pairs, -3, -1).reshape(*lead, k) << 4
    elif row.high_bits == 1:
        bits = np.unpackbits(planes[1], axis=-1, bitorder="little")
        bits = bits.reshape(*lead, k // 8, 2, 4)  # (..., byte, parity, position)
        codes |= bits.swapaxes(-1, -2).reshape(*lead, k) << 4
    return codes


def code_values(codes: Bytes, row: WeightType) -> npt.NDArray[np.int8]:
    """Return the codes that stored ones stand for: minus the offset, or looked up."""
    if row.book:
        return np.array(row.book, dtype=np.int8)[codes]
    return codes.view(np.int8) - np.int8(row.offset)


def group_values(arrays: Mapping[str, npt.NDArray[Any]], row: WeightType) -> tuple[Floats, Floats | None]:
    """Return the scale and the min, or None, of each group, without rounding.

    Args:
        arrays: the arrays of scales by role, of the dtypes in `NUMPY_DTYPES`.
        row: the weight type.

    Returns:
        float32 (..., K/group), twice.
    """
    dtype = row.scales[0].dtype
    if dtype == "BF16":
        return bf16_to_float(arrays["scale"]), None
    scale = (
        half_e8m0_to_float(arrays["scale"])
        if dtype == "U8" and not row.stepped
        else _times_steps(arrays, "scale", "steps")
    )
    return scale, _times_steps(arrays, "min", "min_steps") if row.minimum else None


def _times_steps(arrays: Mapping[str, npt.NDArray[Any]], role: str, steps: str) -> Floats:
    values: Floats = arrays[role].astype(np.float32)
    if steps in arrays:
        step = arrays[steps].astype(np.float32)
        with np.errstate(invalid="ignore"):  # an infinite step times zero
            values *= np.repeat(step, values.shape[-1] // step.shape[-1], axis=-1)
    return values


def dequantize(codes: Bytes, arrays: Mapping[str, npt.NDArray[Any]], row: WeightType) -> Floats:
    """Return the weights, float32 (..., K), as ggml does: the bits of its `dequantize_row_*`."""
    scale, least = group_values(arrays, row)
    with np.errstate(invalid="ignore", over="ignore"):
        weights = code_values(codes, row).astype(np.float32).reshape(*scale.shape, row.group) * scale[..., None]
        if least is not None:
            weights -= least[..., None]
    return weights.reshape(codes.shape)


def round_scales(arrays: Mapping[str, npt.NDArray[Any]], exact: WeightType) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of the weight type with bf16 scales, of those of `exact`, the one that holds GGML's own."""
    return {"scale": round_to_bf16(group_values(arrays, exact)[0])}


def round_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round fp32 to the bits of bf16, ties to even; every NaN becomes 0x7FC0.

    A NaN's sign and payload would otherwise depend on the processor that computed it.
    """
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    result = rounded.astype(np.uint16)
    result[np.isnan(values)] = 0x7FC0
    return result


def bf16_to_float(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Convert the bits of bf16 to fp32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def half_e8m0_to_float(exponents: Bytes) -> Floats:
    """Return 2 ** (e - 128), the half of an E8M0 number, for e in 0..255, as fp32: two of them are subnormal."""
    e = exponents.astype(np.uint32)
    return np.where(e < 2, np.uint32(0x00200000) << e, (e - 1) << 23).astype(np.uint32).view(np.float32)
