"""The reader of one GGUF file: good files against the gguf package, hostile ones against their messages."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_builder import F32, Q6_K, TYPE_CODES, Builder, Tensor, key_value, q6k_blocks, small_model, string, weight
from q6k_convert.errors import ExitCode
from q6k_kernels.errors import GgufReadError, GgufRejectedError
from q6k_kernels.gguf.file import GGUFFile, ValueType

HEADER = 24
"""Where the first key-value pair lies, or the first tensor record if there are no pairs."""
KEY_LIMIT = 256
"""Bytes that a key may have."""
TOP = 2**64


# Good files


def assert_agrees_with_gguf_package(path: Path) -> None:
    """Everything that the reader says about a file is what gguf.GGUFReader says."""
    oracle = gguf.GGUFReader(path)
    fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    with GGUFFile(path) as file:
        assert file.version == oracle.fields["GGUF.version"].contents()
        assert file.alignment == oracle.alignment
        assert list(file.kv) == list(fields)
        for name, field in fields.items():
            value = file.value(name)
            assert value == field.contents(), name
            assert type(value) is type(field.contents()), name
            assert file.kv[name].type.name == field.types[0].name
            assert file.kv[name].start == field.offset
        expected = sorted(oracle.tensors, key=lambda tensor: tensor.data_offset)
        assert [
            (r.name, r.type, list(reversed(r.shape)), r.weights, r.nbytes, r.offset, r.record_at)
            for r in file.tensors
        ] == [
            (t.name, t.tensor_type, t.shape.tolist(), t.n_elements, t.n_bytes, t.data_offset, t.field.offset)
            for t in expected
        ]
        for record, tensor in zip(file.tensors, expected, strict=True):
            assert file.read(record.offset, record.nbytes) == tensor.data.tobytes()


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_agree_with_the_gguf_package(tmp_path: Path, version: int) -> None:
    model = small_model()
    model.version = version
    path = model.write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        assert file.version == version
        assert len(file.tensors) == 7
    assert_agrees_with_gguf_package(path)


@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096, 1 << 20])
def test_every_alignment_agrees_with_the_gguf_package(tmp_path: Path, alignment: int) -> None:
    model = small_model()
    model.alignment = alignment
    model.kv.append(key_value("general.alignment", alignment))
    path = model.write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        assert file.alignment == alignment
        assert all(record.offset % alignment == 0 for record in file.tensors)
        assert bytes(file.read(file.tensors[0].offset, 2 * 5 * 210)) == model.tensors[0].data
    assert_agrees_with_gguf_package(path)


SCALARS: dict[str, list[Any]] = {
    "u8": [0, 255], "i8": [-128, 127], "u16": [0, 65535], "i16": [-32768, 32767], "u32": [0, 2**32 - 1],
    "i32": [-(2**31), 2**31 - 1], "f32": [0.0, -1.5, float("inf")], "bool": [True, False],
    "u64": [0, 2**64 - 1], "i64": [-(2**63), 2**63 - 1], "f64": [0.1, -1e300],
}  # fmt: skip


def test_the_table_of_scalars_has_every_type() -> None:
    assert set(SCALARS) == set(TYPE_CODES)
    assert {code for code, _ in TYPE_CODES.values()} | {8, 9} == {int(kind) for kind in ValueType}


@pytest.mark.parametrize("kind", SCALARS)
def test_scalars_and_arrays_of_every_type_are_read_exactly(tmp_path: Path, kind: str) -> None:
    values = SCALARS[kind]
    pairs = [key_value(f"test.{i}", value, kind) for i, value in enumerate(values)]
    pairs += [key_value("test.array", values, kind), key_value("test.empty", [], kind), key_value("end", 7)]
    path = Builder(kv=pairs).write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        for i, value in enumerate(values):
            assert file.value(f"test.{i}") == value
            assert type(file.value(f"test.{i}")) is type(value)
            assert (file.kv[f"test.{i}"].element, file.kv[f"test.{i}"].count) == (None, 1)
        assert file.value("test.array") == values
        assert {type(value) for value in file.value("test.array")} == {type(values[0])}
        assert file.value("test.empty") == []
        array = file.kv["test.array"]
        assert (array.type, array.element, array.count) == (ValueType.ARRAY, TYPE_CODES[kind][0], len(values))
        assert file.value("end") == 7
    assert_agrees_with_gguf_package(path)


def test_strings_and_arrays_of_strings_are_read_exactly(tmp_path: Path) -> None:
    tokens = ["", "a", "é", "▁the", "🙂" * 100, "\x00\n", ""]
    pairs = [
        key_value("test.text", "naïve 🙂\n"),
        key_value("test.empty", ""),
        key_value("test.tokens", tokens),
        string("test.none") + struct.pack("<IIQ", 9, 8, 0),
        key_value("k" * KEY_LIMIT, 1),
    ]
    path = Builder(kv=pairs).write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        assert file.value("test.text") == "naïve 🙂\n"
        assert file.value("test.empty") == ""
        assert file.value("test.tokens") == tokens
        assert file.value("test.none") == []
        assert file.value("k" * KEY_LIMIT) == 1
    assert_agrees_with_gguf_package(path)


def test_an_absent_key_gives_the_default(tmp_path: Path) -> None:
    with GGUFFile(small_model().write(tmp_path / "model.gguf")) as file:
        assert file.value("absent") is None
        assert file.value("absent", 5) == 5


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([100] * 9000, id="many-windows"),
        pytest.param([1, (1 << 18) - 17, 3, 1 << 18, 5, (1 << 18) + 1, 0, 7], id="as-long-as-a-window"),
        pytest.param([(1 << 18) - 8 - 69 - 16 - n for n in range(9)], id="a-length-across-a-window-end"),
        pytest.param([1 << 20, 2, 3 << 20, 4], id="far-longer-than-a-window"),
    ],
)
def test_arrays_of_strings_longer_than_the_window_are_stepped_over_exactly(
    tmp_path: Path, lengths: list[int]
) -> None:
    tokens = [chr(97 + index % 26) * length for index, length in enumerate(lengths)]
    pairs = [key_value("tokens", tokens), key_value("after", "here")]
    path = Builder(kv=pairs).write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        assert file.value("after") == "here"
        assert file.kv["after"].start == HEADER + len(pairs[0])
        assert file.value("tokens") == tokens


def test_arrays_are_not_decoded_before_somebody_asks(tmp_path: Path) -> None:
    pairs = [key_value("tokens", [b"good", b"bad\xff", b"x"]), key_value("after", 3)]
    path = Builder(kv=pairs, tensors=[weight("w", (1, 256))]).write(tmp_path / "model.gguf")
    at = path.read_bytes().index(b"\xff")
    with GGUFFile(path) as file:
        assert file.value("after") == 3
        assert file.kv["tokens"].count == 3
        with pytest.raises(GgufRejectedError) as caught:
            file.value("tokens")
    assert caught.value.cause == f"{path}: value of 'tokens' at byte {at}: invalid UTF-8 (invalid start byte)"


def test_opening_does_not_read_past_long_strings_of_an_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = key_value("tokens", ["x" * (8 << 20)] * 4)
    path = Builder(kv=[tokens, key_value("after", 3)]).write(tmp_path / "model.gguf")
    read = 0
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = preadv(fd, buffers, offset)
        read += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    with GGUFFile(path) as file:
        assert file.value("after") == 3
    assert 0 < read < 2 << 20


def test_a_file_without_padding_at_its_end_opens(tmp_path: Path) -> None:
    model = Builder(tensors=[weight("w", (3, 256))], pad_end=False)
    path = model.write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        assert file.tensors[0].offset + file.tensors[0].nbytes == file.size
        assert file.size % 32
        assert bytes(file.read(file.tensors[0].offset, 630)) == model.tensors[0].data
    assert_agrees_with_gguf_package(path)


def test_a_file_without_tensors_opens(tmp_path: Path) -> None:
    path = Builder().write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        assert file.tensors == []
        assert file.value("general.architecture") == "llama"
        assert file.kv_range == (HEADER, path.stat().st_size)


def test_a_file_of_a_header_alone_opens(tmp_path: Path) -> None:
    path = Builder(kv=[]).write(tmp_path / "model.gguf")
    assert path.stat().st_size == HEADER
    with GGUFFile(path) as file:
        assert (file.tensors, file.kv, file.kv_range, file.alignment) == ([], {}, (HEADER, HEADER), 32)


def test_a_scalar_tensor_has_no_dimensions_and_one_weight(tmp_path: Path) -> None:
    path = Builder(tensors=[Tensor("scalar", (), F32, struct.pack("<f", 2.5))]).write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        (record,) = file.tensors
        assert (record.shape, record.weights, record.nbytes) == ((), 1, 4)
        assert bytes(file.read(record.offset, 4)) == struct.pack("<f", 2.5)


def test_tensors_come_in_the_order_of_their_data_and_may_leave_gaps(tmp_path: Path) -> None:
    tensors = [
        Tensor("third", (8,), F32, b"c" * 32, offset=1024),
        Tensor("first", (8,), F32, b"a" * 32, offset=64),
        Tensor("second", (8,), F32, b"b" * 32, offset=96),
    ]
    path = Builder(tensors=tensors).write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        assert [r.name for r in file.tensors] == ["first", "second", "third"]
        assert [bytes(file.read(r.offset, 32)) for r in file.tensors] == [b"a" * 32, b"b" * 32, b"c" * 32]
    assert_agrees_with_gguf_package(path)


@pytest.mark.parametrize(
    "name", ["n" * 63, "é" * 31, "a b", "__metadata", "../x", "\u00a0", "[bold]", "x\u2028"], ids=repr
)
def test_unusual_names_are_kept_as_they_are(tmp_path: Path, name: str) -> None:
    path = Builder(tensors=[weight(name, (1, 256))]).write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        assert [r.name for r in file.tensors] == [name]


@pytest.mark.parametrize("kind", list(gguf.GGML_QUANT_SIZES), ids=lambda kind: kind.name)
def test_tensors_of_every_type_have_the_size_that_the_gguf_package_gives(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (2, 3, 2 * block_weights)
    tensor = Tensor("t", shape, int(kind), bytes(range(100, 112)) * block_bytes)
    path = Builder(tensors=[tensor]).write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        (record,) = file.tensors
        assert (record.type, record.shape, record.weights) == (kind, shape, 12 * block_weights)
        assert bytes(file.read(record.offset, record.nbytes)) == tensor.data
    assert_agrees_with_gguf_package(path)


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_files_by_the_gguf_package_writer_agree_with_its_reader(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "model.gguf"
    written_by_gguf_package(path, alignment)
    with GGUFFile(path) as file:
        assert file.value("general.architecture") == "llama"
        assert file.value("test.tokens") == ["a", "é", ""]
        assert file.alignment == (alignment or 32)
        assert {r.name: r.shape for r in file.tensors} == {"w": (4, 512), "norm": (7,), "half": (2, 3, 5)}
    assert_agrees_with_gguf_package(path)


def written_by_gguf_package(path: Path, alignment: int | None = None) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("test.u8", 200)
    writer.add_int8("test.i8", -3)
    writer.add_uint16("test.u16", 60000)
    writer.add_int16("test.i16", -30000)
    writer.add_uint32("test.u32", 2**32 - 1)
    writer.add_int32("test.i32", -5)
    writer.add_uint64("test.u64", 2**63)
    writer.add_int64("test.i64", -(2**40))
    writer.add_float32("test.f32", 0.5)
    writer.add_float64("test.f64", 0.1)
    writer.add_bool("test.bool", True)
    writer.add_string("test.text", "naïve")
    writer.add_array("test.tokens", ["a", "é", ""])
    writer.add_array("test.scores", [0.25, -1.0])
    writer.add_array("test.flags", [True, False])
    writer.add_array("test.numbers", [1, -2, 3])
    blocks = np.frombuffer(q6k_blocks(8), np.uint8).reshape(4, 420)
    writer.add_tensor("w", blocks, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.add_tensor("norm", np.arange(7, dtype=np.float32))
    writer.add_tensor("half", np.arange(30, dtype=np.float16).reshape(2, 3, 5))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Hostile and broken files


@dataclass(frozen=True)
class Bad:
    """A file to be rejected: its bytes, and what the message says is wrong, where and how."""

    id: str
    content: Callable[[], bytes]
    item: str
    offset: int | None
    problem: str


def header(tensors: int, pairs: int, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def pairs(*raw: bytes) -> Callable[[], bytes]:
    """A file of these key-value pairs, zeros after them, so that only what is wrong in them is wrong."""
    return lambda: header(0, len(raw)) + b"".join(raw) + bytes(64)


def tensors(*raw: bytes, data: int = 4096) -> Callable[[], bytes]:
    """A file of these tensor records without key-value pairs, and zeros as data."""
    return lambda: header(len(raw), 0) + b"".join(raw) + bytes(data)


def record(name: str | bytes, dims: tuple[int, ...] = (8,), kind: int = F32, offset: int = 0) -> bytes:
    """A tensor record; `dims` as in the file, fastest first."""
    return Tensor(name, dims[::-1], kind, b"").record(offset)


def value_at(key: str | bytes, before: int = HEADER) -> int:
    """Where the value of a pair begins that begins at `before`."""
    return before + len(string(key)) + 4


ALIGNMENT = "general.alignment"
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
MODEL = small_model().build()

HEADERS = [
    Bad("empty", lambda: b"", "header", 0, "the file is empty"),
    Bad("one-byte", lambda: b"G", "magic", 0, "expected 'GGUF', found 'G'"),
    Bad("magic-alone", lambda: b"GGUF", "header", 0, "24 bytes expected, but the file has 4"),
    Bad("23-bytes", lambda: header(0, 0)[:23], "header", 0, "24 bytes expected, but the file has 23"),
    Bad("magic", lambda: b"\x7fELF" + MODEL[4:], "magic", 0, r"expected 'GGUF', found '\x7fELF'"),
    Bad("magic-in-lower-case", lambda: b"gguf" + MODEL[4:], "magic", 0, "expected 'GGUF', found 'gguf'"),
    Bad("magic-reversed", lambda: b"FUGG" + MODEL[4:], "magic", 0, "expected 'GGUF', found a big-endian GGUF"),
    Bad("lfs-pointer", lambda: LFS_POINTER, "magic", 0, "a Git LFS pointer, not the file itself: fetch it with"),
    Bad("ggml", lambda: b"lmgg" + MODEL[4:], "magic", 0, "found a GGML file from before GGUF"),
    Bad("zip", lambda: b"PK\x03\x04" + MODEL[4:], "magic", 0, "found a zip archive"),
    Bad("web-page", lambda: b"<!DOCTYPE html>" + bytes(64), "magic", 0, "found a web page"),
    Bad("version-0", lambda: header(0, 0, 0), "version", 4, "expected 2 or 3, found 0"),
    Bad("version-1", lambda: header(0, 0, 1), "version", 4, "expected 2 or 3, found 1"),
    Bad("version-4", lambda: header(0, 0, 4), "version", 4, "expected 2 or 3, found 4"),
    Bad("version-max", lambda: header(0, 0, 2**32 - 1), "version", 4, "expected 2 or 3, found 4294967295"),
    Bad("big-endian-3", lambda: header(0, 0, 3 << 24), "version", 4, "big-endian GGUF (version 3 in big-endian)"),
    Bad("big-endian-2", lambda: header(0, 0, 2 << 24), "version", 4, "big-endian GGUF (version 2 in big-endian)"),
    *(
        Bad(
            f"{name}-count-{count}",
            partial(bytes, header(*counts) + bytes(50)),
            f"{item} count",
            at,
            f"{count}, more than a file of 74 bytes can hold",
        )
        for name, item, at, smallest in (("tensor", "tensor", 8, 25), ("kv", "key-value", 16, 14))
        for count in (50 // smallest + 1, 1000, 2**31, 2**63, TOP - 1)
        for counts in [(count, 0) if at == 8 else (0, count)]
    ),
    Bad("tensors-over-limit", lambda: header(16385, 0) + bytes(16385 * 25), "tensor count", 8, "limit of 16384"),
    Bad("kvs-over-limit", lambda: header(0, 32769) + bytes(32769 * 14), "key-value count", 16, "limit of 32768"),
]

FILLED = 40
"""Bytes after a length that lies."""


def lying(before: bytes, length: int) -> Callable[[], bytes]:
    """A file that ends FILLED bytes after a length."""
    return lambda: header(0, 1) + before + struct.pack("<Q", length) + b"x" * FILLED


def key_values() -> list[Bad]:
    """Every way for a key-value pair to be wrong."""
    twice = key_value("twice", 1)
    text = string("text") + struct.pack("<I", 8)
    cases = [
        Bad("duplicate-key", pairs(twice, twice), "key 'twice'", HEADER + len(twice),
            "appears twice, first at byte 24"),
        Bad("empty-key", pairs(key_value("", 1)), "key 0", HEADER, "the key is empty"),
        Bad(
            "over-long-key", pairs(key_value("k" * (KEY_LIMIT + 1), 1)), "key 0", HEADER,
            f"string of {KEY_LIMIT + 1} bytes, longer than the limit of {KEY_LIMIT}",
        ),
        Bad("key-not-utf8", pairs(key_value(b"ab\xff", 1)), "key 0", HEADER + 10,
            "invalid UTF-8 (invalid start byte)"),
        Bad(
            "key-surrogate", pairs(key_value(b"\xed\xa0\x80", 1)), "key 0", HEADER + 8,
            "invalid UTF-8 (invalid continuation byte)",
        ),
        Bad(
            "string-not-utf8", pairs(key_value("text", b"caf\xe9")), "value of 'text'", value_at("text") + 8 + 3,
            "invalid UTF-8 (unexpected end of data)",
        ),
        Bad(
            "string-over-limit", lambda: header(0, 1) + text + string(b"x" * ((16 << 20) + 1)), "value of 'text'",
            value_at("text"), "string of 16777217 bytes, longer than the limit of 16777216",
        ),
        Bad("bool-2", pairs(string("b") + struct.pack("<IB", 7, 2)), "value of 'b'", value_at("b"),
            "expected a boolean 0 or 1, found 2"),
        Bad("scalar-cut", lambda: header(0, 1) + key_value("number", 1, "u64")[:-1], "value of 'number'",
            value_at("number"), "8 bytes expected, but the file ends after 7"),
        Bad("second-key-missing", lambda: header(0, 2) + key_value("a" * 20, 1), "key 1",
            HEADER + len(key_value("a" * 20, 1)), "8 bytes expected, but the file ends after 0"),
        Bad("type-missing", lambda: header(0, 1) + string("only a key"), "value of 'only a key'",
            HEADER + 18, "4 bytes expected, but the file ends after 0"),
        Bad("nested-array", pairs(string("a") + struct.pack("<IIQIQ", 9, 9, 1, 4, 0)), "value of 'a'",
            value_at("a"), "nested arrays are not supported"),
        Bad("strings-over-limit", lambda: header(0, 1) + string("a") + struct.pack("<IIQ", 9, 8, (1 << 21) + 1)
            + bytes(8 * ((1 << 21) + 1)), "value of 'a'", value_at("a") + 12,
            "more than 2097152 strings in arrays"),
    ]  # fmt: skip
    for length in (FILLED + 1, 2**31, 2**32, 2**63, TOP - 8, TOP - 1):
        ends = f"string of {length} bytes, but the file ends after {FILLED}"
        cases.append(Bad(f"key-length-{length}", lying(b"", length), "key 0", HEADER, ends))
        cases.append(Bad(f"string-length-{length}", lying(text, length), "value of 'text'", value_at("text"), ends))
    for kind in (13, 255, 2**31, 2**32 - 1):
        unknown = f"unknown value type {kind} (0 to 12 are known)"
        bad_type = string("key") + struct.pack("<I", kind)
        bad_element = string("key") + struct.pack("<IIQ", 9, kind, 0)
        cases.append(Bad(f"value-type-{kind}", pairs(bad_type), "value of 'key'", HEADER + 11, unknown))
        cases.append(Bad(f"element-type-{kind}", pairs(bad_element), "value of 'key'", value_at("key"), unknown))
    for kind, size in ((0, 1), (6, 4), (7, 1), (8, 8), (12, 8)):
        # TOP // size + 1 becomes a few bytes if multiplied by the size in 64 bits.
        for count in sorted({FILLED // size + 1, 2**32, min(TOP // size + 1, TOP - 2), TOP - 1}):
            before = string("array") + struct.pack("<II", 9, kind)
            cases.append(
                Bad(f"array-of-type-{kind}-length-{count}", lying(before, count), "value of 'array'",
                    value_at("array") + 4, f"array of {count}, but only {FILLED} bytes are left in the file")
            )  # fmt: skip
    return cases


def array_strings() -> list[Bad]:
    """Strings of an array that reach past the end of the file: the first, one in the middle, the last."""
    before = string("tokens") + struct.pack("<IIQ", 9, 8, 3)
    first = HEADER + len(before)
    cases = []
    for bad in (0, 1, 2):
        for length in (60, 2**31, 2**62, 2**63 - 1, 2**63, TOP - 1):
            strings = [struct.pack("<Q", length) if i == bad else string("ab") for i in range(3)]
            content = header(0, 1) + before + b"".join(strings)
            begins = first + 10 * bad
            cases.append(
                Bad(f"element-{bad}-length-{length}", partial(bytes, content), f"value of 'tokens'[{bad}]", begins,
                    f"string reaches byte {begins + 8 + length}, past the end of the file")
            )  # fmt: skip
    cases.append(
        Bad("elements-end-early", lambda: header(0, 1) + before + string("a" * 8) + string("b" * 8),
            "value of 'tokens'[2]", first + 32, "8 bytes expected, but the file ends after 0")
    )  # fmt: skip
    return cases


def alignments() -> list[Bad]:
    """general.alignment that is no power of two, too large or of the wrong type."""
    cases = [
        Bad(f"alignment-{number}", pairs(key_value("first", 1), key_value(ALIGNMENT, number)), ALIGNMENT,
            value_at(ALIGNMENT, HEADER + len(key_value("first", 1))),
            f"expected a power of two up to 1073741824, found {number}")
        for number in (0, 3, 24, 2**31, 2**32 - 1)
    ]  # fmt: skip
    wrong: dict[str, Any] = {kind: 32 for kind in TYPE_CODES if kind not in ("u32", "f32", "f64", "bool")}
    wrong |= {"f32": 32.0, "f64": 32.0, "bool": True, "string": "32", "array": [32]}
    for name, content in wrong.items():
        kind = name if name in TYPE_CODES else None
        found = ValueType({"string": 8, "array": 9}[name] if kind is None else TYPE_CODES[name][0]).name
        cases.append(
            Bad(f"alignment-of-type-{name}", pairs(key_value(ALIGNMENT, content, kind)), ALIGNMENT, HEADER,
                f"expected type UINT32, found {found}")
        )  # fmt: skip
    return cases


REMOVED = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
DIMS_AT = HEADER + len(string("t")) + 4
"""Where the dimensions of a first tensor called `t` lie."""


def tensor_records() -> list[Bad]:
    """Every way for a tensor record to be wrong by itself."""
    item = "tensor 't'"
    cases = []
    for count in (5, 255, 2**32 - 1):
        raw = string("t") + struct.pack("<I", count) + bytes(64)
        cases.append(Bad(f"{count}-dims", tensors(raw), item, DIMS_AT - 4, f"{count} dimensions, more than 4"))
    for name, dims in {
        "zero-dim": (0,), "zero-dim-among-others": (256, 0, 2), "zero-dim-after-overflow": (2**63, 0),
        "product-2^64": (2**32, 2**32), "product-wraps-to-zero": (2**32, 2**32, 2**32, 2**32),
        "product-wraps-to-small": (2**63 + 1, 2**63 + 1), "dim-2^63": (2**63,), "dim-2^64-1": (TOP - 1,),
        "all-dims-max": (TOP - 1,) * 4,
    }.items():  # fmt: skip
        cases.append(
            Bad(name, tensors(record("t", dims)), item, DIMS_AT,
                f"dimensions {list(dims)} are zero or overflow 2^63 weights")
        )  # fmt: skip
    for name, dims, kind in (
        ("bytes-2^64", (2**62,), F32), ("bytes-2^63", (2**61,), F32), ("bytes-over-2^66", (2**31, 2**31), 28),
        ("bytes-of-blocks", (2**63 - 256,), 15),
    ):  # fmt: skip
        cases.append(
            Bad(
                name, tensors(record("t", dims, kind)), item, HEADER, f"dimensions {list(dims)} overflow 2^63 bytes"
            )
        )
    for kind in (42, 255, 2**31, 2**32 - 1):
        raw = record("t", (256,), kind)
        cases.append(Bad(f"type-{kind}", tensors(raw), item, DIMS_AT + 8, f"unknown tensor type {kind}"))
    for kind, called in REMOVED.items():
        said = f"type {kind} ({called}) was removed from ggml"
        cases.append(Bad(f"type-{called}", tensors(record("t", (256,), kind)), item, DIMS_AT + 8, said))
    for dims in ((128, 2), (1, 256), (255,), (257,), (384,), ()):
        said = f"Q6_K rows must be a multiple of 256 weights, found {dims[0] if dims else 1}"
        cases.append(Bad(f"q6k-dims-{dims}", tensors(record("t", dims, Q6_K)), item, HEADER, said))
    return cases


def tensor_names() -> list[Bad]:
    """Names that no tensor may have."""
    again = record("t")
    refused = {
        "empty": "", "newline": "a\nb", "nul": "a\0", "escape": "\x1b[31m", "delete": "\x7f", "c1": "a\x85b",
        "last-c1": "\x9f", "metadata": "__metadata__",
    }  # fmt: skip
    cases = [
        Bad(f"name-{name}", tensors(record(text)), "name of tensor 0", HEADER,
            f"{text!r} is empty, reserved or has control characters")
        for name, text in refused.items()
    ]  # fmt: skip
    return [
        *cases,
        Bad("name-twice", tensors(again, record("u", offset=32), again), "tensor 't'", HEADER + 2 * len(again),
            "appears twice, first at byte 24"),
        Bad("name-64-bytes", tensors(record("n" * 64)), "name of tensor 0", HEADER,
            "string of 64 bytes, longer than the limit of 63"),
        Bad("name-64-bytes-in-32-characters", tensors(record("é" * 32)), "name of tensor 0", HEADER,
            "string of 64 bytes, longer than the limit of 63"),
        Bad("name-not-utf8", tensors(record(b"a\xc3(")), "name of tensor 0", HEADER + 9,
            "invalid UTF-8 (invalid continuation byte)"),
        Bad("name-length-max", lambda: header(1, 0) + struct.pack("<Q", TOP - 1) + bytes(32), "name of tensor 0",
            HEADER, f"string of {TOP - 1} bytes, but the file ends after 32"),
        Bad("second-record-missing", lambda: header(2, 0) + record("n" * 33), "name of tensor 1",
            HEADER + len(record("n" * 33)), "8 bytes expected, but the file ends after 0"),
        Bad("record-cut", lambda: header(1, 0) + record("t")[:-1], "tensor 't'", HEADER + len(record("t")) - 20,
            "20 bytes expected, but the file ends after 19"),
    ]  # fmt: skip


def placements() -> list[Bad]:
    """Tensor data that is misaligned, outside the file or on top of other data."""
    one, data = len(record("t")), 96  # two such records end at byte 90; the data section begins at 96
    size = HEADER + 2 * one + 4096
    assert HEADER + 2 * one == 90
    cases = [
        Bad(f"offset-{offset}", tensors(record("t"), record("u", offset=offset)), "tensor 'u'", HEADER + one,
            f"offset {offset} is not a multiple of the alignment 32")
        for offset in (1, 16, 33, TOP - 1, TOP - 33)
    ]  # fmt: skip
    # TOP - 96 added to the start of the data in 64 bits would give byte 0, TOP - 64 would give byte 32.
    cases += [
        Bad(f"offset-{offset}", tensors(record("t"), record("u", offset=offset)), "tensor 'u'", HEADER + one,
            f"32 bytes of data at byte {data + offset} reach past the end of the file ({size})")
        for offset in (4096, 2**32, 2**63, TOP - 96, TOP - 64, TOP - 32)
    ]  # fmt: skip
    cases.append(
        Bad("data-one-byte-too-long", lambda: header(1, 0) + record("t") + bytes(64 - 57 + 31), "tensor 't'",
            HEADER, "32 bytes of data at byte 64 reach past the end of the file (95)")
    )  # fmt: skip
    for name, first, second, late in (
        ("identical", (16, 0), (16, 0), "u"), ("overlapping", (16, 0), (16, 32), "u"),
        ("overlapping-backwards", (16, 32), (16, 0), "t"), ("contained", (64, 0), (8, 64), "u"),
        ("same-start", (8, 0), (64, 0), "u"),
    ):  # fmt: skip
        raw = record("t", (first[0],), offset=first[1]), record("u", (second[0],), offset=second[1])
        here, other = (second, first) if late == "u" else (first, second)
        cases.append(
            Bad(name, tensors(*raw), f"tensor {late!r}", HEADER + (one if late == "u" else 0),
                f"its data at byte {data + here[1]} overlaps that of {'t' if late == 'u' else 'u'!r}, "
                f"which ends at byte {data + other[1] + 4 * other[0]}")
        )  # fmt: skip
    return cases


REJECTED = [
    *HEADERS, *key_values(), *array_strings(), *alignments(), *tensor_records(), *tensor_names(), *placements()
]  # fmt: skip


@pytest.mark.parametrize("bad", REJECTED, ids=lambda bad: bad.id)
def test_a_broken_file_is_rejected_with_file_item_place_and_problem(tmp_path: Path, bad: Bad) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(bad.content())
    with pytest.raises(GgufRejectedError) as caught:
        GGUFFile(path)
    where = "" if bad.offset is None else f" at byte {bad.offset}"
    message = caught.value.cause
    assert message.startswith(f"{path}: {bad.item}{where}: ")
    assert bad.problem in message
    assert (caught.value.item, caught.value.offset) == (bad.item, bad.offset)
    assert caught.value.remedy
    assert len(message) < 1000


def test_no_two_broken_files_share_an_id() -> None:
    assert len({bad.id for bad in REJECTED}) == len(REJECTED)


def test_a_rejected_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(header(0, 0, 4))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(GgufRejectedError):
            GGUFFile(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_files_that_broken_ones_are_made_of_are_good(tmp_path: Path) -> None:
    # Otherwise a broken file might be rejected for something else than what its case breaks.
    good: dict[str, Callable[[], bytes]] = {
        "pairs": pairs(key_value("twice", 1), key_value("other", [1, 2])),
        "tensors": tensors(record("t"), record("u", offset=32), record("v", (256, 2), Q6_K, 64)),
        "data to the last byte": lambda: header(1, 0) + record("t") + bytes(64 - 57 + 32),
        "the largest alignment": lambda: header(0, 1) + key_value(ALIGNMENT, 1 << 30),
        "no header alone": lambda: header(0, 0),
    }
    for name, content in good.items():
        path = tmp_path / name
        path.write_bytes(content())
        GGUFFile(path).close()


def test_a_small_model_cut_anywhere_before_its_last_data_byte_is_rejected(tmp_path: Path) -> None:
    model = small_model()
    path = model.write(tmp_path / "model.gguf")
    size = path.stat().st_size
    end = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(path).tensors)
    # The end padding is part of what may be missing; make sure that there is some.
    path.write_bytes(path.read_bytes() + bytes(5))
    for length in range(size + 5, -1, -1):
        os.truncate(path, length)
        if length >= end:
            GGUFFile(path).close()
            continue
        with pytest.raises(GgufRejectedError, match=re.escape(str(path))):
            GGUFFile(path)


# Files that change, and what is no file


def test_reading_from_a_file_that_shrank_says_so(tmp_path: Path) -> None:
    path = small_model().write(tmp_path / "model.gguf")
    size = path.stat().st_size
    with GGUFFile(path) as file:
        last = file.tensors[-1]
        os.truncate(path, last.offset + 3)
        with pytest.raises(GgufReadError) as caught:
            file.read_into(memoryview(bytearray(last.nbytes)), last.offset)
    assert caught.value.cause == f"{path}: ends at byte {last.offset + 3}, but had {size} bytes when it was opened"
    assert "rewriting" in caught.value.remedy


def test_a_file_that_shrinks_while_it_is_opened_is_an_io_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_model().write(tmp_path / "model.gguf")
    fstat = os.fstat

    def shrinking(fd: int) -> os.stat_result:
        found = fstat(fd)
        os.truncate(path, 100)
        return found

    monkeypatch.setattr(os, "fstat", shrinking)
    with pytest.raises(GgufReadError, match="ends at byte 100, but had"):
        GGUFFile(path)


def test_a_file_written_to_after_opening_is_noticed(tmp_path: Path) -> None:
    path = small_model().write(tmp_path / "model.gguf")
    size = path.stat().st_size
    with GGUFFile(path) as file:
        file.check_unchanged()
        with path.open("ab") as stream:
            stream.write(b"more")
        with pytest.raises(GgufReadError) as caught:
            file.check_unchanged()
    assert caught.value.cause == (
        f"{path} was modified while it was being read ({size} bytes before, {size + 4} now)"
    )


def test_a_file_rewritten_at_the_same_length_is_noticed(tmp_path: Path) -> None:
    path = small_model().write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        # Set outright: two writes within one tick of the clock would share a time.
        os.utime(path, ns=(file.stat.st_atime_ns, file.stat.st_mtime_ns + 1_000_000))
        with pytest.raises(GgufReadError, match="was modified while it was being read"):
            file.check_unchanged()


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(GgufReadError) as caught:
        GGUFFile(tmp_path)
    assert caught.value.cause == f"{tmp_path} is a directory"


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "fifo.gguf"
    os.mkfifo(path)
    with pytest.raises(GgufReadError) as caught:
        GGUFFile(path)
    assert caught.value.cause == f"{path} is not a regular file"


def test_a_missing_file_is_an_io_failure(tmp_path: Path) -> None:
    path = tmp_path / "absent.gguf"
    with pytest.raises(GgufReadError) as caught:
        GGUFFile(path)
    assert caught.value.cause == f"{path}: No such file or directory"


def test_a_dangling_symlink_is_an_io_failure(tmp_path: Path) -> None:
    path = tmp_path / "link.gguf"
    path.symlink_to("absent")
    with pytest.raises(GgufReadError, match=re.escape(f"{path}: No such file or directory")):
        GGUFFile(path)


def test_an_unreadable_file_is_an_io_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model().write(tmp_path / "model.gguf").chmod(0)
    # Found from here, so that only the file's own permissions stand in the way of another user.
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    path = Path("model.gguf")
    user = os.geteuid()
    try:
        if user == 0:  # root may read everything
            os.seteuid(65534)
        assert path.stat().st_size > 0
        with pytest.raises(GgufReadError) as caught:
            GGUFFile(path)
    finally:
        os.seteuid(user)
    assert caught.value.cause == "model.gguf: Permission denied"


# Large hostile files, through the command line

MEMORY_LIMIT = 200 << 20

# A process of its own, and a small one: a child's figure starts from that of the process that forked it.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
unit = 1 if sys.platform == "darwin" else 1024
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)
"""


def inspected(path: Path) -> tuple[int, int, str]:
    """Exit code, peak memory and standard error of `q6k-convert inspect`."""
    command = [sys.executable, "-m", "q6k_convert", "inspect", str(path)]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command], capture_output=True, text=True, check=True, timeout=60
    )
    code, peak = done.stdout.splitlines()[-1].split()
    return int(code), int(peak), done.stderr


def many_pairs() -> bytes:
    good = [key_value(f"key.{i:05}", i) for i in range(32_000 - 1)]
    return Builder(kv=[*good, key_value("key.00007", 1)]).build()


def many_long_keys() -> bytes:
    good = [key_value(f"{i:05}" + "k" * (KEY_LIMIT - 5), 1, "u8") for i in range(32_767)]
    return Builder(kv=[*good, key_value("", 1)]).build()


def many_long_wide_keys() -> bytes:
    # One character outside the BMP makes Python take four bytes for every character.
    good = [key_value(f"{i:05}" + "k" * (KEY_LIMIT - 9) + "🙂", 1, "u8") for i in range(32_767)]
    return Builder(kv=[*good, key_value("", 1)]).build()


def many_empty_strings() -> bytes:
    count = 2_000_000
    return header(0, 2) + string("tokens") + struct.pack("<IIQ", 9, 8, count) + bytes(8 * count) + b"\xff" * 64


def many_short_strings() -> bytes:
    count = 1 << 21
    strings = (struct.pack("<Q", 3) + b"abc") * count
    return header(0, 2) + string("tokens") + struct.pack("<IIQ", 9, 8, count) + strings + b"\xff" * 64


def many_tensors() -> bytes:
    good = [record(f"blk.{i}.weight", offset=32 * i) for i in range(16_000 - 1)]
    return tensors(*good, record("last", (8,), 4), data=16_000 * 32 + 64)()


def many_tensors_last_overlaps() -> bytes:
    good = [record(f"blk.{i}.weight", offset=32 * i) for i in range(16_000 - 1)]
    return tensors(*good, record("last", (9,), offset=32 * 15_999 - 32), data=16_000 * 32 + 64)()


def long_strings() -> bytes:
    longest = "k" * ((16 << 20) - 4) + "🙂"
    return header(0, 5) + b"".join(key_value(f"key.{i}", longest) for i in range(4)) + string("")


def long_numbers() -> bytes:
    array = struct.pack("<IIQ", 9, 0, 100_000_000) + bytes(100_000_000)
    return header(0, 2) + string("numbers") + array + string("")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (many_pairs, f"key 'key.00007' at byte {24 + 25 * 31_999}: appears twice, first at byte {24 + 25 * 7}"),
        (many_long_keys, "key 32767 at byte"),
        (many_long_wide_keys, "key 32767 at byte"),
        (many_empty_strings, "key 1 at byte 16000054: string of 18446744073709551615 bytes"),
        (many_short_strings, "key 1 at byte"),
        (many_tensors, "tensor 'last' at byte"),
        (many_tensors_last_overlaps, "tensor 'last' at byte"),
        (long_strings, "key 4 at byte"),
        (long_numbers, "key 1 at byte"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_large_hostile_file_costs_little_memory(
    tmp_path: Path, content: Callable[[], bytes], problem: str
) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content())
    code, peak, said = inspected(path)
    assert code == ExitCode.INPUT_REJECTED
    assert problem in said
    assert peak < MEMORY_LIMIT


@pytest.mark.parametrize("text", ["[/INST] [bold]x", "a\x1b[31mb", "a\x07b", "a\x9bb", "[", "\\[/x]"], ids=ascii)
@pytest.mark.parametrize("place", ["key", "value", "tensor"])
def test_inspect_shows_any_text_of_a_file_as_it_is_but_for_control_characters(
    tmp_path: Path, place: str, text: str
) -> None:
    model = Builder(tensors=[weight("w", (1, 256))], kv=[key_value("general.architecture", "llama")])
    if place == "tensor":
        # The reader itself refuses control characters here.
        text = "".join(c for c in text if c.isprintable())
        model.tensors = [weight(text, (1, 256))]
    else:
        model.kv.append(key_value(text, 1) if place == "key" else key_value("key", text))
    path = model.write(tmp_path / "model.gguf")
    command = [sys.executable, "-m", "q6k_convert", "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (ExitCode.DONE, "")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout)
    for printable in re.split("[\x00-\x1f\x7f-\x9f]", text):
        assert printable in done.stdout


@pytest.mark.parametrize("key", ["general.architecture", "split.count", "llama.attention.causal"])
@pytest.mark.parametrize("strings", [False, True], ids=["numbers", "strings"])
def test_a_huge_array_where_one_value_belongs_costs_little_memory(tmp_path: Path, key: str, strings: bool) -> None:
    count = 1 << 21
    array = (8, count, (struct.pack("<Q", 12) + b"abcdefghijkl") * count) if strings else (
        4, 20_000_000, b"\x80\x81\x82\x83" * 20_000_000
    )  # fmt: skip
    pair = string(key) + struct.pack("<IIQ", 9, *array[:2]) + array[2]
    architecture = [] if key == "general.architecture" else [key_value("general.architecture", "llama")]
    model = Builder(kv=[*architecture, pair], tensors=[weight("token_embd.weight", (1, 256))])
    code, peak, said = inspected(model.write(tmp_path / "hostile.gguf"))
    assert code in (ExitCode.DONE, ExitCode.INPUT_REJECTED)
    assert len(said) < 10_000
    assert peak < MEMORY_LIMIT
