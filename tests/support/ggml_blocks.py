"""Blocks of every GGML type: random, at the edges of their fields, and genuine ones by ggml's own quantiser.

Where the scales lie is written down here from ggml's structures, and block sizes are the gguf package's: a second
opinion on `q6k_kernels.formats`.
"""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Kind = gguf.GGMLQuantizationType
SIZES = {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items() if sizes[0] > 1}
"""GGML type -> (weights a block, bytes a block), for the types that have blocks."""
ALL_SIZES = {**SIZES, "Q2_0": (64, 18)}
"""The same with what the gguf package does not know."""

_FIRST = ("Q4_0", "Q5_0", "Q8_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ4_NL", "IQ4_XS")
HALVES = {
    **{ggml: {"d": 0} for ggml in (*_FIRST, "Q1_0", "Q2_0")},
    **{ggml: {"d": 0, "m": 2} for ggml in ("Q4_1", "Q5_1")},
    **{ggml: {"d": 0, "dmin": 2} for ggml in ("Q4_K", "Q5_K")},
    "Q8_1": {"d": 0, "s": 2},
    "Q2_K": {"d": 80, "dmin": 82},
    "Q3_K": {"d": 108},
    "Q6_K": {"d": 208},
    "TQ1_0": {"d": 52},
    "TQ2_0": {"d": 64},
}
"""GGML type -> the byte offset of each fp16 number of a block."""
HALF_EDGES = (0.0, -0.0, 5.96e-8, -5.96e-8, 6.09e-5, -6.1e-5, 65504, -65504, 1.0)
NOT_FINITE = {"inf": 0x7C00, "minus-inf": 0xFC00, "nan": 0x7E00, "signalling-nan": 0x7C01, "minus-nan": 0xFFFF}
"""Bits of fp16 numbers that are none."""


def random_blocks(ggml: str, count: int, seed: int = 0) -> Bytes:
    """Return blocks (count, bytes) of random bytes and finite scales of a real model's size, of both signs."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, ALL_SIZES[ggml][1]), dtype=np.uint8)
    for at in HALVES.get(ggml, {}).values():
        blocks[:, at : at + 2] = (rng.normal(size=(count, 1)) * 3e-5).astype("<f2").view(np.uint8)
    if ggml == "Q8_K":
        blocks[:, :4] = (rng.normal(size=(count, 1)) * 3e-5).astype("<f4").view(np.uint8)
    elif ggml == "IQ1_M":
        put_iq1_m(blocks, (rng.normal(size=count) * 3e-5).astype("<f2").view("<u2"))
    elif ggml == "MXFP4":
        blocks[:, 0] %= 255
    elif ggml == "NVFP4":
        blocks[:, :4] %= 127
    return blocks


def put_iq1_m(blocks: Bytes, bits: npt.NDArray[np.uint16]) -> None:
    """Put the bits of fp16 numbers into IQ1_M blocks: nibble i, lowest first, on top of 16-bit word i of scales."""
    for i in range(4):
        high = blocks[:, 48 + 2 * i + 1]
        high[:] = high & 15 | (bits >> 4 * i & 15) << 4


def edge_blocks(ggml: str) -> Bytes:
    """Return blocks at the edges of their fields: bytes all 0, all ones and mixed, every kind of finite scale."""
    blocks = random_blocks(ggml, 4 * len(HALF_EDGES), seed=3)
    for index, fill in enumerate((0x00, 0xFF, 0xAA)):
        blocks[index::4] = fill
    halves = np.resize(np.repeat(np.array(HALF_EDGES, dtype="<f2"), 4), len(blocks))
    for turn, at in enumerate(HALVES.get(ggml, {}).values()):
        blocks[:, at : at + 2] = np.roll(halves, turn)[:, None].view(np.uint8)
    if ggml == "MXFP4":
        blocks[:, 0] = np.resize(np.array([0, 1, 2, 127, 128, 253, 254], dtype=np.uint8), len(blocks))
    return blocks


def quantised(rows: npt.NDArray[np.float32], ggml: str) -> Bytes:
    """Quantise rows with ggml's own code, as (rows, bytes)."""
    import libgguf  # not everywhere where random blocks are wanted

    return np.frombuffer(libgguf.quantize_rows(rows, int(Kind[ggml])), dtype=np.uint8).reshape(len(rows), -1)


def genuine(ggml: str) -> dict[str, Bytes]:
    """Return quantised rows by name; types with blocks of 32 have an odd number of blocks in a row."""
    rng = np.random.default_rng(7)
    block, k = SIZES[ggml][0], 768 if SIZES[ggml][0] == 256 else 32 * 21
    normal = rng.normal(scale=0.02, size=(9, k)).astype(np.float32)
    rows = {
        "normal": normal,
        "heavy-tailed": (rng.standard_t(2, size=(9, k)) * 0.01).astype(np.float32),
        "constant": np.full((3, block), 0.125, dtype=np.float32),
        "zero": np.zeros((3, block), dtype=np.float32),
        "tiny": normal * np.float32(1e-4),
        "huge": normal * np.float32(1e4),
    }
    return {name: quantised(values, ggml) for name, values in rows.items()}


def every_kind(ggml: str) -> dict[str, Bytes]:
    """Return genuine, edge and random blocks by name, each (rows, bytes)."""
    return {**genuine(ggml), "edges": edge_blocks(ggml).reshape(1, -1), "random": random_blocks(ggml, 37)}


def dequantised(blocks: Bytes, ggml: str) -> npt.NDArray[np.float32]:
    """Return the weights (rows, K) of blocks (rows, bytes) by the gguf package."""
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(gguf.dequantize(np.ascontiguousarray(blocks), Kind[ggml]), dtype=np.float32)
