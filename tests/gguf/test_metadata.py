"""metadata.gguf, read lazily and with every number bounded."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest

from q6k_kernels.bundle import metadata as rooms
from q6k_kernels.bundle.manifest import BundleError
from q6k_kernels.bundle.metadata import Metadata, read_metadata

HEADER = struct.Struct("<4sIQQ")


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def of(*pairs: bytes, count: int | None = None, version: int = 3, tensors: int = 0) -> Metadata:
    head = HEADER.pack(b"GGUF", version, tensors, len(pairs) if count is None else count)
    return Metadata(Path("m.gguf"), head + b"".join(pairs))


def array(element: int, count: int, raw: bytes) -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, element, count) + raw


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
    with pytest.raises(BundleError, match="key 'reals': an array of 2 f4, more than the limit of 1"):
        found.value("reals")
    assert "text" in found
    assert "absent" not in found
    assert (found.string("absent"), found.integer("absent"), found.strings("absent")) == (None, None, None)
    assert read_metadata(path).keys == found.keys


def test_a_value_of_another_type_is_named_with_what_was_expected() -> None:
    pair = text(b"a") + struct.pack("<I", 8) + text(b"7")
    with pytest.raises(BundleError, match=r"m\.gguf: key 'a': expected a whole number, found string"):
        of(pair).integer("a")
    with pytest.raises(BundleError, match="expected an array of strings, found string"):
        of(pair).strings("a")
    numbers = of(array(5, 2, struct.pack("<2i", 1, 2)))
    with pytest.raises(BundleError, match="expected a string, found an array of 2 i4"):
        numbers.string("a")
    with pytest.raises(BundleError, match="expected a whole number, found f4"):
        of(text(b"a") + struct.pack("<If", 6, 1.0)).integer("a")
    with pytest.raises(BundleError, match="expected a whole number, found bool"):
        of(text(b"a") + struct.pack("<IB", 7, 1)).integer("a")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "expected 24 bytes, found 0"),
        (b"GGUF" + bytes(20), "expected GGUF version 2 or 3"),
        (HEADER.pack(b"GGUF", 3, 1, 0), "expected no tensors, found 1"),
        (HEADER.pack(b"GGUF", 3, 0, 1 << 60), "more than the limit"),
        (HEADER.pack(b"GGUF", 3, 0, 1), "the file ends before its length does"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + struct.pack("<Q", 1 << 62) + b"a", "and the file has 33"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + text(b"\xff") + bytes(8), "not UTF-8"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + text(b"a") + b"\x04", "4 bytes expected"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + text(b"a") + struct.pack("<I", 99), "unknown value type 99"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + array(9, 1, b""), "an array of arrays"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + array(4, 1 << 62, bytes(8)), "but only 8 bytes are left"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + array(8, 1 << 61, bytes(8)), "but only 8 bytes are left"),
        (HEADER.pack(b"GGUF", 3, 0, 1) + array(8, 1, struct.pack("<Q", 9)), "string reaches byte"),
        (HEADER.pack(b"GGUF", 3, 0, 2) + 2 * (text(b"a") + struct.pack("<IB", 7, 1)), "appears twice"),
    ],
)
def test_a_broken_file_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        Metadata(Path("m.gguf"), data)


def test_every_truncation_is_refused_or_harmless() -> None:
    pairs = array(8, 3, text(b"x") + text(b"yy") + text(b"")) + text(b"b") + struct.pack("<II", 4, 1)
    data = HEADER.pack(b"GGUF", 3, 0, 2) + pairs
    assert Metadata(Path("m.gguf"), data).strings("a") == ["x", "yy", ""]
    for end in range(len(data)):
        with pytest.raises(BundleError):
            Metadata(Path("m.gguf"), data[:end])


def test_bounds_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rooms, "MAX_STRINGS", 2)
    with pytest.raises(BundleError, match="more than 2 strings in arrays"):
        of(array(8, 3, text(b"") * 3))
    monkeypatch.setattr(rooms, "MAX_BYTES", 10)
    (tmp_path / "metadata.gguf").write_bytes(bytes(100))
    with pytest.raises(BundleError, match="more than 10 bytes"):
        read_metadata(tmp_path)


def test_text_that_is_no_utf8_is_refused_when_it_is_asked_for() -> None:
    found = of(array(8, 2, text(b"x") + text(b"\xff")))
    with pytest.raises(BundleError, match="string 1 is not UTF-8"):
        found.strings("a")
