"""Independent statements of the formats, one element at a time, slow and plain.

Written from the format's text (block_q6_K of ggml, the bundle's table of planes); the product's code
is vectorised and packed, so the two share nothing but the text.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def q6k_block(block: bytes) -> tuple[list[int], list[float]]:
    """One 210-byte block -> 256 codes minus 32, and 16 scales d * sub-scale."""
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
    """Weights -32..31 -> the ql and qh bytes of a row."""
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
    """Round to nearest even, by looking at what is cut off; NaN is 0x7FC0."""
    if value != value:
        return 0x7FC0
    bits = struct.unpack("<I", np.float32(value).tobytes())[0]
    kept, cut = bits >> 16, bits & 0xFFFF
    return int(kept + (cut > 0x8000 or (cut == 0x8000 and kept & 1)))


def bundle_arrays(blocks: bytes, scales: str) -> dict[str, bytes]:
    """Blocks -> the bytes of every array a bundle holds for them."""
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
