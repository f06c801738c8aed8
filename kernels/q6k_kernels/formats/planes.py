"""The planar bit layout of 6-bit weights, in numpy: the definition, for tests, tools and small data.

A weight is `w = q * scale` with q in -32..31, one scale per group of 16. The planes hold
`u = q + 32`, split into the low nibble `lo = u & 15` and the high pair `hi = u >> 4`:

    ql  uint8 (..., K/2)   ql[j] = lo[2j] | lo[2j+1] << 4
    qh  uint8 (..., K/4)   8 bytes per chunk c of 32 weights; byte w (0..3) holds the high pairs of
                           weights 32c+8w+{0,2,4,6} in bits {0-1,2-3,4-5,6-7}, byte 4+w those of
                           weights 32c+8w+{1,3,5,7}

This is the layout of ExecuTorch's CudaDp4aPlanarInt6Tensor (pytorch/executorch PR 20229).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from q6k_kernels.formats.ggml import SUPER_BLOCK

CHUNK = 32
"""Weights whose high pairs lie in the same 8 bytes of qh."""
OFFSET = 32
"""Stored code minus weight: u = q + 32."""

_PAIR_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)


def pack(q: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Pack weights into planes.

    Args:
        q: int8 (..., K), values -32..31, K a multiple of 256.

    Returns:
        ql uint8 (..., K/2) and qh uint8 (..., K/4).

    Raises:
        ValueError: the dtype, K or a value is wrong.
    """
    if q.dtype != np.int8 or q.ndim == 0 or q.shape[-1] % SUPER_BLOCK:
        raise ValueError(f"expected int8 (..., K) with K a multiple of {SUPER_BLOCK}, found {q.dtype} {q.shape}")
    if q.size and (q.min() < -OFFSET or q.max() >= OFFSET):
        raise ValueError(f"expected weights in -32..31, found {q.min()}..{q.max()}")
    u: npt.NDArray[np.uint8] = np.ascontiguousarray(q + np.int8(OFFSET)).view(np.uint8)
    # Two neighbours form a 16-bit word, the first lowest: shifting by 4 joins their nibbles in its low byte.
    neighbours = (u & np.uint8(15)).view("<u2")
    ql = (neighbours | neighbours >> 4).astype(np.uint8)
    # Eight form a 64-bit word: shifts by 14, 28 and 42 bring weights 2, 4, 6 beside weight 0 in the low byte,
    # and 3, 5, 7 beside weight 1 in the one above.
    eights = (u >> 4).view("<u8")
    even_odd = (eights | eights >> 14 | eights >> 28 | eights >> 42).astype("<u2").view(np.uint8)
    qh = np.ascontiguousarray(even_odd.reshape(*u.shape[:-1], -1, 4, 2).swapaxes(-1, -2))
    return ql, qh.reshape(*u.shape[:-1], u.shape[-1] // 4)


def unpack(ql: npt.NDArray[np.uint8], qh: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Unpack planes into weights, the inverse of `pack`.

    Args:
        ql: uint8 (..., K/2).
        qh: uint8 (..., K/4).

    Returns:
        int8 (..., K), values -32..31.

    Raises:
        ValueError: the planes do not agree on their shape.
    """
    if ql.dtype != np.uint8 or qh.dtype != np.uint8 or ql.shape != (*qh.shape[:-1], 2 * qh.shape[-1]):
        raise ValueError(f"planes disagree: ql {ql.dtype} {ql.shape}, qh {qh.dtype} {qh.shape}")
    k = 2 * ql.shape[-1]
    low = np.stack([ql & 15, ql >> 4], axis=-1).reshape(*ql.shape[:-1], k)
    by_parity = qh.reshape(*qh.shape[:-1], -1, 2, 4)  # (..., chunk, parity, w)
    pairs = (by_parity[..., None] >> _PAIR_SHIFTS) & 3  # (..., chunk, parity, w, position)
    high = np.moveaxis(pairs, -3, -1).reshape(*ql.shape[:-1], k)
    u: npt.NDArray[np.uint8] = low | high << 4
    return u.view(np.int8) - np.int8(OFFSET)


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
