"""A bundle's `metadata.gguf`: the model's hyper-parameters and vocabulary, read as the type that is asked for.

The GGUF reader bounds what the file states. This module also bounds what is read of one value: a vocabulary of
262,144 tokens is read only when it is asked for, and what is only copied, such as a whole `tokenizer.json`, never.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from q6k_kernels.bundle.links import outside
from q6k_kernels.bundle.manifest import METADATA_NAME, BundleError
from q6k_kernels.errors import GgufRejectedError
from q6k_kernels.gguf.file import FLOATS, INTEGERS, GGUFFile, KeyValue, ValueType

# No real file comes near these; they bound the memory a hostile one can cost.
MAX_BYTES = 1 << 26
"""Limit of the bytes of an array that is read."""
MAX_NUMBERS = 1 << 21
"""Limit of the numbers of an array that is read; `MAX_ARRAY_STRINGS` is that of strings."""
MAX_LIST = 1 << 16
"""Limit of the elements of an array that `Metadata.value` reads."""


def metadata_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of the file with a bundle's metadata; of what is no directory, the path itself.

    Raises:
        BundleError: the file is a link out of the bundle.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    path /= METADATA_NAME
    if strayed := outside(path):
        raise BundleError(f"{path} {strayed}")
    return path


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Read the key-value pairs of a bundle.

    Args:
        path: the bundle's directory, or a GGUF file that has nothing but metadata.

    Raises:
        BundleError: the file breaks the format or a bound of the reader, or is a link out of the bundle; the
            message says where.
        GgufReadError: it is no regular file, or cannot be read. So does every later reading of a value, which opens
            the file again, and refuses one that has changed.
    """
    path = metadata_file(path)
    with _rejections_as_bundle_errors(), GGUFFile(path) as file:
        if file.tensors:
            raise BundleError(f"{path}: expected no tensors, found {len(file.tensors)}")
        return Metadata(file)


CONTEXT_LENGTH = "context_length"
"""Key of the context length, behind the architecture's name."""
ENDS = ("eos", "eot", "eom")
"""Special tokens that end a text or a turn, by the names that `token_id_key` takes."""


SUPPRESSED = "tokenizer.ggml.suppress_tokens"
"""Key of the ids of tokens that must never be chosen, an array."""


def token_id_key(name: str) -> str:
    """Return the key of a special token's id: "bos", "eos", "eot", "eom", "unknown" or "padding"."""
    return f"tokenizer.ggml.{name}_token_id"


class Metadata:
    """Key-value pairs of one file, read by `read_metadata`.

    The typed readers return None for a key that is absent and raise BundleError for one of another type; the
    message names both types.

    Attributes:
        path: path of the file, for messages.
        architecture: `general.architecture`; "" if the file names none.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self.architecture = file.architecture
        self._file = file

    def __contains__(self, key: object) -> bool:
        return key in self._file.kv

    def length(self, key: str) -> int | None:
        """Return the number of elements of an array, without reading them; None if the value is none or absent."""
        kv = self._file.kv.get(key)
        return None if kv is None or kv.element is None else kv.count

    def __repr__(self) -> str:
        return f"Metadata('{self.path}', {len(self._file.kv)} keys)"

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, in the file's order."""
        return tuple(self._file.kv)

    @property
    def context_length(self) -> int | None:
        """Context length in tokens; None if the file does not state it."""
        return self.integer(f"{self.architecture}.{CONTEXT_LENGTH}")

    def string(self, key: str) -> str | None:
        """Read a text."""
        value: str | None = self._typed(key, "a string", {ValueType.STRING})
        return value

    def integer(self, key: str) -> int | None:
        """Read a whole number, of any width."""
        value: int | None = self._typed(key, "a whole number", INTEGERS)
        return value

    def real(self, key: str) -> float | None:
        """Read a number, whole or not."""
        value: int | float | None = self._typed(key, "a number", INTEGERS | FLOATS)
        return None if value is None else float(value)

    def flag(self, key: str) -> bool | None:
        """Read a boolean."""
        value: bool | None = self._typed(key, "a boolean", {ValueType.BOOL})
        return value

    def strings(self, key: str) -> list[str] | None:
        """Read an array of texts."""
        values: list[str] | None = self._typed(key, "an array of strings", {ValueType.STRING}, array=True)
        return values

    def integers(self, key: str) -> list[int] | None:
        """Read an array of whole numbers, of any width."""
        values: list[int] | None = self._typed(key, "an array of whole numbers", INTEGERS, array=True)
        return values

    def reals(self, key: str) -> list[float] | None:
        """Read an array of numbers, whole or not."""
        values: list[float] | None = self._typed(key, "an array of numbers", INTEGERS | FLOATS, array=True)
        return values

    def value(self, key: str) -> Any:
        """Read a value of any type, an array of at most `MAX_LIST` as a list; None if the key is absent."""
        kv = self._file.kv.get(key)
        if kv is not None and kv.element is not None and kv.count > MAX_LIST:
            self._reject(kv, f"{_described(kv)}, more than the limit of {MAX_LIST}")
        with _rejections_as_bundle_errors():
            return self._file.value(key)

    def _typed(self, key: str, expected: str, types: Collection[ValueType], *, array: bool = False) -> Any:
        """Read the value of a key whose own type, or that of its elements, must be one of `types`."""
        kv = self._file.kv.get(key)
        if kv is not None and (kv.element if array else kv.type) not in types:
            self._reject(kv, f"expected {expected}, found {_described(kv)}")
        if kv is not None and kv.element is not None:
            if kv.element is not ValueType.STRING and kv.count > MAX_NUMBERS:
                self._reject(kv, f"{_described(kv)}, more than the limit of {MAX_NUMBERS}")
            if kv.end - kv.at > MAX_BYTES:
                self._reject(kv, f"{_described(kv)} of {kv.end - kv.at} bytes, more than the limit of {MAX_BYTES}")
        with _rejections_as_bundle_errors():
            return self._file.value(key)

    def _reject(self, kv: KeyValue, problem: str) -> NoReturn:
        raise BundleError(f"{self.path}: {kv.key}: {problem}")


@contextmanager
def _rejections_as_bundle_errors() -> Iterator[None]:
    try:
        yield
    except GgufRejectedError as error:
        raise BundleError(error.cause) from error


def _described(kv: KeyValue) -> str:
    return kv.type.name if kv.element is None else f"an array of {kv.count} {kv.element.name}"
