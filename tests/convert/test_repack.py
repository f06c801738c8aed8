"""The compiled repacker against the definition in numpy, per-element oracles, and ggml's own code."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import gguf
import libgguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggml_blocks
import oracles
from q6k_convert.convert import repack
from q6k_convert.convert.repack import (
    array_bytes,
    best_path,
    dequantize,
    dequantizes_natively,
    first_nonfinite,
    to_planes,
)
from q6k_convert.errors import EnvironmentMissingError
from q6k_kernels.formats import planes
from q6k_kernels.formats.blocks import STEPS, ScaleNumber, block_bytes, decode
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType, row_of

Bytes = npt.NDArray[np.uint8]
PATHS = list(dict.fromkeys(("portable", best_path())))
ROWS = list(WEIGHT_TYPES.values())
IDS = list(WEIGHT_TYPES)
Q6_K_ROWS = [row_of("Q6_K", "bf16"), row_of("Q6_K", "exact")]
NATIVE = ("Q2_K", "Q3_K")
"""Types that become bf16."""
DATA = ("normal", "heavy-tailed", "constant", "zero", "tiny", "huge", "edges", "random")

blocks_of = cache(ggml_blocks.every_kind)
"""GGML type -> blocks (rows, bytes) by the names in DATA."""


def all_blocks(ggml: str) -> Bytes:
    """Blocks (n, bytes of one) of every kind of data."""
    return np.concatenate([blocks_of(ggml)[data].reshape(-1, ggml_blocks.SIZES[ggml][1]) for data in DATA])


def repacked(blocks: Bytes, row: WeightType, path: str | None = None) -> dict[str, Bytes]:
    flat = np.ascontiguousarray(blocks).reshape(-1)
    count = flat.size // block_bytes(row)
    arrays = {role: np.full(count * each, 0xA5, dtype=np.uint8) for role, each in array_bytes(row).items()}
    to_planes(flat, arrays, row, path)
    return arrays


def defined(blocks: Bytes, row: WeightType) -> dict[str, bytes]:
    """The arrays by the definition in numpy."""
    decoded = decode(blocks, row)
    arrays = [*planes.pack(decoded.codes, row), *(decoded.arrays[array.role] for array in row.scales)]
    return {role: np.ascontiguousarray(array).tobytes() for role, array in zip(row.roles, arrays, strict=True)}


def weights_of(arrays: dict[str, Bytes], row: WeightType, rows: int) -> npt.NDArray[np.float32]:
    """The weights that arrays stand for, (rows, K)."""
    dtypes = {array.role: planes.NUMPY_DTYPES[array.dtype] for array in row.arrays}
    shaped = {role: arrays[role].view(dtype).reshape(rows, -1) for role, dtype in dtypes.items()}
    codes = planes.unpack([shaped[role].view(np.uint8) for role in row.roles[: -len(row.scales)]], row)
    return planes.dequantize(codes, shaped, row)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_every_path_packs_what_is_defined(row: WeightType, data: str, path: str) -> None:
    blocks = blocks_of(row.ggml)[data]
    found = {role: array.tobytes() for role, array in repacked(blocks, row, path).items()}
    assert found == defined(blocks, row)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("row", [r for r in ROWS if r.chosen_by != "bf16"], ids=lambda r: r.name)
def test_packed_weights_are_ggmls_to_the_bit(row: WeightType, data: str) -> None:
    blocks = blocks_of(row.ggml)[data]
    weights = weights_of(repacked(blocks, row), row, len(blocks)).view(np.uint32)
    by_gguf = ggml_blocks.dequantised(blocks, row.ggml)
    by_ggml = libgguf.dequantize_rows(blocks, int(gguf.GGMLQuantizationType[row.ggml])).reshape(weights.shape)
    assert not np.isnan(by_gguf).any()
    np.testing.assert_array_equal(weights, by_gguf.view(np.uint32))
    np.testing.assert_array_equal(weights, by_ggml.view(np.uint32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("row", Q6_K_ROWS, ids=["bf16", "exact"])
def test_q6_k_is_packed_as_the_formats_text_says(row: WeightType, data: str, path: str) -> None:
    blocks = blocks_of("Q6_K")[data]
    found = {role: array.tobytes() for role, array in repacked(blocks, row, path).items()}
    assert found == oracles.bundle_arrays(blocks.tobytes(), str(row.chosen_by))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=IDS)
@given(raw=st.binary(min_size=4 * 210, max_size=4 * 210))
@settings(max_examples=40, deadline=None)
def test_random_bytes_are_packed_as_defined(path: str, row: WeightType, raw: bytes) -> None:
    # Scales that are not finite, too, as --allow-nonfinite keeps them.
    blocks = np.frombuffer(raw, dtype=np.uint8)[: len(raw) // block_bytes(row) * block_bytes(row)]
    assert {role: array.tobytes() for role, array in repacked(blocks, row, path).items()} == defined(blocks, row)


# On processors that are emulated

ROOT = Path(__file__).parents[2]
EMULATED = {"aarch64": ("aarch64-linux-gnu-gcc", "qemu-aarch64"), "x86_64": ("x86_64-linux-gnu-gcc", "qemu-x86_64")}


@pytest.fixture(scope="session")
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build the repacker for a processor, as the package does, and return the command that runs it."""
    compiler, emulator = EMULATED[request.param]
    if shutil.which(compiler) is None or shutil.which(emulator) is None:
        pytest.skip(f"{compiler} and {emulator} are not both on PATH")
    extension, _ = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    program = tmp_path_factory.mktemp(request.param) / "repack_main"
    sources = [*(ROOT / name for name in extension["sources"]), ROOT / "tests" / "support" / "repack_main.c"]
    flags = [*extension["extra-compile-args"], "-static", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, "-o", program, *sources], check=True)
    return [emulator, str(program)]


@pytest.mark.parametrize("emulated", ["aarch64"], indirect=True)
@pytest.mark.parametrize("path", ["portable", "neon"])
def test_arm_packs_the_same(path: str, emulated: list[str]) -> None:
    def run(name: str, blocks: Bytes, size: int, sizes: list[int]) -> bytes:
        command = [*emulated, name, str(repack.PATHS[path]), str(size), *map(str, sizes)]
        return subprocess.run(command, input=blocks.tobytes(), capture_output=True, check=True).stdout

    assert subprocess.run(emulated, capture_output=True, check=True).stdout == b"%d\n" % repack.PATHS["neon"]
    for row in ROWS:
        blocks = all_blocks(row.ggml)
        found = run(row.name, blocks, block_bytes(row), list(array_bytes(row).values()))
        assert found == b"".join(defined(blocks, row).values()), row.name
    for ggml in NATIVE:
        blocks = all_blocks(ggml)
        expected = planes.round_to_bf16(ggml_blocks.dequantised(blocks, ggml)).tobytes()
        assert run(ggml, blocks, blocks.shape[1], [512]) == expected, ggml


@pytest.mark.parametrize("emulated", ["x86_64"], indirect=True)
@pytest.mark.parametrize(("processor", "path"), [("Nehalem", "portable"), ("Haswell", "avx2")])
def test_a_path_is_chosen_by_the_processor(processor: str, path: str, emulated: list[str]) -> None:
    emulator, program = emulated
    found = subprocess.run([emulator, "-cpu", processor, program], capture_output=True, check=True).stdout
    assert found == b"%d\n" % repack.PATHS[path]


def test_wrong_buffers_are_refused() -> None:
    row, blocks = Q6_K_ROWS[0], ggml_blocks.random_blocks("Q6_K", 2)
    good = {role: np.empty(2 * each, dtype=np.uint8) for role, each in array_bytes(row).items()}
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
            to_planes(blocks, wrong, row)
    with pytest.raises(ValueError, match="contiguous writable arrays"):
        to_planes(blocks.reshape(-1)[:-1], good, row)


def test_nothing_is_packed_into_nothing() -> None:
    to_planes(b"", {role: bytearray() for role in Q6_K_ROWS[0].roles}, Q6_K_ROWS[0])
    assert first_nonfinite(b"", 210, STEPS["Q6_K"]) is None


def test_a_weight_type_that_the_repacker_lacks_is_named() -> None:
    row = WeightType("q7_k", "Q8_0", 32, 8, row_of("Q8_0", "bf16").scales)
    with pytest.raises(ValueError, match="does not know the weight type q7_k"):
        repacked(ggml_blocks.random_blocks("Q8_0", 1), row)


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
        repacked(ggml_blocks.random_blocks("Q6_K", 1), Q6_K_ROWS[0], "future")


# Types that become bf16


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("data", [*DATA, "not-finite"])
@pytest.mark.parametrize("ggml", NATIVE)
def test_dequantised_weights_are_ggmls_rounded(ggml: str, data: str, path: str) -> None:
    blocks = np.full((3, ggml_blocks.SIZES[ggml][1]), 0xFF, np.uint8)
    if data == "not-finite":
        blocks[1:, -2:] = [0x00, 0x7C]  # infinite, with codes of 0 in the last
        blocks[2, :-2] = 0
    else:
        blocks = blocks_of(ggml)[data]
    expected = planes.round_to_bf16(ggml_blocks.dequantised(blocks, ggml)).tobytes()
    weights = bytearray(len(expected))
    dequantize(blocks.reshape(-1), weights, ggml, path)
    assert weights == expected


def test_what_is_not_dequantised_natively_is_said() -> None:
    assert [ggml for ggml in ggml_blocks.SIZES if dequantizes_natively(ggml)] == list(NATIVE)
    with pytest.raises(ValueError, match="does not dequantise IQ2_S"):
        dequantize(bytes(82), bytearray(512), "IQ2_S")
    for blocks, weights in ((bytes(84), bytearray(511)), (bytes(85), bytearray(512)), (bytes(84), bytes(512))):
        with pytest.raises(ValueError, match="84|85"):
            dequantize(blocks, weights, "Q2_K")


# Scales that are not finite


def words(ggml: str, finite: bool) -> dict[str, list[bytes]]:
    """Values of each number of a block, by name, in the bytes where it lies; IQ1_M is another matter."""
    half = [0x0000, 0x8000, 0x03FF, 0x7BFF, 0xFBFF] if finite else list(ggml_blocks.NOT_FINITE.values())
    single = [0x00000000, 0x7F7FFFFF, 0xFF7FFFFF] if finite else [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001]
    found = {name: [bits.to_bytes(2, "little") for bits in half] for name in ggml_blocks.HALVES.get(ggml, {})}
    if ggml == "Q8_K":
        return {"d": [bits.to_bytes(4, "little") for bits in single]}
    if ggml == "MXFP4":
        return {"e": [b"\x00", b"\x7f", b"\xfe"] if finite else [b"\xff"]}
    if ggml == "NVFP4":
        return {f"d[{i}]": [b"\x00", b"\x7e"] if finite else [b"\x7f"] for i in range(4)}
    return found


def with_number(blocks: Bytes, ggml: str, block: int, name: str, value: bytes) -> None:
    places = {**ggml_blocks.HALVES.get(ggml, {}), "e": 0, **{f"d[{i}]": i for i in range(4)}}
    at = 0 if ggml == "Q8_K" else places[name]
    blocks[block, at : at + len(value)] = np.frombuffer(value, dtype=np.uint8)


@pytest.mark.parametrize("ggml", sorted(set(ggml_blocks.SIZES) - {"IQ1_M"}))
def test_the_first_number_that_is_not_finite_is_found(ggml: str) -> None:
    size = ggml_blocks.SIZES[ggml][1]
    good = ggml_blocks.random_blocks(ggml, 9)
    for name, values in words(ggml, finite=True).items():
        for value in values:
            with_number(good, ggml, 4, name, value)
            assert first_nonfinite(good, size, STEPS[ggml]) is None, (name, value)
    assert list(words(ggml, finite=False)) == [number.name for number in STEPS[ggml]]
    for name, values in words(ggml, finite=False).items():
        for value in values:
            bad = good.copy()
            with_number(bad, ggml, 8, next(iter(words(ggml, finite=False))), value)
            with_number(bad, ggml, 5, name, value)
            found = first_nonfinite(bad.tobytes(), size, STEPS[ggml])
            assert found is not None
            assert (found[0], found[1].name) == (5, name), value
            if ggml not in ("Q8_1", "Q8_K", "Q1_0", "MXFP4", "NVFP4"):  # ggml's own opinion, where it has one
                assert not np.isfinite(ggml_blocks.dequantised(bad, ggml)[5]).any()


def test_the_scattered_number_of_iq1_m_is_found() -> None:
    blocks = ggml_blocks.random_blocks("IQ1_M", 1)
    for bits in range(1 << 16):
        ggml_blocks.put_iq1_m(blocks, np.array([bits], dtype=np.uint16))
        found = first_nonfinite(blocks, 56, STEPS["IQ1_M"]) is None
        assert found == bool(np.isfinite(np.uint16(bits).view(np.float16))), bits
    assert np.isnan(ggml_blocks.dequantised(blocks, "IQ1_M")).all()


def test_every_type_with_blocks_is_searched() -> None:
    assert set(STEPS) == set(ggml_blocks.ALL_SIZES)


def test_of_one_block_the_first_number_is_named() -> None:
    blocks = ggml_blocks.random_blocks("Q4_K", 3)
    blocks[1, :4] = 0xFF
    assert first_nonfinite(blocks, 144, STEPS["Q4_K"]) == (1, ScaleNumber("d", 0))


def test_half_a_block_is_not_searched() -> None:
    with pytest.raises(ValueError, match="whole blocks of 144 bytes, found 145"):
        first_nonfinite(bytes(145), 144, STEPS["Q4_K"])
