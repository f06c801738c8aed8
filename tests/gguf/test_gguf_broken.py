"""The reader of one GGUF file: broken and hostile ones against their messages."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest

from gguf_builder import (
    F32,
    Q6_K,
    TYPE_CODES,
    header,
    key_value,
    record,
    small_model,
    string,
    tensors,
)
from q6k_kernels.errors import GgufRejectedError
from q6k_kernels.gguf.file import GGUFFile, ValueType

HEADER = 24
"""Where the first key-value pair lies, or the first tensor record if there are no pairs."""
KEY_LIMIT = 65535
"""Bytes that a key may have."""
TOP = 2**64


@dataclass(frozen=True)
class Bad:
    """A file to be rejected: its bytes, and what the message says is wrong, where and how."""

    id: str
    content: Callable[[], bytes]
    item: str
    offset: int | None
    problem: str


def pairs(*raw: bytes) -> Callable[[], bytes]:
    """A file of these key-value pairs, zeros after them, so that only what is wrong in them is wrong."""
    return lambda: header(0, len(raw)) + b"".join(raw) + bytes(64)


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
            f"string of {KEY_LIMIT + 1} bytes, more than the limit of {KEY_LIMIT}",
        ),
        Bad(
            "keys-over-limit",
            lambda: header(0, 257) + b"".join(key_value(f"{i:05}" + "k" * 65530, 1) for i in range(257)),
            "keys", HEADER + 256 * len(key_value("k" * KEY_LIMIT, 1)),
            f"{257 * KEY_LIMIT} bytes, more than the limit of 16777216",
        ),
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
            "2097153 strings in arrays, more than the limit of 2097152"),
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


DIMS_AT = HEADER + len(string("t")) + 4
"""Where the dimensions of a first tensor called `t` lie."""


def tensor_records() -> list[Bad]:
    """Every way for a tensor record to be wrong by itself."""
    item = "tensor 't'"
    cases = []
    for count in (9, 255, 2**32 - 1):
        raw = string("t") + struct.pack("<I", count) + bytes(64)
        said = f"{count} dimensions, more than the limit of 8"
        cases.append(Bad(f"{count}-dims", tensors(raw), item, DIMS_AT - 4, said))
    for name, dims in {
        "zero-dim-after-overflow": (2**63, 0), "zero-dim-within-overflow": (2**32, 0, 2**32),
        "product-2^64": (2**32, 2**32), "product-wraps-to-zero": (2**32, 2**32, 2**32, 2**32),
        "product-wraps-to-small": (2**63 + 1, 2**63 + 1), "dim-2^63": (2**63,), "dim-2^64-1": (TOP - 1,),
        "all-dims-max": (TOP - 1,) * 8,
    }.items():  # fmt: skip
        cases.append(
            Bad(name, tensors(record("t", dims)), item, DIMS_AT, f"dimensions {list(dims)} overflow 2^63 weights")
        )
    for name, dims, kind in (
        ("bytes-2^64", (2**62,), F32), ("bytes-2^63", (2**61,), F32), ("bytes-over-2^66", (2**31, 2**31), 28),
        ("bytes-of-blocks", (2**63 - 256,), 15),
    ):  # fmt: skip
        cases.append(
            Bad(
                name, tensors(record("t", dims, kind)), item, HEADER, f"dimensions {list(dims)} overflow 2^63 bytes"
            )
        )
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
        Bad("name-256-bytes", tensors(record("n" * 256)), "name of tensor 0", HEADER,
            "string of 256 bytes, more than the limit of 255"),
        Bad("name-256-bytes-in-128-characters", tensors(record("é" * 128)), "name of tensor 0", HEADER,
            "string of 256 bytes, more than the limit of 255"),
        Bad("names-over-limit", tensors(*(record(f"{i:04}" + "n" * 251) for i in range(4113))), "names of tensors",
            HEADER + 4112 * len(record("n" * 255)), "1048815 bytes, more than the limit of 1048576"),
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


LIMITS = [bad for bad in REJECTED if "the limit of" in bad.problem]


@pytest.mark.parametrize("bad", LIMITS, ids=lambda bad: bad.id)
def test_what_this_program_limits_is_not_called_damaged(tmp_path: Path, bad: Bad) -> None:
    path = tmp_path / "large.gguf"
    path.write_bytes(bad.content())
    with pytest.raises(GgufRejectedError) as caught:
        GGUFFile(path)
    assert "may be sound" in caught.value.remedy
    assert "damaged" not in caught.value.remedy


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
