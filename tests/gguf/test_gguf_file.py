"""The reader of one GGUF file: good files against the gguf package."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_builder import F32, TYPE_CODES, Builder, Tensor, key_value, q6k_blocks, small_model, string, weight
from q6k_kernels.errors import GgufRejectedError
from q6k_kernels.gguf.file import GGUFFile, ValueType

HEADER = 24
"""Where the first key-value pair lies, or the first tensor record if there are no pairs."""
KEY_LIMIT = 256
"""Bytes that a key may have."""


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
