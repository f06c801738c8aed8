"""The bit layout: packing, unpacking, and rounding to bf16, against per-element oracles."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import oracles
from q6k_kernels.formats import planes
from q6k_kernels.formats.blocks import block_bytes, decode
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType

SIX = WEIGHT_TYPES["q6_k"]
ROWS = pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)
weights = hnp.arrays(np.int8, st.sampled_from([(256,), (1, 512), (2, 3, 256)]), elements=st.integers(-32, 31))


@given(q=weights)
def test_pack_is_what_the_table_says(q: np.ndarray) -> None:
    ql, qh = planes.pack((q + 32).astype(np.uint8), SIX)
    rows = q.reshape(-1, q.shape[-1]).tolist()
    expected = [oracles.planes_of_row(row) for row in rows]
    assert ql.tobytes() == b"".join(low for low, _ in expected)
    assert qh.tobytes() == b"".join(high for _, high in expected)
    assert ql.shape == (*q.shape[:-1], q.shape[-1] // 2)
    assert qh.shape == (*q.shape[:-1], q.shape[-1] // 4)


@ROWS
def test_no_rows_are_decoded_packed_and_unpacked(row: WeightType) -> None:
    codes = decode(np.empty((0, 3, 2 * block_bytes(row)), dtype=np.uint8), row).codes
    assert codes.shape == (0, 3, 2 * row.block)
    assert planes.unpack(planes.pack(codes, row), row).shape == codes.shape


@ROWS
def test_planes_of_every_type(row: WeightType) -> None:
    """Each weight where the text has it, and back."""
    rng = np.random.default_rng(row.bits)
    codes = rng.integers(0, 1 << row.bits, (2, 3, 288), dtype=np.uint8)
    found = planes.pack(codes, row)
    assert len(found) == len(row.arrays) - len(row.scales)
    np.testing.assert_array_equal(planes.unpack(found, row), codes)
    flat, rows = codes.reshape(-1, 288), [plane.reshape(6, -1) for plane in found]
    for n, i in ((0, 0), (1, 1), (2, 30), (3, 31), (4, 37), (5, 287)):
        u = int(flat[n, i])
        if row.bits == 8:
            assert rows[0][n, i] == u
            continue
        assert rows[0][n, i // 2] >> 4 * (i % 2) & 15 == u & 15
        if row.bits == 6:
            byte = rows[1][n, i // 32 * 8 + i % 32 // 8 + 4 * (i % 2)]
            assert byte >> i % 8 // 2 * 2 & 3 == u >> 4
        if row.bits == 5:
            assert rows[1][n, i // 8] >> (i % 8 // 2 + 4 * (i % 2)) & 1 == u >> 4


@ROWS
def test_weights_are_ggmls_to_the_bit(row: WeightType) -> None:
    raw = np.random.default_rng(3).integers(0, 256, (9, 8 * block_bytes(row)), dtype=np.uint8)
    codes, arrays = decode(raw, row)
    found = planes.dequantize(codes, arrays, row)
    with np.errstate(all="ignore"):
        truth = gguf.dequantize(raw, gguf.GGMLQuantizationType[row.ggml])
        if row.scales[0].dtype == "BF16":  # rounded: within half of bf16's last bit
            fine = np.isfinite(truth)
            assert (abs(found - truth)[fine] <= abs(truth[fine]) * 2.0**-8 + 1e-30).all()
            return
    same = (found.view(np.uint32) == truth.view(np.uint32)) | (np.isnan(found) & np.isnan(truth))
    assert same.all()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full(256, 64, dtype=np.uint8), "codes of 6 bits, found 64"),
        (np.zeros(255, dtype=np.uint8), "multiple of 32"),
        (np.zeros(256, dtype=np.int8), "expected uint8"),
    ],
)
def test_pack_refuses_what_it_cannot_hold(codes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planes.pack(codes, SIX)


def test_unpack_refuses_planes_that_disagree() -> None:
    with pytest.raises(ValueError, match="planes disagree"):
        planes.unpack([np.zeros(128, dtype=np.uint8), np.zeros(32, dtype=np.uint8)], SIX)


@given(bits=st.integers(0, 2**32 - 1))
def test_rounding_to_bf16_is_to_nearest_even(bits: int) -> None:
    value = np.array([bits], dtype=np.uint32).view(np.float32)
    assert planes.round_to_bf16(value)[0] == oracles.bf16(value[0])


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [(0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81), (0x7F7FFFFF, 0x7F80), (0x80000000, 0x8000)],
)
def test_ties_and_edges_of_rounding(bits: int, rounded: int) -> None:
    assert planes.round_to_bf16(np.array([bits], dtype=np.uint32).view(np.float32))[0] == rounded


@pytest.mark.parametrize("bits", [0x7F800001, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_every_nan_becomes_the_same(bits: int) -> None:
    assert planes.round_to_bf16(np.array([bits], dtype=np.uint32).view(np.float32))[0] == 0x7FC0


def test_bf16_comes_back_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    floats = planes.bf16_to_float(bits)
    finite = np.isfinite(floats)
    np.testing.assert_array_equal(planes.round_to_bf16(floats)[finite], bits[finite])
