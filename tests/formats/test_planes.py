"""The bit layout: packing, unpacking, and rounding to bf16, against per-element oracles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import oracles
from q6k_kernels.formats import planes

weights = hnp.arrays(np.int8, st.sampled_from([(256,), (1, 512), (2, 3, 256)]), elements=st.integers(-32, 31))


@given(q=weights)
def test_pack_is_what_the_table_says(q: np.ndarray) -> None:
    ql, qh = planes.pack(q)
    rows = q.reshape(-1, q.shape[-1]).tolist()
    expected = [oracles.planes_of_row(row) for row in rows]
    assert ql.tobytes() == b"".join(low for low, _ in expected)
    assert qh.tobytes() == b"".join(high for _, high in expected)
    assert ql.shape == (*q.shape[:-1], q.shape[-1] // 2)
    assert qh.shape == (*q.shape[:-1], q.shape[-1] // 4)


@given(q=weights)
def test_unpack_undoes_pack(q: np.ndarray) -> None:
    np.testing.assert_array_equal(planes.unpack(*planes.pack(q)), q)


def test_every_plane_byte_is_used() -> None:
    """Random planes survive unpacking and packing: the layout has no spare bits."""
    rng = np.random.default_rng(0)
    ql = rng.integers(0, 256, (3, 128), dtype=np.uint8)
    qh = rng.integers(0, 256, (3, 64), dtype=np.uint8)
    again = planes.pack(planes.unpack(ql, qh))
    np.testing.assert_array_equal(again[0], ql)
    np.testing.assert_array_equal(again[1], qh)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (np.full(256, 32, dtype=np.int8), r"weights in -32\.\.31, found 32\.\.32"),
        (np.full(256, -33, dtype=np.int8), r"found -33\.\.-33"),
        (np.zeros(255, dtype=np.int8), "multiple of 256"),
        (np.zeros(256, dtype=np.uint8), "expected int8"),
    ],
)
def test_pack_refuses_what_it_cannot_hold(q: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planes.pack(q)


def test_unpack_refuses_planes_that_disagree() -> None:
    with pytest.raises(ValueError, match="planes disagree"):
        planes.unpack(np.zeros(128, dtype=np.uint8), np.zeros(32, dtype=np.uint8))


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
