"""Rows of weight types: what a row states, what is derived of it, and how it is found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from q6k_kernels.bundle.shards import DTYPE_BYTES
from q6k_kernels.bundle.storage import arrays_of
from q6k_kernels.formats import types
from q6k_kernels.formats.ggml import TYPE_SIZES, GGMLType
from q6k_kernels.formats.types import CODE_MACROS, PACKED_TYPES, WEIGHT_TYPES, WeightType, row_of, weight_type

ROWS = pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)

LOW, PAIRS, FIFTH = ("ql", "U8", 256), ("qh", "U8", 128), ("qh", "U8", 64)
K_QUANT = [("scale", "U8", 16), ("min", "U8", 16), ("steps", "F16", 2), ("min_steps", "F16", 2)]
# Of the format: GGML type, bits a weight; role, dtype and columns of each array of a tensor (N, K) with K = 512.
FORMAT = {
    "q6_k": ("Q6_K", 7.0, [LOW, PAIRS, ("scale", "BF16", 32)]),
    "q6_k_exact": ("Q6_K", 6.5625, [LOW, PAIRS, ("scale", "I8", 32), ("steps", "F16", 2)]),
    "q4_k": ("Q4_K", 4.625, [LOW, *K_QUANT]),
    "q5_k": ("Q5_K", 5.625, [LOW, FIFTH, *K_QUANT]),
    "q8_0": ("Q8_0", 8.5, [("q", "I8", 512), ("scale", "F16", 16)]),
    "q5_0": ("Q5_0", 5.5, [LOW, FIFTH, ("scale", "F16", 16)]),
    "q4_0": ("Q4_0", 4.5, [LOW, ("scale", "F16", 16)]),
    "q4_1": ("Q4_1", 5.0, [LOW, ("scale", "F16", 16), ("min", "F16", 16)]),
    "q5_1": ("Q5_1", 6.0, [LOW, FIFTH, ("scale", "F16", 16), ("min", "F16", 16)]),
    "iq4_nl": ("IQ4_NL", 4.5, [LOW, ("scale", "F16", 16)]),
    "iq4_xs": ("IQ4_XS", 4.3125, [LOW, ("scale", "I8", 16), ("steps", "F16", 2)]),
    "mxfp4": ("MXFP4", 4.25, [LOW, ("scale", "U8", 16)]),
}
SCALES = {
    ("BF16", False): "SCALES_BF16",
    ("I8", True): "SCALES_INT8_STEPS",
    ("U8", True): "SCALES_UINT8_STEPS",
    ("F16", False): "SCALES_FP16",
    ("U8", False): "SCALES_E8M0",
}
"""Dtype of the array `scale`, and whether there are steps -> what the kernels call it."""


def test_there_are_these_rows() -> None:
    assert {name: row.name for name, row in WEIGHT_TYPES.items()} == {name: name for name in FORMAT}
    assert {ggml for ggml, _, _ in FORMAT.values()} == PACKED_TYPES


@pytest.mark.parametrize("name", FORMAT)
def test_the_arrays_are_those_of_the_format(name: str) -> None:
    row, (ggml, bits, arrays) = weight_type(name), FORMAT[name]
    assert [(array.role, array.dtype, 512 // array.weights) for array in row.arrays] == arrays
    assert row.roles == tuple(role for role, _, _ in arrays)
    assert (row.ggml, row.bits_per_weight) == (ggml, bits)
    assert sum(width * DTYPE_BYTES[dtype] for _, dtype, width in arrays) * 8 == 512 * bits
    assert row.block == TYPE_SIZES[GGMLType[ggml]][0]
    for lead in ((3,), (2, 3)):
        stored = arrays_of("x", ggml, (*lead, 512), "planar", name)
        assert [(role, array.key, array.dtype, array.shape) for role, array in stored.items()] == [
            (role, f"x.{role}", dtype, (*lead, width)) for role, dtype, width in arrays
        ]


@ROWS
def test_a_tile_has_the_bits_of_its_weights_in_whole_lines(row: WeightType) -> None:
    used = 16 * 256 * row.bits_per_weight / 8
    assert used <= row.tile_bytes < used + 128
    assert row.tile_bytes % 128 == 0


@ROWS
def test_macros_are_those_that_the_kernels_read(row: WeightType) -> None:
    found = dict(row.macros)
    assert (found["Q6K_BITS"], found["Q6K_OFFSET"], found["Q6K_GROUP"]) == (row.bits, row.offset, row.group)
    assert (found["Q6K_MINIMUM"], types.BOOKS[found["Q6K_BOOK"]]) == (row.minimum, row.book)
    assert row.minimum == ("min" in row.roles)
    assert row.stepped == ("steps" in row.roles)
    assert tuple(found) == CODE_MACROS
    source = (Path(types.__file__).parents[1] / "cuda" / "common.cuh").read_text()
    assert all(name in source for name in CODE_MACROS)
    _, _, arrays = FORMAT[row.name]
    kind = SCALES[next(dtype for role, dtype, _ in arrays if role == "scale"), row.stepped]
    assert re.search(rf"^#define {kind} {found['Q6K_SCALES']}\b", source, re.MULTILINE)


def test_books_are_those_of_the_gguf_package() -> None:
    assert gguf.quants.IQ4_NL.kvalues == types.IQ4 == weight_type("iq4_nl").book == weight_type("iq4_xs").book
    assert gguf.quants.MXFP4.kvalues == types.E2M1 == weight_type("mxfp4").book


def test_rows_have_different_macros() -> None:
    """Kernels are told apart by macros alone."""
    assert len({row.macros for row in WEIGHT_TYPES.values()}) == len(WEIGHT_TYPES)


def test_a_row_is_found_by_its_name() -> None:
    assert all(weight_type(name) is row for name, row in WEIGHT_TYPES.items())
    for name in ("Q6_K", "bf16", "q6_k ", ""):
        with pytest.raises(ValueError, match=f"^format: expected one of q6_k, q6_k_exact, .*, found '{name}'$"):
            weight_type(name)


def test_a_row_is_found_by_the_ggml_type_and_the_scales() -> None:
    assert row_of("Q6_K", "bf16") is WEIGHT_TYPES["q6_k"]
    assert row_of("Q6_K", "exact") is WEIGHT_TYPES["q6_k_exact"]
    assert row_of("Q4_K", "bf16") is row_of("Q4_K", "exact") is WEIGHT_TYPES["q4_k"]
    for ggml in ("Q3_K", "F32", "q6_k"):
        with pytest.raises(ValueError, match=f"^{ggml} has no packed form; .*Q6_K.* has$"):
            row_of(ggml, "bf16")


@pytest.mark.parametrize(
    ("ggml", "shape", "storage", "format", "message"),
    [
        ("Q6_K", (3, 512), "planar", None, "stored planar, and a weight type None: planar tensors have one"),
        ("F32", (3, 512), "plain", "q6_k", "stored plain, and a weight type 'q6_k': .* others have none"),
        ("Q6_K", (3, 512), "planar", "q7_k", "format: expected one of q6_k, .*, found 'q7_k'"),
        ("Q8_0", (3, 512), "planar", "q6_k", r"Q8_0 of shape \[3, 512\] cannot be stored as q6_k"),
        ("Q6_K", (3, 500), "planar", "q6_k", r"Q6_K of shape \[3, 500\] cannot be stored as q6_k"),
        ("Q8_0", (3, 48), "planar", "q8_0", r"Q8_0 of shape \[3, 48\] cannot be stored as q8_0"),
        ("Q6_K", (512,), "planar", "q6_k", r"Q6_K of shape \[512\] cannot be stored as q6_k"),
        ("Q6_K", (1, 2, 3, 512), "planar", "q6_k", r"Q6_K of shape \[1, 2, 3, 512\] cannot be stored as q6_k"),
    ],
)
def test_what_has_no_arrays(ggml: str, shape: tuple[int, ...], storage: str, format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arrays_of("x", ggml, shape, storage, format)  # type: ignore[arg-type]


def test_the_rows_need_no_torch() -> None:
    script = "import sys, q6k_kernels.formats.types; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
