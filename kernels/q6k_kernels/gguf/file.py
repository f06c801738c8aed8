"""One GGUF file: bytes to header, key-value pairs and tensor records, every number bounded.

    file    = magic:4 "GGUF"  version:u32  tensor_count:u64  kv_count:u64  kv*  tensor*  padding  data
    kv      = key:string  type:u32  value          string = length:u64 bytes
    array   = element_type:u32  count:u64  element*

All little-endian; `tensors.py` has the tensor records, `model.py` joins split files.
Source of the format: ggml's docs/gguf.md; versions 2 and 3 read alike.

The file is untrusted: nothing is allocated by a number it states until that number has been
compared with the file's size. Strings and arrays (a vocabulary, say) are only stepped over until somebody asks for
them: one that is no text, and that nobody reads, is no fault.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from q6k_kernels.gguf.bytes import Cursor, SourceBytes
from q6k_kernels.gguf.tensors import read_tensors
from q6k_kernels.text import shortened

# No real file comes near these; they bound the time and memory a hostile one can cost.
MAX_TENSORS = 1 << 14
MAX_KEY_VALUES = 1 << 15
MAX_KEY_BYTES = (1 << 16) - 1
MAX_KEYS_BYTES = 16 << 20
"""Limit of all keys together."""
MAX_STRING_BYTES = 1 << 30
MAX_TEXT_BYTES = 16 << 20
"""Limit of a string that is read, and not only copied."""
MAX_ARRAY_STRINGS = 1 << 21
MAX_ALIGNMENT = 1 << 30
MAX_ARCHITECTURE = 255

_HEADER = 24
_MIN_KEY_VALUE = 8 + 1 + 4 + 1
_MIN_TENSOR = 8 + 1 + 4 + 4 + 8
_DEFAULT_ALIGNMENT = 32
_ELEMENTS = 1 << 16

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
        """`general.architecture`; "" if the file names none.

        Raises:
            GgufRejectedError: it is no text, or a long one.
        """
        name: str = self.scalar(ARCHITECTURE, ValueType.STRING) or ""
        if len(name) > MAX_ARCHITECTURE:
            raise self.beyond(
                ARCHITECTURE, f"{len(name)} characters", MAX_ARCHITECTURE, self.kv[ARCHITECTURE].start
            )
        return name

    def value(self, key: str, default: Any = None, errors: str = "strict") -> Any:
        """Read the value of a key: int, float, bool, str or a list of them; `default` if absent.

        Args:
            key: the key, with a lone surrogate for each byte that is not UTF-8.
            default: result for a key that is absent.
            errors: how to decode text that is not UTF-8, as for `bytes.decode`.

        Raises:
            GgufRejectedError: a string in it is not UTF-8, or longer than `MAX_TEXT_BYTES`.
        """
        kv = self.kv.get(key)
        if kv is None:
            return default
        if kv.element is not None:
            return [element for some in self.elements(key, errors) for element in some]
        if kv.type is ValueType.STRING:
            return Cursor(self, kv.at, kv.end).string(_value_of(key), MAX_TEXT_BYTES, errors)
        return _numbers(kv.type, self.read(kv.at, kv.end - kv.at))[0]

    def elements(self, key: str, errors: str = "strict") -> Iterator[list[Any]]:
        """Yield the elements of an array, some at a time: a long one takes little memory. See `value`."""
        kv = self.kv[key]
        if kv.element is ValueType.STRING:
            cursor = Cursor(self, kv.at, kv.end)
            for at in range(0, kv.count, _ELEMENTS):
                yield cursor.strings(min(_ELEMENTS, kv.count - at), _value_of(key), MAX_TEXT_BYTES, errors)
        elif kv.element is not None:
            step = _ELEMENTS * struct.calcsize(_FORMATS[kv.element])
            for at in range(kv.at, kv.end, step):
                yield _numbers(kv.element, self.read(at, min(step, kv.end - at)))

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


def _value_of(key: str) -> str:
    return f"value of {shortened(key)}"


def _numbers(kind: ValueType, raw: bytes | bytearray) -> list[Any]:
    numbers = [number for (number,) in struct.iter_unpack("<" + _FORMATS[kind], raw)]
    return [bool(number) for number in numbers] if kind is ValueType.BOOL else numbers


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
            raise file.beyond(item, str(count), bound, at)
    return version, tensor_count, kv_count


def _value_type(cursor: Cursor, item: str) -> ValueType:
    at = cursor.at
    number = cursor.number("I", item)
    if number not in ValueType._value2member_map_:
        raise cursor.file.reject(item, f"unknown value type {number} (0 to 12 are known)", at)
    return ValueType(number)


def _read_key_values(cursor: Cursor, count: int) -> dict[str, KeyValue]:
    file, pairs, strings, keys = cursor.file, dict[str, KeyValue](), 0, 0
    for index in range(count):
        start = cursor.at
        key = cursor.string(f"key {index}", MAX_KEY_BYTES, "surrogateescape")
        keys += cursor.at - start - 8
        if keys > MAX_KEYS_BYTES:
            raise file.beyond("keys", f"{keys} bytes", MAX_KEYS_BYTES, start)
        if not key:
            raise file.reject(f"key {index}", "the key is empty", start)
        if key in pairs:
            raise file.reject(f"key {shortened(key)}", f"appears twice, first at byte {pairs[key].start}", start)
        item = _value_of(key)
        kind = _value_type(cursor, item)
        at, element, elements = cursor.at, None, 1
        if kind is ValueType.STRING:
            cursor.skip_string(item, MAX_STRING_BYTES)
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
                    raise file.beyond(item, f"{strings} strings in arrays", MAX_ARRAY_STRINGS, at)
                cursor.skip_strings(elements, item)
            else:
                cursor.skip(elements * smallest, item)
        else:
            cursor.take(struct.calcsize(_FORMATS[kind]), item)
        pairs[key] = KeyValue(key, kind, start, at, cursor.at, element, elements)
    return pairs
