"""The check of a bundle's structure: files, headers, names, dtypes and shapes. It reads no array data.

Each of these rules that is broken becomes a finding with file, tensor and array:

1. every file of the manifest is there, a regular file of the stated size, and not a link out of the
   directory, but for those of the Hub's cache (see `links`); no other safetensors file lies beside them
2. every shard's header obeys safetensors' rules: its length fits, it is one JSON object without
   duplicate keys, dtypes and shapes give the stated sizes, arrays are aligned and follow each other
   without hole, overlap or trailing bytes
3. shards hold exactly the arrays of the manifest, with its dtypes and shapes; the index agrees
4. every tensor has the arrays its storage asks for, so the planes of one tensor agree on N and K
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from q6k_kernels.bundle.links import outside
from q6k_kernels.bundle.manifest import METADATA_NAME, NAME, Manifest, StoredArray, StoredTensor
from q6k_kernels.bundle.naming import naming
from q6k_kernels.bundle.parsing import MAX_TEXT, parse
from q6k_kernels.bundle.shards import DTYPE_BYTES, INDEX_NAME
from q6k_kernels.bundle.storage import Storage, arrays_of
from q6k_kernels.formats.types import row_of
from q6k_kernels.gguf.tensors import MAX_DIMS
from q6k_kernels.text import shortened

MAX_HEADER = 32 << 20
"""Limit of a shard's header in bytes; the 16,384 tensors that a GGUF may have take less."""
MAX_INDEX = 32 << 20


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and where: file, tensor and array as far as they are known."""

    problem: str
    file: str | None = None
    tensor: str | None = None
    array: str | None = None

    def __str__(self) -> str:
        places = (("", self.file), ("tensor ", self.tensor), ("array ", self.array))
        where = ", ".join(label + name for label, name in places if name is not None)
        return f"{where}: {self.problem}" if where else self.problem


@dataclass(frozen=True)
class Entry:
    """One array in a shard's header; `begin` and `end` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_structure(directory: Path, manifest: Manifest) -> list[Finding]:
    """Check the rules above and return what breaks them; nothing for a sound bundle.

    Raises:
        OSError: a file that is there cannot be read.
    """
    findings = list(_check_files(directory, manifest))
    findings += _check_tensors(manifest)
    broken = {finding.file for finding in findings}
    by_file = dict[str, dict[str, tuple[StoredTensor, StoredArray]]]()
    for tensor in manifest.tensors:
        for array in tensor.arrays.values():
            by_file.setdefault(array.file, {})[array.key] = (tensor, array)
    for name in manifest.files:
        if name.endswith(".safetensors") and name not in broken:
            checked = manifest.files[name].checked_bytes
            findings += _check_shard(directory / name, checked, by_file.get(name, {}))
    if INDEX_NAME in manifest.files and INDEX_NAME not in broken:
        findings += _check_index(directory / INDEX_NAME, by_file)
    return findings


def read_header(path: Path) -> dict[str, Entry]:
    """Read the header of a safetensors file, check it by the format's rules, and return its arrays by key.

    Raises:
        ValueError: a rule is broken; the message says which.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with naming(path), path.open("rb") as file:
        if size < 8:
            raise ValueError(f"{size} bytes, too short for a safetensors header")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(f"header of {length} bytes; the file has {size}, the limit is {MAX_HEADER}")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("the header does not begin with '{'")
    try:
        content = parse(text)
    except ValueError as error:
        raise ValueError(f"the header is not valid JSON: {error}") from error
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not a map of strings")
    entries = {key: _entry(key, value, 8 + length) for key, value in content.items()}
    at = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            what = "a hole before it" if entry.begin > at else "overlaps the array before it"
            raise ValueError(f"array {shortened(key)} begins at byte {entry.begin}, expected {at}: {what}")
        if entry.begin % DTYPE_BYTES[entry.dtype]:
            raise ValueError(
                f"array {shortened(key)} at byte {entry.begin} is not aligned to its dtype {entry.dtype}"
            )
        at = entry.end
    if at != size:
        raise ValueError(f"the arrays end at byte {at}, the file at {size}")
    return entries


def _entry(key: str, value: Any, data_at: int) -> Entry:
    name = shortened(key)
    if len(key) > MAX_TEXT:
        raise ValueError(f"key {name} has {len(key)} characters, more than the limit of {MAX_TEXT}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"array {name}: expected dtype, shape and data_offsets, found {shortened(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"array {name}: unknown dtype {shortened(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"array {name}: impossible shape {shortened(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"array {name}: impossible data_offsets {shortened(offsets)}")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        raise ValueError(f"array {name}: {dtype} {shape} takes {nbytes} bytes, data_offsets give {end - begin}")
    return Entry(dtype, tuple(shape), data_at + begin, data_at + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def wrong_file(path: Path, size: int) -> str:
    """Return why a path is no regular file of that size in its bundle; "" if it is one."""
    if not os.path.lexists(path):
        return "missing"
    if strayed := outside(path):
        return strayed
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    return "" if found.st_size == size else f"{found.st_size} bytes, expected {size}"


def _check_files(directory: Path, manifest: Manifest) -> Iterator[Finding]:
    if strayed := outside(directory / NAME):
        yield Finding(strayed, NAME)
    for name, file in manifest.files.items():
        if problem := wrong_file(directory / name, file.size):
            yield Finding(problem, name)
        elif file.checked_bytes > file.size:
            yield Finding(f"the manifest checks {file.checked_bytes} of its {file.size} bytes", name)
        elif file.checked_bytes < file.size and not name.endswith(".safetensors"):
            yield Finding(f"the manifest checks only {file.checked_bytes} of its {file.size} bytes", name)
    if METADATA_NAME not in manifest.files:
        yield Finding("is not in the manifest", METADATA_NAME)
    # Loaders take every safetensors file they find.
    for path in sorted(directory.glob("*.safetensors*")):
        if path.name not in manifest.files and path.name != NAME:
            yield Finding("lies in the directory, but is not in the manifest", path.name)


def _check_tensors(manifest: Manifest) -> Iterator[Finding]:
    scales = manifest.options.get("scales")
    if scales not in ("bf16", "exact"):
        yield Finding(f"option scales is {shortened(scales)}, expected bf16 or exact", NAME)
        return
    owners, names = dict[str, str](), set[str]()
    for tensor in manifest.tensors:
        if tensor.name in names:
            yield Finding("is listed twice", NAME, tensor.name)
        names.add(tensor.name)
        try:
            expected = arrays_of(
                tensor.name, tensor.type, tensor.shape, cast("Storage", tensor.storage), tensor.format
            )
        except ValueError as error:
            yield Finding(str(error), NAME, tensor.name)
            continue
        if tensor.format is not None and (chosen := row_of(tensor.type, scales).name) != tensor.format:
            problem = f"option scales {scales} gives {tensor.type} as {chosen}, found {tensor.format}"
            yield Finding(problem, NAME, tensor.name)
        if set(expected) != set(tensor.arrays):
            roles = ", ".join(sorted(expected)) or "none"
            found = ", ".join(sorted(tensor.arrays)) or "none"
            yield Finding(f"stored {tensor.storage}: expected arrays {roles}, found {found}", NAME, tensor.name)
        for role in sorted(set(expected) & set(tensor.arrays)):
            want, have = expected[role], tensor.arrays[role]
            if (want.key, want.dtype, list(want.shape)) != (have.key, have.dtype, have.shape):
                problem = (
                    f"expected {want.key} {want.dtype} {list(want.shape)}, "
                    f"found {have.key} {have.dtype} {have.shape}"
                )
                yield Finding(problem, NAME, tensor.name, role)
            if have.file not in manifest.files or not have.file.endswith(".safetensors"):
                yield Finding(f"lies in {have.file!r}, which is no shard of this bundle", NAME, tensor.name, role)
            if (owner := owners.setdefault(have.key, tensor.name)) != tensor.name:
                yield Finding(f"key {have.key!r} belongs to tensor {owner!r} already", NAME, tensor.name, role)
    for name, to in manifest.tied.items():
        if name in names or to not in names:
            yield Finding(f"{name!r} cannot be tied to {to!r}: one must be absent, the other present", NAME)


def _check_shard(
    path: Path, checked: int, expected: dict[str, tuple[StoredTensor, StoredArray]]
) -> Iterator[Finding]:
    try:
        entries = read_header(path)
    except ValueError as error:
        yield Finding(str(error), path.name)
        return
    first = min((entry.begin for entry in entries.values()), default=path.stat().st_size)
    if first != checked:
        yield Finding(f"the manifest checks a header of {checked} bytes, found {first}", path.name)
    for key, (tensor, array) in expected.items():
        entry = entries.get(key)
        if entry is None:
            yield Finding("is not in the shard", path.name, tensor.name, key)
        elif (entry.dtype, list(entry.shape)) != (array.dtype, array.shape):
            problem = f"expected {array.dtype} {array.shape}, found {entry.dtype} {list(entry.shape)}"
            yield Finding(problem, path.name, tensor.name, key)
    for key in entries:
        if key not in expected:
            yield Finding("is in the shard, but not in the manifest", path.name, None, key)


def _check_index(path: Path, by_file: Mapping[str, Iterable[str]]) -> Iterator[Finding]:
    if (size := path.stat().st_size) > MAX_INDEX:
        yield Finding(f"{size} bytes, more than the limit of {MAX_INDEX}", path.name)
        return
    try:
        with naming(path):
            raw = path.read_bytes()
        content = parse(raw)
        found = content["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        yield Finding(f"is not an index: {error}", path.name)
        return
    expected = {key: file for file, keys in by_file.items() for key in keys}
    if found != expected:
        where = (
            [k for k in {**expected, **found} if expected.get(k) != found.get(k)] if isinstance(found, dict) else []
        )
        says = f"says {shortened(found[where[0]]) if where[0] in found else 'nothing'}" if where else "is no map"
        problem = f"{says}, the manifest {expected.get(where[0])!r}" if where else says
        yield Finding(problem, path.name, None, where[0][:MAX_TEXT] if where else None)
