"""Rows of weight types: what a row states, what is derived of it, and how it is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from q6k_kernels.bundle.shards import DTYPE_BYTES
from q6k_kernels.bundle.storage import arrays_of
from q6k_kernels.formats import types
from q6k_kernels.formats.types import CODE_MACROS, PACKED_TYPES, WEIGHT_TYPES, WeightType, row_of, weight_type

ROWS = pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)

# Of the format: role, dtype and columns of a tensor (N, K) with K = 512.
ARRAYS = {
    "q6_k": [("ql", "U8", 256), ("qh", "U8", 128), ("scale", "BF16", 32)],
    "q6_k_exact": [("ql", "U8", 256), ("qh", "U8", 128), ("scale", "I8", 32), ("steps", "F16", 2)],
}
SIZES = {"q6_k": (3584, 7.0), "q6_k_exact": (3360, 6.5625)}
"""Bytes of a tile, bits of a weight."""


def test_there_are_these_rows() -> None:
    assert list(WEIGHT_TYPES) == list(ARRAYS)
    assert {name: row.name for name, row in WEIGHT_TYPES.items()} == {name: name for name in ARRAYS}
    assert {"Q6_K"} == PACKED_TYPES


@pytest.mark.parametrize("name", ARRAYS)
def test_the_arrays_are_those_of_the_format(name: str) -> None:
    row = weight_type(name)
    assert [(array.role, array.dtype, 512 // array.weights) for array in row.arrays] == ARRAYS[name]
    assert row.roles == tuple(role for role, _, _ in ARRAYS[name])
    for lead in ((3,), (2, 3)):
        stored = arrays_of("x", "Q6_K", (*lead, 512), "planar", name)
        assert [(role, array.key, array.dtype, array.shape) for role, array in stored.items()] == [
            (role, f"x.{role}", dtype, (*lead, width)) for role, dtype, width in ARRAYS[name]
        ]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_follow_from_the_arrays(name: str) -> None:
    row = weight_type(name)
    assert (row.tile_bytes, row.bits_per_weight) == SIZES[name]
    assert sum(width * DTYPE_BYTES[dtype] for _, dtype, width in ARRAYS[name]) * 8 == 512 * row.bits_per_weight
    assert (row.bits, row.offset, row.block, row.group) == (6, 32, 256, 16)


@ROWS
def test_a_tile_has_the_bits_of_its_weights(row: WeightType) -> None:
    assert row.tile_bytes * 8 == 16 * 256 * row.bits_per_weight
    assert row.tile_bytes % 16 == 0
    assert all(types.DTYPE_BYTES[array.dtype] == DTYPE_BYTES[array.dtype] for array in row.arrays)


@ROWS
def test_macros_are_those_that_the_kernels_read(row: WeightType) -> None:
    expected = {"Q6K_BITS": 6, "Q6K_GROUP": 16, "Q6K_MINIMUM": 0, "Q6K_SCALES": int(row.name == "q6_k_exact")}
    assert dict(row.macros) == expected
    assert tuple(name for name, _ in row.macros) == CODE_MACROS
    assert row.stepped == (row.name == "q6_k_exact")
    source = (Path(types.__file__).parents[1] / "cuda" / "common.cuh").read_text()
    assert all(name in source for name in CODE_MACROS)


def test_rows_have_different_macros_and_tiles() -> None:
    """Kernels are told apart by macros alone."""
    rows = list(WEIGHT_TYPES.values())
    assert len({row.macros for row in rows}) == len({row.tile_bytes for row in rows}) == len(rows)


def test_a_row_is_found_by_its_name() -> None:
    assert all(weight_type(name) is row for name, row in WEIGHT_TYPES.items())
    for name in ("Q6_K", "bf16", "q6_k ", ""):
        with pytest.raises(ValueError, match=f"^format: expected one of q6_k, q6_k_exact, found '{name}'$"):
            weight_type(name)


def test_a_row_is_found_by_the_ggml_type_and_the_scales() -> None:
    assert row_of("Q6_K", "bf16") is WEIGHT_TYPES["q6_k"]
    assert row_of("Q6_K", "exact") is WEIGHT_TYPES["q6_k_exact"]
    for ggml in ("Q8_0", "F32", "q6_k"):
        with pytest.raises(ValueError, match=f"^{ggml} has no packed form; Q6_K has$"):
            row_of(ggml, "bf16")


@pytest.mark.parametrize(
    ("ggml", "shape", "storage", "format", "message"),
    [
        ("Q6_K", (3, 512), "planar", None, "stored planar, and a weight type None: planar tensors have one"),
        ("F32", (3, 512), "plain", "q6_k", "stored plain, and a weight type 'q6_k': .* others have none"),
        ("Q6_K", (3, 512), "planar", "q7_k", "format: expected one of q6_k, q6_k_exact, found 'q7_k'"),
        ("Q8_0", (3, 512), "planar", "q6_k", r"Q8_0 of shape \[3, 512\] cannot be stored as q6_k"),
        ("Q6_K", (3, 500), "planar", "q6_k", r"Q6_K of shape \[3, 500\] cannot be stored as q6_k"),
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
