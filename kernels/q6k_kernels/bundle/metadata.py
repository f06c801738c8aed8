"""A bundle's `metadata.gguf`: the model's hyper-parameters and vocabulary, read when they are asked for.

    file  = "GGUF"  version:u32  tensor_count:u64  kv_count:u64  kv*  padding        all little-endian
    kv    = key:string  type:u32  value        string = length:u64 bytes
    array = element_type:u32  count:u64  element*

The file is untrusted: its size is bounded, and every length and count is held against the bytes that are left
before anything is made of it. Opening steps over arrays; a vocabulary of 262,144 tokens is decoded once somebody
asks for it.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from q6k_kernels.bundle.manifest import METADATA_NAME, BundleError

# No real file comes near these; they bound the time and memory a hostile one can cost.
MAX_BYTES = 1 << 28
MAX_KEYS = 1 << 15
MAX_STRINGS = 1 << 21
MAX_LIST = 1 << 16

_HEADER = struct.Struct("<4sIQQ")
_LENGTH = struct.Struct("<Q")
_TYPE = struct.Struct("<I")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_NUMBERS[_BOOL] = "u1"


@dataclass(frozen=True, slots=True)
class _Value:
    """Where a value lies: its type; of an array the elements' type and their number, else None and 1."""

    type: int
    at: int
    element: int | None
    count: int


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """The key-value pairs of a bundle.

    Args:
        path: the bundle's directory, or a GGUF file that has nothing but metadata.

    Raises:
        BundleError: the file breaks the format or a bound of this reader; the message says where.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path /= METADATA_NAME
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    return Metadata(path, data)


class Metadata:
    """Key-value pairs of one file, read by `read_metadata`.

    The typed readers return None for a key that is absent and raise BundleError for one of another type, which
    they name together with what was expected.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self._data = data
        self._values = dict[str, _Value]()
        if len(data) > MAX_BYTES:
            self._reject("size", f"more than {MAX_BYTES} bytes")
        if len(data) < _HEADER.size:
            self._reject("header", f"expected {_HEADER.size} bytes, found {len(data)}")
        magic, version, tensors, count = _HEADER.unpack_from(data)
        if magic != b"GGUF" or version not in (2, 3):
            self._reject("header", f"expected GGUF version 2 or 3, found {magic!r} version {version}")
        if tensors:
            self._reject("header", f"expected no tensors, found {tensors}")
        if count > MAX_KEYS:
            self._reject("header", f"{count} keys, more than the limit of {MAX_KEYS}")
        at, strings = _HEADER.size, 0
        for index in range(count):
            key, at = self._text(at, f"key {index}")
            if key in self._values:
                self._reject(f"key {key!r}", "appears twice")
            value, at = self._step_over(key, at)
            strings += value.count if value.element == _STRING else 0
            if strings > MAX_STRINGS:
                self._reject(f"value of {key!r}", f"more than {MAX_STRINGS} strings in arrays")
            self._values[key] = value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __repr__(self) -> str:
        return f"Metadata('{self.path}', {len(self._values)} keys)"

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, in the file's order."""
        return tuple(self._values)

    @property
    def architecture(self) -> str:
        """`general.architecture`; "" if the file names none."""
        return self.string("general.architecture") or ""

    def string(self, key: str) -> str | None:
        """A text."""
        value = self._one(key, "a string", lambda kind: kind == _STRING)
        return None if value is None else self._text(value.at, f"value of {key!r}")[0]

    def integer(self, key: str) -> int | None:
        """A whole number, of any width."""
        value = self._number(key, "a whole number", "ui")
        return None if value is None else int(value)

    def real(self, key: str) -> float | None:
        """A number, whole or not."""
        value = self._number(key, "a number", "uif")
        return None if value is None else float(value)

    def flag(self, key: str) -> bool | None:
        """A boolean."""
        value = self._one(key, "a boolean", lambda kind: kind == _BOOL)
        return None if value is None else bool(self._data[value.at])

    def strings(self, key: str) -> list[str] | None:
        """An array of texts."""
        value = self._array(key, "an array of strings", lambda kind: kind == _STRING)
        if value is None:
            return None
        at, found, data, unpack = value.at, list[str](), self._data, _LENGTH.unpack_from
        try:
            for _ in range(value.count):
                start = at + 8
                at = start + unpack(data, at)[0]
                found.append(data[start:at].decode())
        except UnicodeDecodeError as error:
            self._reject(f"value of {key!r}", f"string {len(found)} is not UTF-8: {error.reason}")
        return found

    def numbers(self, key: str) -> np.ndarray[Any, np.dtype[Any]] | None:
        """An array of numbers or booleans, in the type that the file has them in."""
        value = self._array(key, "an array of numbers", lambda kind: kind in _NUMBERS)
        if value is None:
            return None
        found = np.frombuffer(self._data, _NUMBERS[value.element or 0], value.count, value.at)
        return found.astype(bool) if value.element == _BOOL else found

    def value(self, key: str) -> Any:
        """A value of whatever type; an array, of at most `MAX_LIST`, as a list. None if the key is absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if value.element is not None:
            if value.count > MAX_LIST:
                self._reject(f"key {key!r}", f"{_described(value)}, more than the limit of {MAX_LIST}")
            numbers = None if value.element == _STRING else self.numbers(key)
            return self.strings(key) if numbers is None else numbers.tolist()
        if value.type == _STRING:
            return self.string(key)
        return self.flag(key) if value.type == _BOOL else self._unpacked(value)

    def _step_over(self, key: str, at: int) -> tuple[_Value, int]:
        """The value that begins at `at` with its type, and where the next pair begins."""
        item = f"value of {key!r}"
        kind, at = self._type(at, item)
        if kind == _STRING:
            return _Value(kind, at, None, 1), self._after(at, 1, item)
        if kind != _ARRAY:
            return _Value(kind, at, None, 1), self._within(at, np.dtype(_NUMBERS[kind]).itemsize, item)
        element, at = self._type(at, item)
        if element == _ARRAY:
            self._reject(item, "an array of arrays, which is not supported")
        self._within(at, 8, item)
        count = _LENGTH.unpack_from(self._data, at)[0]
        at += 8
        # Before it is multiplied or looped over; a string takes 8 bytes at least.
        size = 8 if element == _STRING else np.dtype(_NUMBERS[element]).itemsize
        if count > (len(self._data) - at) // size:
            self._reject(item, f"array of {count}, but only {len(self._data) - at} bytes are left")
        value = _Value(kind, at, element, count)
        return value, self._after(at, count, item) if element == _STRING else at + count * size

    def _after(self, at: int, count: int, item: str) -> int:
        """Where `count` strings that begin at `at` end."""
        data, end, unpack = self._data, len(self._data), _LENGTH.unpack_from
        for _ in range(count):
            if at + 8 > end:
                self._reject(item, f"string at byte {at}: the file ends before its length does")
            at += 8 + unpack(data, at)[0]
            if at > end:
                self._reject(item, f"string reaches byte {at}, and the file has {end}")
        return at

    def _text(self, at: int, item: str) -> tuple[str, int]:
        end = self._after(at, 1, item)
        try:
            return self._data[at + 8 : end].decode(), end
        except UnicodeDecodeError as error:
            self._reject(item, f"not UTF-8: {error.reason}")

    def _type(self, at: int, item: str) -> tuple[int, int]:
        after = self._within(at, 4, item)
        kind = _TYPE.unpack_from(self._data, at)[0]
        if kind not in _NUMBERS and kind not in (_STRING, _ARRAY):
            self._reject(item, f"unknown value type {kind}; 0 to 12 are known")
        return kind, after

    def _within(self, at: int, length: int, item: str) -> int:
        if at + length > len(self._data):
            self._reject(item, f"{length} bytes expected at byte {at}, and the file has {len(self._data)}")
        return at + length

    def _number(self, key: str, expected: str, kinds: str) -> Any:
        def fits(kind: int) -> bool:
            return kind in _NUMBERS and kind != _BOOL and np.dtype(_NUMBERS[kind]).kind in kinds

        value = self._one(key, expected, fits)
        return None if value is None else self._unpacked(value)

    def _unpacked(self, value: _Value) -> Any:
        return np.frombuffer(self._data, _NUMBERS[value.type], 1, value.at)[0].item()

    def _one(self, key: str, expected: str, fits: Any) -> _Value | None:
        value = self._values.get(key)
        if value is not None and (value.element is not None or not fits(value.type)):
            self._reject(f"key {key!r}", f"expected {expected}, found {_described(value)}")
        return value

    def _array(self, key: str, expected: str, fits: Any) -> _Value | None:
        value = self._values.get(key)
        if value is not None and (value.element is None or not fits(value.element)):
            self._reject(f"key {key!r}", f"expected {expected}, found {_described(value)}")
        return value

    def _reject(self, item: str, problem: str) -> NoReturn:
        raise BundleError(f"{self.path}: {item}: {problem}")


def _described(value: _Value) -> str:
    names = {**_NUMBERS, _BOOL: "bool", _STRING: "string"}
    kind = names[value.type if value.element is None else value.element].lstrip("<")
    return kind if value.element is None else f"an array of {value.count} {kind}"
