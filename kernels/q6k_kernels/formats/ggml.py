"""GGML's tensor types: numbers, names and block sizes.

The `gguf` package has the same table, perhaps an older one, and a test compares the two. This copy exists because
importing that package takes longer than everything else a command does before its work.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

SUPER_BLOCK = 256
"""Weights of a block of the K-quants, and columns of a tile."""


class GGMLType(IntEnum):
    """GGML's types, by their numbers in a GGUF file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


TYPE_SIZES = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q8_1: (32, 40),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
    GGMLType.Q8_K: (256, 292),
    GGMLType.IQ2_XXS: (256, 66),
    GGMLType.IQ2_XS: (256, 74),
    GGMLType.IQ3_XXS: (256, 98),
    GGMLType.IQ1_S: (256, 50),
    GGMLType.IQ4_NL: (32, 18),
    GGMLType.IQ3_S: (256, 110),
    GGMLType.IQ2_S: (256, 82),
    GGMLType.IQ4_XS: (256, 136),
    GGMLType.I8: (1, 1),
    GGMLType.I16: (1, 2),
    GGMLType.I32: (1, 4),
    GGMLType.I64: (1, 8),
    GGMLType.F64: (1, 8),
    GGMLType.IQ1_M: (256, 56),
    GGMLType.BF16: (1, 2),
    GGMLType.TQ1_0: (256, 54),
    GGMLType.TQ2_0: (256, 66),
    GGMLType.MXFP4: (32, 17),
    GGMLType.NVFP4: (64, 36),
    GGMLType.Q1_0: (128, 18),
    GGMLType.Q2_0: (64, 18),
}
"""GGML type -> (weights a block, bytes a block)."""

REMOVED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Type numbers that ggml has withdrawn -> the names they had."""


@dataclass(frozen=True, slots=True)
class UnknownType:
    """A type of which neither name nor size is known here: newer than this table, or withdrawn by ggml."""

    number: int

    @property
    def name(self) -> str:
        """What lists show in place of a name."""
        return REMOVED_TYPES.get(self.number, f"type {self.number}")

    @property
    def problem(self) -> str:
        """Why no weight of it can be read."""
        if self.number in REMOVED_TYPES:
            return f"type {self.number} ({self.name}) was removed from ggml"
        return f"tensor type {self.number} is unknown"

    @property
    def remedy(self) -> str:
        """How to get a model with weights that can be read."""
        if self.number in REMOVED_TYPES:
            return "Quantise the model again with a current llama.cpp"
        return "A newer release of q6k-convert may know it"


def type_of(number: int) -> GGMLType | UnknownType:
    """Return the type of a number in a GGUF file."""
    return GGMLType(number) if number in GGMLType._value2member_map_ else UnknownType(number)


def super_blocks(k: int) -> int:
    """Return the tiles along K: the last may be filled in part."""
    return (k + SUPER_BLOCK - 1) // SUPER_BLOCK


def dequantizes(name: str) -> bool:
    """Check whether weights of the type of this name can be read: the `gguf` package knows how."""
    import gguf  # imported here: it takes longer than most commands
    import numpy as np

    if name not in gguf.GGMLQuantizationType.__members__:
        return False
    kind = gguf.GGMLQuantizationType[name]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True
