"""`bundle.json`: what a bundle holds, in one canonical JSON text.

Rules of version 2:

1. The text ends in a field `manifest_checksum`: the checksum of the same text without that field. So no
   bit of it can change unnoticed.
2. Every object has exactly the fields that the classes here have.
3. Every checksum is XXH3-128 in hexadecimal.
4. `files` names every other file of the directory. A shard has the checksum of its header, and every
   byte after the header belongs to one array, which has a checksum of its own.
5. `tensors` lists the source's tensors in the order of their data, those not stored included. `format` is the
   name of the weight type of a packed tensor (see `formats.types`), null for others.
6. `companions` names the files for transformers, each with its SHA-256 (see `companions`); without such files there
   is no such field.
7. Nothing in it depends on time, place or machine.

The manifest is untrusted when read: `read` bounds its size, its values and texts, and checks every field's type.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from q6k_kernels.bundle.naming import COMPANIONS, naming
from q6k_kernels.bundle.parsing import MAX_TEXT, parse
from q6k_kernels.bundle.shards import DTYPE_BYTES, MAX_SHARDS
from q6k_kernels.bundle.storage import STORAGES
from q6k_kernels.gguf.file import MAX_TENSORS
from q6k_kernels.gguf.tensors import MAX_DIMS
from q6k_kernels.text import shortened

FORMAT = "q6k-planar"
VERSION = 2
NAME = "bundle.json"
METADATA_NAME = "metadata.gguf"
CHECKSUM = "xxh3_128"
MAX_BYTES = 48 << 20
"""Limit of the manifest's size in bytes; the manifest of any GGUF that the reader accepts is smaller."""
_ENDING = re.compile(rb',\n "manifest_checksum": "([0-9a-f]{32})"\n}\n')
_ENDING_BYTES = 61
_SURROGATE = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89a-fA-F]")

_LIMITS: tuple[tuple[str, type[Any], int], ...] = (
    ("tensors", list, MAX_TENSORS),
    ("tied", dict, MAX_TENSORS),
    ("files", dict, MAX_SHARDS + 2),
    ("sources", list, MAX_SHARDS),
)
T = TypeVar("T")


class BundleError(ValueError):
    """A directory is no bundle, or breaks a rule of the format; the message says which rule and where."""


@dataclass(frozen=True)
class StoredArray:
    """One array of a tensor: its key in the shard `file`, safetensors dtype, shape and checksum."""

    key: str
    dtype: str
    shape: list[int]
    file: str
    checksum: str


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the source.

    Attributes:
        name: its GGUF name.
        type: its GGML type.
        shape: torch order.
        storage: one of `STORAGES`.
        format: the name of its weight type, if it is packed.
        arrays: its arrays by role: those of the weight type, or `data`; none if it is skipped.
    """

    name: str
    type: str
    shape: list[int]
    storage: str
    format: str | None
    arrays: dict[str, StoredArray]

    @property
    def nbytes(self) -> int:
        """Size of all its arrays in bytes."""
        return sum(math.prod(array.shape) * DTYPE_BYTES[array.dtype] for array in self.arrays.values())


@dataclass(frozen=True)
class SourceFile:
    """A GGUF file the bundle was made from."""

    name: str
    size: int
    checksum: str


@dataclass(frozen=True)
class StoredFile:
    """A file of the bundle: checksum of its first `checked_bytes` (the header of a shard, else all)."""

    size: int
    checked_bytes: int
    checksum: str


@dataclass(frozen=True)
class Companion:
    """A file for transformers: its size in bytes, and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `bundle.json`; see the module's rules."""

    producer: str
    options: dict[str, Any]
    architecture: str
    sources: list[SourceFile]
    files: dict[str, StoredFile]
    tied: dict[str, str]
    tensors: list[StoredTensor]
    companions: dict[str, Companion] = field(default_factory=dict)


def checksum(data: bytes) -> str:
    """Return the checksum of `data` that a bundle uses throughout."""
    return xxhash.xxh3_128_hexdigest(data)


def serialize(manifest: Manifest) -> bytes:
    """Return the canonical text of a manifest."""
    content = {"format": FORMAT, "version": VERSION, "checksum": CHECKSUM} | asdict(manifest)
    if not manifest.companions:
        del content["companions"]
    bare = json.dumps(content, indent=1, ensure_ascii=False)
    content["manifest_checksum"] = checksum(bare.encode())
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def is_bundle(directory: Path) -> bool:
    """Check whether the directory claims to be a bundle: it has a manifest."""
    return (directory / NAME).is_file()


def read(directory: Path) -> Manifest:
    """Read and check `bundle.json`.

    Raises:
        BundleError: it is missing, of an unknown version, or breaks a rule of the format.
        OSError: it cannot be read.
    """
    path = directory / NAME
    if not path.is_file():
        raise BundleError(f"{directory} is not a bundle: it has no {NAME}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise BundleError(f"{path}: {size} bytes, more than the limit of {MAX_BYTES}")
    with naming(path):
        raw = path.read_bytes()
    try:
        content = parse(raw)
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON: {error}") from error
    try:
        top = _expect(content, dict, "the manifest")
        _check_version(top)
        ending = _ENDING.fullmatch(raw, max(0, len(raw) - _ENDING_BYTES))
        if ending is None or checksum(raw[:-_ENDING_BYTES] + b"\n}").encode() != ending[1]:
            raise BundleError("its content does not match its own checksum: the file was altered")
        if _SURROGATE.search(raw):
            raise BundleError("a text in it has an escaped surrogate, which UTF-8 cannot hold")
        return _parsed(top)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


def _check_version(top: dict[str, Any]) -> None:
    if top.get("format") != FORMAT:
        raise BundleError(f"format: expected {FORMAT!r}, found {shortened(top.get('format'))}")
    if top.get("version") != VERSION or top.get("checksum") != CHECKSUM:
        older = isinstance(top.get("version"), int) and top["version"] < VERSION
        raise BundleError(
            f"version {shortened(top.get('version'))} with checksums {shortened(top.get('checksum'))}; this "
            f"program reads version {VERSION} with {CHECKSUM!r}: "
            + ("convert the model again" if older else "a newer release of q6k-convert may read it")
        )


def _parsed(top: dict[str, Any]) -> Manifest:
    for name, kind, most in _LIMITS:
        if (count := len(_field(top, name, kind))) > most:
            raise BundleError(f"{name}: {count}, more than the limit of {most}")
    manifest = Manifest(
        producer=_field(top, "producer", str),
        options=_field(top, "options", dict),
        architecture=_field(top, "architecture", str),
        sources=[
            SourceFile(_field(s, "name", str), _size(s, "size"), _field(s, "checksum", str))
            for s in _objects(SourceFile, _field(top, "sources", list))
        ],
        files={
            name: StoredFile(_size(f, "size"), _size(f, "checked_bytes"), _field(f, "checksum", str))
            for name, f in zip(_field(top, "files", dict), _objects(StoredFile, top["files"].values()), strict=True)
        },
        tied={name: _expect(to, str, "tied") for name, to in _field(top, "tied", dict).items()},
        tensors=[_tensor(t) for t in _objects(StoredTensor, _field(top, "tensors", list))],
        companions=_companions(top) if "companions" in top else {},
    )
    for option, value in manifest.options.items():
        # Flat, so that no nesting can exhaust the stack of a program that prints it.
        if not isinstance(value, str | int) and not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            raise BundleError(f"options: {shortened(option)} is neither text, a number nor a list of texts")
    _only_fields_of(Manifest, top, "format", "version", "checksum", "manifest_checksum")
    for name in manifest.files:
        if name in ("", ".", "..", NAME) or "/" in name or "\\" in name or "\0" in name:
            raise BundleError(f"files: {shortened(name)} is not the name of a file in this directory")
    return manifest


def _companions(top: dict[str, Any]) -> dict[str, Companion]:
    content = _field(top, "companions", dict)
    if others := set(content) - set(COMPANIONS):
        raise BundleError(f"companions: expected names of {', '.join(COMPANIONS)}, found {shortened(min(others))}")
    return {
        name: Companion(_size(each, "size"), _field(each, "sha256", str))
        for name, each in zip(content, _objects(Companion, content.values()), strict=True)
    }


def _only_fields_of(kind: type, content: Any, *more: str) -> None:
    if extra := set(_expect(content, dict, "an entry")) - {field.name for field in fields(kind)} - set(more):
        raise BundleError(f"unknown fields: {', '.join(sorted(map(shortened, extra))[:5])}")


def _objects(kind: type, entries: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        _only_fields_of(kind, entry)
        yield entry


def _tensor(content: Any) -> StoredTensor:
    name = _field(content, "name", str)
    try:
        storage = _field(content, "storage", str)
        if storage not in STORAGES:
            raise BundleError(f"storage: expected one of {', '.join(STORAGES)}, found {shortened(storage)}")
        arrays = _field(content, "arrays", dict)
        if "format" not in content:
            raise BundleError("format: missing")
        return StoredTensor(
            name=name,
            type=_field(content, "type", str),
            shape=_shape(content),
            storage=storage,
            format=None if content["format"] is None else _field(content, "format", str),
            arrays={
                role: _array(a) for role, a in zip(arrays, _objects(StoredArray, arrays.values()), strict=True)
            },
        )
    except BundleError as error:
        raise BundleError(f"tensor {shortened(name)}: {error}") from error


def _array(content: Any) -> StoredArray:
    dtype = _field(content, "dtype", str)
    if dtype not in DTYPE_BYTES:
        raise BundleError(f"dtype: expected one of {', '.join(DTYPE_BYTES)}, found {shortened(dtype)}")
    return StoredArray(
        key=_field(content, "key", str),
        dtype=dtype,
        shape=_shape(content),
        file=_field(content, "file", str),
        checksum=_field(content, "checksum", str),
    )


def _expect(value: Any, kind: type[T], what: str) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BundleError(f"{what}: expected {kind.__name__}, found {type(value).__name__}")
    for text in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
        if len(text) > MAX_TEXT:
            raise BundleError(f"{what}: a text of {len(text)} characters, more than the limit of {MAX_TEXT}")
    return value


def _field(content: Any, name: str, kind: type[T]) -> T:
    content = _expect(content, dict, f"the object around {name!r}")
    if name not in content:
        raise BundleError(f"{name}: missing")
    return _expect(content[name], kind, name)


def _size(content: Any, name: str) -> int:
    value = _field(content, name, int)
    if not 0 <= value < 1 << 63:
        raise BundleError(f"{name}: {value} is not a size")
    return value


def _shape(content: Any) -> list[int]:
    dims = [_expect(dim, int, "shape") for dim in _field(content, "shape", list)]
    if len(dims) > MAX_DIMS or any(not 0 <= dim < 1 << 63 for dim in dims):
        raise BundleError(f"shape: {shortened(dims)} has impossible dimensions")
    return dims
