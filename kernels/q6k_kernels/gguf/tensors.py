"""The tensor list of a GGUF file: records parsed, bounded, placed, and checked for overlap.

    tensor  = name:string  n_dims:u32  dim:u64 * n_dims (fastest first)  type:u32  offset:u64

`offset` counts from the start of the data section, which begins at the first multiple of
`general.alignment` after the last tensor record. ggml itself stops at 4 dimensions and names of 63 bytes; files of
other programs, diffusion models above all, have more.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, replace
from itertools import pairwise

from q6k_kernels.formats.ggml import TYPE_SIZES, GGMLType, UnknownType, type_of
from q6k_kernels.gguf.bytes import Cursor, SourceBytes

MAX_NAME_BYTES = 255
MAX_NAMES_BYTES = 1 << 20
"""Limit of all names together: it bounds the headers and the manifest of a bundle, which repeat them."""
MAX_DIMS = 8
MAX_BYTES = (1 << 63) - 1

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_REST = [struct.Struct(f"<{n_dims}QIQ") for n_dims in range(MAX_DIMS + 1)]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor as the file lists it.

    Attributes:
        shape: torch order (GGUF's dimensions reversed), so a weight is (N, K) or (E, N, K). A dimension may be 0.
        offset: first byte, from the start of the file.
        nbytes: size in the file, padding excluded; of an unknown type all bytes up to the next tensor.
        record_at: byte at which the record begins, for messages.
    """

    name: str
    type: GGMLType | UnknownType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    record_at: int

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def block(self) -> tuple[int, int]:
        """Weights and bytes of a block; of an unknown type 1 and 1, to count bytes only."""
        return (1, 1) if isinstance(self.type, UnknownType) else TYPE_SIZES[self.type]


def read_tensors(cursor: Cursor, count: int, alignment: int) -> list[TensorRecord]:
    """Read and check the tensors, sorted by position of their data; the cursor stands at the first record."""
    file, records, seen, names = cursor.file, list[TensorRecord](), dict[str, int](), 0
    for index in range(count):
        record = _read_tensor(cursor, index)
        if record.name in seen:
            raise file.reject(
                f"tensor {record.name!r}",
                f"appears twice, first at byte {seen[record.name]}",
                record.record_at,
            )
        names += len(record.name.encode())
        if names > MAX_NAMES_BYTES:
            raise file.beyond("names of tensors", f"{names} bytes", MAX_NAMES_BYTES, record.record_at)
        seen[record.name] = record.record_at
        records.append(record)
    data_offset = -(-cursor.at // alignment) * alignment
    return _placed(file, records, data_offset, alignment)


def _read_tensor(cursor: Cursor, index: int) -> TensorRecord:
    """Read one record, its offset still relative to the data section."""
    file, start = cursor.file, cursor.at
    name = cursor.string(f"name of tensor {index}", MAX_NAME_BYTES)
    item = f"tensor {name!r}"
    if not name or name == "__metadata__" or _CONTROL.search(name):
        raise file.reject(
            f"name of tensor {index}",
            f"{name!r} is empty, reserved or has control characters",
            start,
            remedy="Export the model with another name: safetensors cannot hold this one safely.",
        )
    at = cursor.at
    n_dims = cursor.number("I", item)
    if n_dims > MAX_DIMS:
        raise file.beyond(item, f"{n_dims} dimensions", MAX_DIMS, at)
    at = cursor.at
    *dims, number, offset = _REST[n_dims].unpack(cursor.take(_REST[n_dims].size, item))
    # Without zeros, which would hide that the others overflow.
    if math.prod(dim for dim in dims if dim) > MAX_BYTES:
        raise file.reject(item, f"dimensions {list(dims)} overflow 2^63 weights", at)
    weights = math.prod(dims)
    kind = type_of(number)
    if isinstance(kind, UnknownType):
        return TensorRecord(name, kind, tuple(reversed(dims)), offset, min(weights, 1), start)
    block_weights, block_bytes = TYPE_SIZES[kind]
    row = dims[0] if dims else 1
    if row % block_weights:
        raise file.reject(
            item, f"{kind.name} rows must be a multiple of {block_weights} weights, found {row}", start
        )
    nbytes = weights // block_weights * block_bytes
    if nbytes > MAX_BYTES:
        raise file.reject(item, f"dimensions {list(dims)} overflow 2^63 bytes", start)
    return TensorRecord(name, kind, tuple(reversed(dims)), offset, nbytes, start)


def _placed(file: SourceBytes, records: list[TensorRecord], data_offset: int, alignment: int) -> list[TensorRecord]:
    """Return the records with absolute offsets, in file order of their data, none overlapping."""
    placed = list[TensorRecord]()
    for r in records:
        item = f"tensor {r.name!r}"
        if r.offset % alignment:
            raise file.reject(
                item, f"offset {r.offset} is not a multiple of the alignment {alignment}", r.record_at
            )
        first = data_offset + r.offset
        # An empty tensor may come last, behind padding that the file lacks.
        if r.nbytes and first + r.nbytes > file.size:
            raise file.reject(
                item,
                f"{r.nbytes} bytes of data at byte {first} reach past the end of the file ({file.size})",
                r.record_at,
                remedy="The download stopped early or the file is damaged: fetch it again.",
            )
        placed.append(replace(r, offset=first if r.nbytes else min(first, file.size)))
    placed.sort(key=lambda r: (r.offset, r.nbytes))
    for before, after in pairwise(placed):
        if before.offset + before.nbytes > after.offset:
            raise file.reject(
                f"tensor {after.name!r}",
                f"its data at byte {after.offset} overlaps that of {before.name!r}, which ends at byte "
                f"{before.offset + before.nbytes}",
                after.record_at,
            )
    return _extended(placed, file.size)


def _extended(placed: list[TensorRecord], end: int) -> list[TensorRecord]:
    """Return the records, those of unknown types with all bytes up to the next tensor or the end of the file."""
    extended = list[TensorRecord]()
    for r in reversed(placed):
        unknown = isinstance(r.type, UnknownType) and r.nbytes
        extended.append(replace(r, nbytes=end - r.offset) if unknown else r)
        end = r.offset
    return extended[::-1]
