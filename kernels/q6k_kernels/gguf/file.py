"""One GGUF file: bytes to header, key-value pairs and tensor records, every number bounded.

    file    = magic:4 "GGUF"  version:u32  tensor_count:u64  kv_count:u64  kv*  tensor*  padding  data
    kv      = key:string  type:u32  value          string = length:u64 bytes
    array   = element_type:u32  count:u64  element*

All little-endian; `tensors.py` has the tensor records, `model.py` joins split files.
Source of the format: ggml's docs/gguf.md; versions 2 and 3 read alike.

The file is untrusted: nothing is allocated by a number it states until that number has been
compared with the file's size. Arrays (a vocabulary, say) are only stepped over until somebody asks for them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from q6k_kernels.gguf.bytes import Cursor, SourceBytes
from q6k_kernels.gguf.tensors import read_tensors

# No real file comes near these; they bound the time and memory a hostile one can cost.
MAX_TENSORS = 1 << 14
MAX_KEY_VALUES = 1 << 15
MAX_KEY_BYTES = 1 << 8
MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_STRINGS = 1 << 21
MAX_ALIGNMENT = 1 << 30

_HEADER = 24
_MIN_KEY_VALUE = 8 + 1 + 4 + 1
_MIN_TENSOR = 8 + 1 + 4 + 4 + 8
_DEFAULT_ALIGNMENT = 32

ARCHITECTURE = "general.architecture"
ALIGNMENT = "general.alignment"

_LOOKS_LIKE = {
    b"vers": "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    b"FUGG": "a big-endian GGUF; only little-endian files are supported",
    b"ggml": "a GGML file from before GGUF",
    b"lmgg": "a GGML file from before GGUF",
    b"tjgg": "a GGJT file from before GGUF",
    b"PK\x03\x04": "a zip archive (a PyTorch checkpoint, perhaps)",
    b"<!DO": "a web page",
    b"<htm": "a web page",
}


class ValueType(IntEnum):
    """GGUF's value types."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_FORMATS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
INTEGERS = frozenset(kind for kind, form in _FORMATS.items() if form in "BbHhIiQq" and kind is not ValueType.BOOL)
FLOATS = frozenset({ValueType.FLOAT32, ValueType.FLOAT64})


@dataclass(frozen=True, slots=True)
class KeyValue:
    """The place of one key-value pair in its file; `GGUFFile.value` reads the value.

    Attributes:
        start, end: the pair's bytes in the file, key included.
        at: where the value begins (for arrays: the first element).
        type: the value's type; element type and count for arrays, else None and 1.
    """

    key: str
    type: ValueType
    start: int
    at: int
    end: int
    element: ValueType | None = None
    count: int = 1


class GGUFFile(SourceBytes):
    """A GGUF file opened for reading: header parsed and checked, data read on request.

    Raises:
        GgufRejectedError: the file breaks a rule of the format or a bound of this reader.
        GgufReadError: it cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            cursor = Cursor(self)
            self.version, tensor_count, kv_count = _read_header(cursor)
            self.kv = _read_key_values(cursor, kv_count)
            self.kv_range = (_HEADER, cursor.at)
            self.alignment = self._checked_alignment()
            self.tensors = read_tensors(cursor, tensor_count, self.alignment)
        except BaseException:
            self.close()
            raise

    @property
    def architecture(self) -> str:
        """`general.architecture`; "" if the file names none."""
        return self.scalar(ARCHITECTURE, ValueType.STRING) or ""

    def value(self, key: str, default: Any = None) -> Any:
        """Read the value of a key: int, float, bool, str or a list of them; `default` if absent.

        Raises:
            GgufRejectedError: a string in it is not UTF-8.
        """
        kv = self.kv.get(key)
        if kv is None:
            return default
        item = f"value of {key!r}"
        if kv.element is None:
            raw = self.read(kv.at, kv.end - kv.at)
            if kv.type is ValueType.STRING:
                return self.decoded(bytes(raw[8:]), item, kv.at + 8)
            number = struct.unpack("<" + _FORMATS[kv.type], raw)[0]
            return bool(number) if kv.type is ValueType.BOOL else number
        if kv.element is ValueType.STRING:
            return Cursor(self, kv.at).strings(kv.count, item, MAX_STRING_BYTES)
        numbers = struct.unpack(f"<{kv.count}{_FORMATS[kv.element]}", self.read(kv.at, kv.end - kv.at))
        return [bool(n) for n in numbers] if kv.element is ValueType.BOOL else list(numbers)

    def scalar(self, key: str, expected: ValueType) -> Any:
        """Read the value of a key that must be of one type; None if absent.

        Raises:
            GgufRejectedError: it is of another type; then it is not read.
        """
        kv = self.kv.get(key)
        if kv is None:
            return None
        if kv.type is not expected:
            raise self.reject(key, f"expected type {expected.name}, found {kv.type.name}", kv.start)
        return self.value(key)

    def _checked_alignment(self) -> int:
        alignment: int | None = self.scalar(ALIGNMENT, ValueType.UINT32)
        if alignment is None:
            return _DEFAULT_ALIGNMENT
        if alignment.bit_count() != 1 or alignment > MAX_ALIGNMENT:
            raise self.reject(
                ALIGNMENT,
                f"expected a power of two up to {MAX_ALIGNMENT}, found {alignment}",
                self.kv[ALIGNMENT].at,
            )
        return alignment


def _read_header(cursor: Cursor) -> tuple[int, int, int]:
    file = cursor.file
    if file.size == 0:
        raise file.reject("header", "the file is empty", 0)
    magic = cursor.take(min(4, file.size), "magic")
    if magic != b"GGUF":
        found = _LOOKS_LIKE.get(magic, repr(magic)[1:])
        raise file.reject("magic", f"expected 'GGUF', found {found}", 0, remedy="Give a GGUF file.")
    if file.size < _HEADER:
        raise file.reject("header", f"{_HEADER} bytes expected, but the file has {file.size}", 0)
    version = cursor.number("I", "version")
    if version and version & 0xFFFF == 0:
        raise file.reject(
            "version",
            f"big-endian GGUF (version {int.from_bytes(version.to_bytes(4, 'little'), 'big')} in big-endian)",
            4,
            remedy="Convert it to little-endian first (gguf_convert_endian.py of llama.cpp).",
        )
    if version not in (2, 3):
        raise file.reject(
            "version",
            f"expected 2 or 3, found {version}",
            4,
            remedy="Version 1 was written only in August 2023: convert the model again from its source."
            if version == 1
            else "A newer release of q6k-convert may read it; 2 and 3 are the versions known to this one.",
        )
    tensor_count = cursor.number("Q", "tensor count")
    kv_count = cursor.number("Q", "key-value count")
    for item, count, smallest, bound, at in (
        ("tensor count", tensor_count, _MIN_TENSOR, MAX_TENSORS, 8),
        ("key-value count", kv_count, _MIN_KEY_VALUE, MAX_KEY_VALUES, 16),
    ):
        if count > (file.size - _HEADER) // smallest:
            raise file.reject(item, f"{count}, more than a file of {file.size} bytes can hold", at)
        if count > bound:
            raise file.reject(item, f"{count}, more than the limit of {bound}", at)
    return version, tensor_count, kv_count


def _value_type(cursor: Cursor, item: str) -> ValueType:
    at = cursor.at
    number = cursor.number("I", item)
    if number not in ValueType._value2member_map_:
        raise cursor.file.reject(item, f"unknown value type {number} (0 to 12 are known)", at)
    return ValueType(number)


def _read_key_values(cursor: Cursor, count: int) -> dict[str, KeyValue]:
    file, pairs, strings = cursor.file, dict[str, KeyValue](), 0
    for index in range(count):
        start = cursor.at
        key = cursor.string(f"key {index}", MAX_KEY_BYTES)
        if not key:
            raise file.reject(f"key {index}", "the key is empty", start)
        if key in pairs:
            raise file.reject(f"key {key!r}", f"appears twice, first at byte {pairs[key].start}", start)
        item = f"value of {key!r}"
        kind = _value_type(cursor, item)
        at, element, elements = cursor.at, None, 1
        if kind is ValueType.STRING:
            # Read only to refuse broken text early; the value is not kept.
            cursor.string(item, MAX_STRING_BYTES)
        elif kind is ValueType.ARRAY:
            element = _value_type(cursor, item)
            elements = cursor.number("Q", item)
            if element is ValueType.ARRAY:
                raise file.reject(item, "nested arrays are not supported", at)
            smallest = 8 if element is ValueType.STRING else struct.calcsize(_FORMATS[element])
            if elements > cursor.remaining // smallest:
                raise file.reject(
                    item, f"array of {elements}, but only {cursor.remaining} bytes are left in the file", at + 4
                )
            at = cursor.at
            if element is ValueType.STRING:
                strings += elements
                if strings > MAX_ARRAY_STRINGS:
                    raise file.reject(item, f"more than {MAX_ARRAY_STRINGS} strings in arrays", at)
                cursor.skip_strings(elements, item)
            else:
                cursor.skip(elements * smallest, item)
        elif kind is ValueType.BOOL:
            if (number := cursor.number("B", item)) > 1:
                raise file.reject(item, f"expected a boolean 0 or 1, found {number}", at)
        else:
            cursor.take(struct.calcsize(_FORMATS[kind]), item)
        pairs[key] = KeyValue(key, kind, start, at, cursor.at, element, elements)
    return pairs
