"""metadata.gguf, read lazily and with every number bounded."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from q6k_kernels.bundle import metadata as rooms
from q6k_kernels.bundle.manifest import BundleError
from q6k_kernels.bundle.metadata import Metadata, read_metadata
from q6k_kernels.errors import GgufReadError
from q6k_kernels.gguf import file as files

HEADER = struct.Struct("<4sIQQ")


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def array(element: int, count: int, raw: bytes) -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, element, count) + raw


Reader = Callable[[bytes], Metadata]


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    """Reads metadata from the bytes of a file."""

    def reader(data: bytes) -> Metadata:
        path = tmp_path / "m.gguf"
        path.write_bytes(data)
        return read_metadata(path)

    return reader


def of(*pairs: bytes) -> bytes:
    return HEADER.pack(b"GGUF", 3, 0, len(pairs)) + b"".join(pairs)


def test_what_gguf_writes_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metadata.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("whole", 7)
    writer.add_int8("negative", -3)
    writer.add_uint64("wide", 1 << 63)
    writer.add_float32("real", 0.5)
    writer.add_float64("precise", 0.1)
    writer.add_bool("no", False)
    writer.add_string("text", "Grüße\n")
    writer.add_array("texts", ["a", "", "世界"])
    writer.add_array("reals", [0.5, -1.0])
    writer.add_array("flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = read_metadata(tmp_path)
    assert found.architecture == "llama"
    assert found.keys[1:4] == ("whole", "negative", "wide")
    assert [found.integer(key) for key in ("whole", "negative", "wide")] == [7, -3, 1 << 63]
    assert [found.real(key) for key in ("real", "precise", "whole")] == [0.5, 0.1, 7.0]
    assert found.flag("no") is False
    assert found.string("text") == "Grüße\n"
    assert found.strings("texts") == ["a", "", "世界"]
    assert found.value("reals") == [0.5, -1.0]
    assert found.value("flags") == [True, False]
    assert found.value("no") is False
    monkeypatch.setattr(rooms, "MAX_LIST", 1)
    with pytest.raises(BundleError, match="reals: an array of 2 FLOAT32, more than the limit of 1"):
        found.value("reals")
    assert "text" in found
    assert "absent" not in found
    assert (found.string("absent"), found.integer("absent"), found.strings("absent")) == (None, None, None)
    assert read_metadata(path).keys == found.keys


def test_a_value_of_another_type_is_named_with_what_was_expected(read: Reader) -> None:
    found = read(of(text(b"a") + struct.pack("<I", 8) + text(b"7")))
    with pytest.raises(BundleError, match=r"m\.gguf: a: expected a whole number, found STRING"):
        found.integer("a")
    with pytest.raises(BundleError, match="expected an array of strings, found STRING"):
        found.strings("a")
    numbers = read(of(array(5, 2, struct.pack("<2i", 1, 2))))
    assert (numbers.integers("a"), numbers.reals("a")) == ([1, 2], [1.0, 2.0])
    with pytest.raises(BundleError, match="expected a string, found an array of 2 INT32"):
        numbers.string("a")
    with pytest.raises(BundleError, match="expected a whole number, found an array of 2 INT32"):
        numbers.integer("a")
    with pytest.raises(BundleError, match="expected an array of whole numbers, found an array of 1 FLOAT32"):
        read(of(array(6, 1, bytes(4)))).integers("a")
    with pytest.raises(BundleError, match="expected an array of whole numbers, found an array of 1 BOOL"):
        read(of(array(7, 1, bytes(1)))).integers("a")
    with pytest.raises(BundleError, match="expected a whole number, found FLOAT32"):
        read(of(text(b"a") + struct.pack("<If", 6, 1.0))).integer("a")
    with pytest.raises(BundleError, match="expected a whole number, found BOOL"):
        read(of(text(b"a") + struct.pack("<IB", 7, 1))).integer("a")


ONE = HEADER.pack(b"GGUF", 3, 0, 1)
TENSOR = text(b"t") + struct.pack("<IQIQ", 1, 8, 0, 0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"GGUF" + bytes(20), "version at byte 4: expected 2 or 3, found 0"),
        (HEADER.pack(b"GGUF", 3, 1, 0) + TENSOR + bytes(64), "expected no tensors, found 1"),
        (HEADER.pack(b"GGUF", 3, 0, 1 << 60), "more than a file of 24 bytes can hold"),
        (ONE, "more than a file of 24 bytes can hold"),
        (ONE + struct.pack("<Q", 1 << 62) + bytes(16), f"string of {1 << 62} bytes, but the file ends after 16"),
        (ONE + text(b"abcd") + b"\x04\0", "4 bytes expected, but the file ends after 2"),
        (ONE + text(b"a") + struct.pack("<IQ", 99, 0), "unknown value type 99"),
        (ONE + array(9, 1, b""), "nested arrays are not supported"),
        (ONE + array(4, 1 << 62, bytes(8)), "but only 8 bytes are left"),
        (ONE + array(8, 1 << 61, bytes(8)), "but only 8 bytes are left"),
        (ONE + array(8, 1, struct.pack("<Q", 9)), "string reaches byte"),
        (HEADER.pack(b"GGUF", 3, 0, 2) + 2 * (text(b"a") + struct.pack("<IB", 7, 1)), "appears twice"),
    ],
)
def test_a_broken_file_is_refused(read: Reader, data: bytes, words: str) -> None:
    with pytest.raises(BundleError, match=words) as caught:
        read(data)
    assert "m.gguf: " in str(caught.value)


def test_every_truncation_is_refused(read: Reader) -> None:
    data = of(array(8, 3, text(b"x") + text(b"yy") + text(b"")), text(b"b") + struct.pack("<II", 4, 1))
    assert read(data).strings("a") == ["x", "yy", ""]
    for end in range(len(data)):
        with pytest.raises(BundleError):
            read(data[:end])


def test_bounds_hold(read: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ARRAY_STRINGS", 2)
    with pytest.raises(BundleError, match="3 strings in arrays, more than the limit of 2"):
        read(of(array(8, 3, text(b"") * 3)))
    found = read(of(array(0, 3, b"abc")))
    assert found.integers("a") == [97, 98, 99]
    monkeypatch.setattr(rooms, "MAX_NUMBERS", 2)
    with pytest.raises(BundleError, match=r"m\.gguf: a: an array of 3 UINT8, more than the limit of 2"):
        found.integers("a")
    found = read(of(array(8, 2, text(b"xy") * 2)))
    assert found.strings("a") == ["xy", "xy"]
    monkeypatch.setattr(rooms, "MAX_BYTES", 19)
    with pytest.raises(BundleError, match="an array of 2 STRING of 20 bytes, more than the limit of 19"):
        found.strings("a")


def test_a_long_text_is_refused_when_it_is_asked_for(read: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(of(text(b"a") + struct.pack("<I", 8) + text(b"xyz"), text(b"b") + struct.pack("<IB", 0, 7)))
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 2)
    assert found.integer("b") == 7
    with pytest.raises(BundleError, match="value of 'a' at byte 37: string of 3 bytes, more than the limit of 2"):
        found.string("a")


def test_text_that_is_no_utf8_is_refused_when_it_is_asked_for(read: Reader) -> None:
    found = read(of(array(8, 3, text(b"x") + text(b"yy") + text(b"\xff"))))
    with pytest.raises(BundleError, match="value of 'a' at byte 76: invalid UTF-8"):
        found.strings("a")
    found = read(of(text(b"a") + struct.pack("<I", 8) + text(b"C:\\caf\xe9")))
    with pytest.raises(BundleError, match="value of 'a' at byte 51: invalid UTF-8"):
        found.string("a")


def test_a_file_that_changes_is_noticed_and_none_is_kept_open(read: Reader, tmp_path: Path) -> None:
    opened = len(list(Path("/proc/self/fd").iterdir()))
    found = read(of(array(8, 1, text(b"before"))))
    assert found.strings("a") == ["before"]
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    (tmp_path / "m.gguf").write_bytes(of(array(8, 1, text(b"another"))))
    with pytest.raises(GgufReadError, match="was modified while it was being read"):
        found.strings("a")
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metadata.gguf")
    with pytest.raises(GgufReadError, match=r"metadata\.gguf is not a regular file"):
        read_metadata(tmp_path)
    (tmp_path / "metadata.gguf").unlink()
    with pytest.raises(GgufReadError, match=r"metadata\.gguf: No such file or directory"):
        read_metadata(tmp_path)


def test_a_link_out_of_the_bundle_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "real.gguf").write_bytes(of())
    (tmp_path / "else.gguf").write_bytes(of())
    path = tmp_path / "bundle" / "metadata.gguf"
    path.symlink_to("real.gguf")
    assert read_metadata(tmp_path / "bundle").keys == ()
    (tmp_path / "elsewhere").symlink_to("bundle")
    assert read_metadata(tmp_path / "elsewhere").keys == ()
    path.unlink()
    for target in ("../else.gguf", "/dev/zero"):
        path.symlink_to(target)
        with pytest.raises(BundleError, match=r"metadata\.gguf is a link out of the directory, to /"):
            read_metadata(tmp_path / "bundle")
        path.unlink()
    path.symlink_to("metadata.gguf")
    with pytest.raises(GgufReadError, match=r"metadata\.gguf: Too many levels of symbolic links"):
        read_metadata(tmp_path / "bundle")
