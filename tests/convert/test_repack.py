"""Q6_K decoding and repacking against per-element oracles, ggml's own code, and each other."""

from __future__ import annotations

import gguf
import libgguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from gguf_builder import q6k_blocks
from q6k_convert.convert import repack
from q6k_convert.convert.repack import array_bytes, best_path, to_planes
from q6k_convert.errors import EnvironmentMissingError
from q6k_kernels.formats import planes
from q6k_kernels.formats.blocks import BLOCK_BYTES, decode
from q6k_kernels.formats.types import Scales, row_of

Bytes = npt.NDArray[np.uint8]
Q6_K = gguf.GGMLQuantizationType.Q6_K
PATHS = [name for name, code in repack.PATHS.items() if code <= repack.PATHS[best_path()]]
SCALES: tuple[Scales, ...] = ("bf16", "exact")


def quantised(rows: npt.NDArray[np.float32]) -> Bytes:
    """Genuine Q6_K: ggml's own quantiser on real rows, as (rows, bytes)."""
    return np.frombuffer(libgguf.quantize_rows(rows, int(Q6_K)), dtype=np.uint8).reshape(len(rows), -1)


def genuine() -> dict[str, Bytes]:
    rng = np.random.default_rng(7)
    normal = rng.normal(scale=0.02, size=(9, 768)).astype(np.float32)
    return {
        "normal": quantised(normal),
        "heavy-tailed": quantised((rng.standard_t(2, size=(9, 512)) * 0.01).astype(np.float32)),
        "constant": quantised(np.full((3, 256), 0.125, dtype=np.float32)),
        "zero": quantised(np.zeros((3, 256), dtype=np.float32)),
        "tiny": quantised(normal * np.float32(1e-4)),
        "huge": quantised(normal * np.float32(1e4)),
    }


def extreme() -> Bytes:
    """Blocks at the edges of every field: all codes, sub-scales -128, 0 and 127, every kind of d."""
    rng = np.random.default_rng(3)
    steps = np.array([0.0, -0.0, 5.96e-8, -5.96e-8, 6.09e-5, 6.1e-5, 65504, -65504, 1.0], dtype="<f2")
    blocks = rng.integers(0, 256, (len(steps) * 4, BLOCK_BYTES), dtype=np.uint8)
    for index, block in enumerate(blocks):
        block[208:] = steps[index % len(steps) : index % len(steps) + 1].view(np.uint8)
        fill = (None, 0x00, 0xFF, 0xAA)[index % 4]
        if fill is not None:
            block[:192] = fill
        block[192:208] = [0x80, 0, 0x7F, 0xFF] * 4
    return blocks


ALL = {**genuine(), "extreme": extreme().reshape(1, -1), "random": np.frombuffer(q6k_blocks(37), dtype=np.uint8)}


def repacked(blocks: Bytes, scales: Scales, path: str | None = None) -> dict[str, Bytes]:
    flat = np.ascontiguousarray(blocks).reshape(-1)
    count = flat.size // BLOCK_BYTES
    arrays = {
        role: np.full(count * each, 0xA5, dtype=np.uint8)
        for role, each in array_bytes(row_of("Q6_K", scales)).items()
    }
    assert to_planes(flat, arrays, row_of("Q6_K", scales), path) is None
    return arrays


@pytest.mark.parametrize("data", ALL)
def test_decode_is_what_the_format_says(data: str) -> None:
    q, scale = decode(ALL[data])
    raw = ALL[data].tobytes()
    expected = [oracles.q6k_block(raw[at : at + BLOCK_BYTES]) for at in range(0, len(raw), BLOCK_BYTES)]
    assert q.dtype == np.int8
    assert q.reshape(-1).tolist() == [weight for weights, _ in expected for weight in weights]
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(
        scale.reshape(-1).view(np.uint32),
        np.array([s for _, scales in expected for s in scales], dtype=np.float32).view(np.uint32),
    )


@pytest.mark.parametrize("data", ALL)
def test_decode_times_scale_is_what_ggml_dequantises(data: str) -> None:
    blocks = np.atleast_2d(ALL[data])
    q, scale = decode(blocks)
    weights = q.astype(np.float32) * np.repeat(scale, 16, axis=-1)
    by_gguf = gguf.dequantize(blocks, Q6_K)
    by_ggml = libgguf.dequantize_rows(blocks, int(Q6_K))
    np.testing.assert_array_equal(weights.view(np.uint32), by_gguf.view(np.uint32))
    np.testing.assert_array_equal(weights.view(np.uint32), by_ggml.reshape(weights.shape).view(np.uint32))


def test_decode_keeps_leading_dimensions() -> None:
    blocks = np.frombuffer(q6k_blocks(12), dtype=np.uint8)
    q, scale = decode(blocks.reshape(2, 3, 420))
    assert q.shape == (2, 3, 512)
    assert scale.shape == (2, 3, 32)
    np.testing.assert_array_equal(q.reshape(-1), decode(blocks)[0])


@pytest.mark.parametrize("shape", [(209,), (2, 211), ()])
def test_decode_refuses_broken_blocks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="whole Q6_K blocks"):
        decode(np.zeros(shape, dtype=np.uint8))


def test_decode_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        decode(np.zeros(210, dtype=np.int8))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("data", ALL)
def test_every_path_packs_what_the_format_says(data: str, scales: Scales, path: str) -> None:
    arrays = repacked(ALL[data], scales, path)
    for role, expected in oracles.bundle_arrays(ALL[data].tobytes(), scales).items():
        assert arrays[role].tobytes() == expected, role


@pytest.mark.parametrize("path", PATHS)
@given(raw=st.binary(min_size=BLOCK_BYTES, max_size=4 * BLOCK_BYTES))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_packed_as_the_format_says(path: str, raw: bytes) -> None:
    blocks = bytearray(raw[: len(raw) // BLOCK_BYTES * BLOCK_BYTES])
    for at in range(0, len(blocks), BLOCK_BYTES):
        blocks[at + 209] &= 0xBF  # finite d
    for scales in SCALES:
        arrays = repacked(np.frombuffer(bytes(blocks), dtype=np.uint8), scales, path)
        assert {r: a.tobytes() for r, a in arrays.items()} == oracles.bundle_arrays(bytes(blocks), scales)


@pytest.mark.parametrize("data", ALL)
def test_straight_repacking_equals_decoding_and_packing(data: str) -> None:
    q, scale = decode(ALL[data])
    ql, qh = planes.pack(q)
    arrays = repacked(ALL[data], "bf16")
    np.testing.assert_array_equal(arrays["ql"], ql.reshape(-1))
    np.testing.assert_array_equal(arrays["qh"], qh.reshape(-1))
    np.testing.assert_array_equal(arrays["scale"].view(np.uint16), planes.round_to_bf16(scale).reshape(-1))


@pytest.mark.parametrize("data", ALL)
def test_exact_arrays_give_back_every_weight(data: str) -> None:
    arrays = repacked(ALL[data], "exact")
    q = planes.unpack(arrays["ql"], arrays["qh"]).astype(np.float32)
    steps = arrays["steps"].view("<f2").astype(np.float32)
    scale = np.repeat(steps, 16) * arrays["scale"].view(np.int8).astype(np.float32)
    weights = q * np.repeat(scale, 16)
    expected = gguf.dequantize(np.atleast_2d(ALL[data]), Q6_K).reshape(-1)
    np.testing.assert_array_equal(weights.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF])
def test_the_first_block_without_a_finite_step_is_found(path: str, bits: int) -> None:
    blocks = np.frombuffer(q6k_blocks(9), dtype=np.uint8).reshape(9, BLOCK_BYTES).copy()
    blocks[5, 208:] = blocks[7, 208:] = np.frombuffer(np.uint16(bits).tobytes(), dtype=np.uint8)
    for scales in SCALES:
        arrays = {
            role: np.empty(9 * each, dtype=np.uint8) for role, each in array_bytes(row_of("Q6_K", scales)).items()
        }
        assert to_planes(blocks.reshape(-1), arrays, row_of("Q6_K", scales), path) == 5
        if np.isnan(blocks[5, 208:].copy().view("<f2")[0]):
            expected = oracles.bundle_arrays(blocks.tobytes(), scales)
            assert {r: a.tobytes() for r, a in arrays.items()} == expected


def test_wrong_buffers_are_refused() -> None:
    blocks = np.frombuffer(q6k_blocks(2), dtype=np.uint8)
    good = {role: np.empty(2 * each, dtype=np.uint8) for role, each in array_bytes(row_of("Q6_K", "bf16")).items()}
    read_only = good["ql"].copy()
    read_only.flags.writeable = False
    for wrong in (
        {**good, "ql": good["ql"][:-1]},
        {**good, "ql": np.empty(512, dtype=np.uint8)[::2]},
        {**good, "ql": read_only},
        {**good, "steps": np.empty(4, dtype=np.uint8)},
        {"ql": good["ql"]},
    ):
        with pytest.raises(ValueError, match="contiguous writable arrays"):
            to_planes(blocks, wrong, row_of("Q6_K", "bf16"))
    with pytest.raises(ValueError, match="contiguous writable arrays"):
        to_planes(blocks[:-1], good, row_of("Q6_K", "bf16"))


def test_a_missing_repacker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    repack._library.cache_clear()
    monkeypatch.setattr(repack, "_EXTENSION", "q6k_convert._not_built")
    try:
        with pytest.raises(EnvironmentMissingError, match="q6k_convert._not_built is not installed") as caught:
            best_path()
        assert "C compiler" in caught.value.remedy
    finally:
        repack._library.cache_clear()


def test_a_path_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(repack.PATHS, "future", 99)
    with pytest.raises(EnvironmentMissingError, match="no path 'future'"):
        repacked(np.frombuffer(q6k_blocks(1), dtype=np.uint8), "bf16", "future")
