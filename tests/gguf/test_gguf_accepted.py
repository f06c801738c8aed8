"""Unusual files that llama.cpp, or a program beside it, writes or reads: the reader takes them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from gguf_builder import F32, Q6_K, Builder, Tensor, header, key_value, record, string, tensors, weight
from q6k_kernels.errors import GgufRejectedError
from q6k_kernels.formats.ggml import GGMLType, UnknownType
from q6k_kernels.gguf.file import GGUFFile
from q6k_kernels.gguf.tensors import TensorRecord

Q2_0 = 42


def records(path: Path, content: bytes) -> dict[str, TensorRecord]:
    path.write_bytes(content)
    with GGUFFile(path) as file:
        return {record.name: record for record in file.tensors}


def test_q2_0_has_18_bytes_for_64_weights(tmp_path: Path) -> None:
    (found,) = records(tmp_path / "m.gguf", tensors(record("t", (128, 3), Q2_0))()).values()
    assert (found.type, found.shape, found.weights, found.nbytes) == (GGMLType.Q2_0, (3, 128), 384, 6 * 18)


@pytest.mark.parametrize("number", [4, 5, 31, 38, 43, 77, 255, 2**31, 2**32 - 1])
def test_a_tensor_of_an_unknown_type_reaches_to_the_next(tmp_path: Path, number: int) -> None:
    raw = (
        record("t", (7,), number, 64),
        record("u", offset=0),
        record("v", offset=160),
        record("w", (9,), number, 4096),
    )
    found = records(tmp_path / "m.gguf", tensors(*raw, data=8192)())
    assert list(found) == ["u", "t", "v", "w"]
    assert found["t"].type == UnknownType(number)
    assert found["t"].nbytes == 160 - 64
    assert found["t"].weights == 7
    assert found["w"].offset + found["w"].nbytes == (tmp_path / "m.gguf").stat().st_size


def test_data_before_a_tensor_of_an_unknown_type_must_not_reach_into_it(tmp_path: Path) -> None:
    with pytest.raises(GgufRejectedError, match="tensor 't'.* overlaps that of 'u'"):
        records(tmp_path / "m.gguf", tensors(record("u", (16,)), record("t", (7,), 77, 32))())
    with pytest.raises(GgufRejectedError, match="tensor 't'.* reach past the end of the file"):
        records(tmp_path / "m.gguf", tensors(record("t", (7,), 77, 4096 + 64))())


@pytest.mark.parametrize("dims", [(0,), (0, 0), (256, 0, 2), (0, 2**63 - 1), (0,) * 8])
@pytest.mark.parametrize("kind", [F32, Q6_K, 77])
def test_a_dimension_of_zero_is_an_empty_tensor(tmp_path: Path, dims: tuple[int, ...], kind: int) -> None:
    found = records(tmp_path / "m.gguf", tensors(record("t"), record("empty", dims, kind, 32))())
    assert (found["empty"].shape, found["empty"].weights, found["empty"].nbytes) == (dims[::-1], 0, 0)


def test_an_empty_tensor_may_come_after_a_file_without_padding(tmp_path: Path) -> None:
    content = header(2, 0) + record("t", (1,)) + record("empty", (0,), offset=32)
    found = records(tmp_path / "m.gguf", content + bytes(-len(content) % 32 + 4))
    assert [record.nbytes for record in found.values()] == [4, 0]
    with pytest.raises(GgufRejectedError, match="its data at byte .* overlaps that of 'u'"):
        records(tmp_path / "m.gguf", tensors(record("u", (64,)), record("empty", (0,), offset=32))())


@pytest.mark.parametrize("dims", [(2, 2, 1, 3, 4), (1, 2, 1, 2, 1, 2, 1, 2)])
def test_more_dimensions_than_ggml_has_are_read(tmp_path: Path, dims: tuple[int, ...]) -> None:
    (found,) = records(tmp_path / "m.gguf", tensors(record("patch_embedding", dims))()).values()
    assert found.shape == dims[::-1]


@pytest.mark.parametrize("name", ["n" * 64, "n" * 255, "é" * 127], ids=len)
def test_names_longer_than_ggmls_are_read(tmp_path: Path, name: str) -> None:
    assert list(records(tmp_path / "m.gguf", tensors(record(name))())) == [name]


def test_keys_and_text_that_are_no_utf8_are_read_where_they_are_wanted(tmp_path: Path) -> None:
    pairs = [
        key_value("quantize.imatrix.file", b"C:\\caf\xe9\\imatrix.dat"),
        key_value(b"caf\xe9", 7),
        key_value("k" * 60_000, "long"),
        key_value("tokens", [b"a", b"\xff", b"b"]),
    ]
    path = Builder(kv=pairs).write(tmp_path / "m.gguf")
    with GGUFFile(path) as file:
        assert list(file.kv) == ["quantize.imatrix.file", "caf\udce9", "k" * 60_000, "tokens"]
        assert file.value("caf\udce9") == 7
        assert file.value("k" * 60_000) == "long"
        with pytest.raises(GgufRejectedError, match="value of 'quantize.imatrix.file' at byte .*: invalid UTF-8"):
            file.value("quantize.imatrix.file")
        assert file.value("quantize.imatrix.file", errors="backslashreplace") == r"C:\caf\xe9\imatrix.dat"
        with pytest.raises(GgufRejectedError, match="value of 'tokens' at byte .*: invalid UTF-8"):
            file.value("tokens")
        assert file.value("tokens", errors="backslashreplace") == ["a", r"\xff", "b"]


def test_a_string_of_a_gibibyte_is_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    last = key_value("last", 7)
    for length in (1 << 30, (1 << 30) + 1):
        with path.open("wb") as file:
            file.write(header(0, 2) + string("long") + struct.pack("<IQ", 8, length))
            file.seek(length, 1)  # a hole: nothing is stored
            file.write(last)
        if length > 1 << 30:
            with pytest.raises(
                GgufRejectedError, match=f"string of {length} bytes, more than the limit of {1 << 30}"
            ):
                GGUFFile(path)
            continue
        with GGUFFile(path) as opened:
            assert opened.value("last") == 7
            with pytest.raises(
                GgufRejectedError, match=f"string of {length} bytes, more than the limit of 16777216"
            ):
                opened.value("long")


@pytest.mark.parametrize("byte", [1, 2, 255])
def test_every_boolean_but_0_is_true(tmp_path: Path, byte: int) -> None:
    pairs = [string("b") + struct.pack("<IB", 7, byte), string("a") + struct.pack("<IIQ2B", 9, 7, 2, 0, byte)]
    with GGUFFile(Builder(kv=pairs).write(tmp_path / "m.gguf")) as file:
        assert (file.value("b"), file.value("a")) == (True, [False, True])


def test_an_array_is_read_some_elements_at_a_time(tmp_path: Path) -> None:
    pairs = [
        key_value("numbers", list(range(150_000)), "u32"),
        key_value("texts", [f"t{i}" for i in range(70_000)]),
    ]
    with GGUFFile(Builder(kv=pairs).write(tmp_path / "m.gguf")) as file:
        assert [len(some) for some in file.elements("numbers")] == [65_536, 65_536, 150_000 - 2 * 65_536]
        assert file.value("numbers") == list(range(150_000))
        assert [len(some) for some in file.elements("texts")] == [65_536, 70_000 - 65_536]
        assert file.value("texts") == [f"t{i}" for i in range(70_000)]


def test_the_architecture_must_be_a_short_text(tmp_path: Path) -> None:
    for content, words in (
        (["llama"] * 3, "expected type STRING, found ARRAY"),
        (b"\xff", "invalid UTF-8"),
        ("x" * 256, "256 characters, more than the limit of 255"),
    ):
        path = Builder(kv=[key_value("general.architecture", content)]).write(tmp_path / "m.gguf")
        with GGUFFile(path) as file, pytest.raises(GgufRejectedError, match=words):
            _ = file.architecture


def test_a_closed_file_is_opened_for_each_read(tmp_path: Path) -> None:
    tensor = weight("w", (2, 256))
    path = Builder(tensors=[tensor], kv=[key_value("k", 7)]).write(tmp_path / "m.gguf")
    before = len(list(Path("/proc/self/fd").iterdir()))
    file = GGUFFile(path)
    file.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert file.value("k") == 7
    assert bytes(file.read(file.tensors[0].offset, file.tensors[0].nbytes)) == tensor.data
    file.check_unchanged()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_scalar_of_an_unknown_type_has_a_weight(tmp_path: Path) -> None:
    path = Builder(tensors=[Tensor("t", (), 77, b"abc")]).write(tmp_path / "m.gguf")
    with GGUFFile(path) as file:
        assert (file.tensors[0].weights, file.tensors[0].nbytes) == (1, 32)
