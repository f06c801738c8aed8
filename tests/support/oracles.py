"""Compute formats and operations independently of the product, one element or group at a time.

Written from the format's text (block_q6_K of ggml, the bundle's table of planes) and the operations' formulas. The
product's code is vectorised and packed, so the two share only the text.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def q6k_block(block: bytes) -> tuple[list[int], list[float]]:
    """Decode a 210-byte block to 256 codes minus 32, and 16 scales d * sub-scale."""
    ql, qh, scales = block[:128], block[128:192], struct.unpack("16b", block[192:208])
    d = struct.unpack("<e", block[208:])[0]
    q = [0] * 256
    for half in range(2):
        for j in range(32):
            low, high, pairs = ql[64 * half + j], ql[64 * half + 32 + j], qh[32 * half + j]
            at = 128 * half + j
            q[at] = (low & 15 | (pairs & 3) << 4) - 32
            q[at + 32] = (high & 15 | (pairs >> 2 & 3) << 4) - 32
            q[at + 64] = (low >> 4 | (pairs >> 4 & 3) << 4) - 32
            q[at + 96] = (high >> 4 | (pairs >> 6 & 3) << 4) - 32
    return q, [d * s for s in scales]


def planes_of_row(q: list[int]) -> tuple[bytes, bytes]:
    """Pack codes -32..31 to the ql and qh bytes of a row."""
    u = [weight + 32 for weight in q]
    ql = bytes(u[2 * j] & 15 | (u[2 * j + 1] & 15) << 4 for j in range(len(u) // 2))
    qh = bytearray()
    for chunk in range(len(u) // 32):
        for first in (0, 1):
            for w in range(4):
                byte = 0
                for position in range(4):
                    byte |= (u[32 * chunk + 8 * w + first + 2 * position] >> 4) << 2 * position
                qh.append(byte)
    return ql, bytes(qh)


def bf16(value: float) -> int:
    """Round to bf16, to nearest even, by comparing the bits cut off; NaN becomes 0x7FC0."""
    if value != value:
        return 0x7FC0
    bits = struct.unpack("<I", np.float32(value).tobytes())[0]
    kept, cut = bits >> 16, bits & 0xFFFF
    return int(kept + (cut > 0x8000 or (cut == 0x8000 and kept & 1)))


def bundle_arrays(blocks: bytes, scales: str) -> dict[str, bytes]:
    """Return the bytes of every array that a bundle holds for these blocks."""
    out: dict[str, bytearray] = {role: bytearray() for role in ("ql", "qh", "scale", "steps")}
    for at in range(0, len(blocks), 210):
        block = blocks[at : at + 210]
        q, products = q6k_block(block)
        ql, qh = planes_of_row(q)
        out["ql"] += ql
        out["qh"] += qh
        if scales == "exact":
            out["scale"] += block[192:208]
            out["steps"] += block[208:]
        else:
            out["scale"] += b"".join(struct.pack("<H", bf16(value)) for value in products)
    if scales == "bf16":
        del out["steps"]
    return {role: bytes(data) for role, data in out.items()}


def rounded(values: F64, dtype: str) -> F64:
    """Round each value to fp32 and then to "bfloat16", "float16" or "float32"."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
        if dtype == "float32":
            return single.astype(np.float64)
        if dtype == "float16":
            return single.astype(np.float16).astype(np.float64)
    assert dtype == "bfloat16"
    bits = np.array([bf16(float(value)) for value in single.ravel()], dtype=np.uint32) << 16
    return bits.view(np.float32).astype(np.float64).reshape(values.shape)


def weights(codes: F64, scale: F64, least: F64 | None) -> F64:
    """Return scale * code - min (N, K) of codes (N, K), scales and mins (N, K/G), column by column."""
    group = codes.shape[1] // scale.shape[1]
    out = np.empty(codes.shape)
    for column in range(codes.shape[1]):
        out[:, column] = scale[:, column // group] * codes[:, column]
        if least is not None:
            out[:, column] -= least[:, column // group]
    return out


def quantised(x: F32) -> tuple[F64, F32]:
    """Quantise activations (M, K) to 8 bits, value by value: return a (M, K) and d_a (M, K/32)."""
    a, d_a = np.zeros(x.shape), np.zeros((len(x), x.shape[1] // 32), dtype=np.float32)
    for row in range(x.shape[0]):
        for group in range(x.shape[1] // 32):
            values = x[row, 32 * group : 32 * group + 32]
            if not np.isfinite(values).all():
                d_a[row, group] = np.nan
                continue
            d_a[row, group] = step = max(abs(value) for value in values) / np.float32(127)
            for at, value in enumerate(values):
                if step:
                    # Python rounds half to even; numpy divides in fp32.
                    a[row, 32 * group + at] = max(-127, min(127, round(float(value / step))))
    return a, d_a


def linear(x: F32, codes: F64, scale: F64, least: F64 | None, activations: str, dtype: str) -> tuple[F64, F64]:
    """Return the output (M, N) and the sum of its terms' absolute values, by a loop over groups of 16 weights.

    `dtype` is the dtype of x, to which "bf16" rounds weights.
    """
    y, magnitude = np.zeros((len(x), len(codes))), np.zeros((len(x), len(codes)))
    with np.errstate(invalid="ignore"):
        if activations == "bf16":
            w, wide = rounded(weights(codes, scale, least), dtype), x.astype(np.float64)
            for group in range(codes.shape[1] // 16):
                at = slice(16 * group, 16 * group + 16)
                terms = wide[:, None, at] * w[:, at]
                y, magnitude = y + terms.sum(-1), magnitude + abs(terms).sum(-1)
            return y, magnitude
        a, d_a = quantised(x)
        size = min(32, codes.shape[1] // scale.shape[1])
        for group in range(codes.shape[1] // size):
            at, mine = slice(size * group, size * group + size), size * group * scale.shape[1] // codes.shape[1]
            step = d_a[:, size * group // 32, None].astype(np.float64)
            term = (a[:, at] @ codes[:, at].T) * scale[:, mine] * step
            y, magnitude = y + term, magnitude + abs(term)
            if least is not None:
                term = a[:, at].sum(1)[:, None] * least[:, mine] * step
                y, magnitude = y - term, magnitude + abs(term)
    return y, magnitude
