"""The tensor list of a GGUF file: records parsed, bounded, placed, and checked for overlap.

    tensor  = name:string  n_dims:u32  dim:u64 * n_dims (fastest first)  type:u32  offset:u64

`offset` counts from the start of the data section, which begins at the first multiple of
`general.alignment` after the last tensor record.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from itertools import pairwise

from q6k_kernels.formats.ggml import REMOVED_TYPES, TYPE_SIZES, GGMLType
from q6k_kernels.gguf.bytes import Cursor, SourceBytes

MAX_NAME_BYTES = 63  # GGML_MAX_NAME counts a closing zero
MAX_DIMS = 4
MAX_BYTES = (1 << 63) - 1

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_REST = [struct.Struct(f"<{n_dims}QIQ") for n_dims in range(MAX_DIMS + 1)]


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor as the file lists it.

    Attributes:
        shape: torch order (GGUF's dimensions reversed), so a weight is (N, K) or (E, N, K).
        offset: first byte, from the start of the file.
        nbytes: size in the file, padding excluded.
        record_at: byte at which the record begins, for messages.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    record_at: int

    @property
    def weights(self) -> int:
        """Number of elements."""
        block_weights, block_bytes = TYPE_SIZES[self.type]
        return self.nbytes // block_bytes * block_weights


def read_tensors(cursor: Cursor, count: int, alignment: int) -> list[TensorRecord]:
    """Read and check the tensors, sorted by position of their data; the cursor stands at the first record."""
    file, records, seen = cursor.file, list[TensorRecord](), dict[str, int]()
    for index in range(count):
        record = _read_tensor(cursor, index)
        if record.name in seen:
            raise file.reject(
                f"tensor {record.name!r}",
                f"appears twice, first at byte {seen[record.name]}",
                record.record_at,
            )
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
            f"name of tensor {index}", f"{name!r} is empty, reserved or has control characters", start
        )
    at = cursor.at
    n_dims = cursor.number("I", item)
    if n_dims > MAX_DIMS:
        raise file.reject(item, f"{n_dims} dimensions, more than {MAX_DIMS}", at)
    at = cursor.at
    *dims, number, offset = _REST[n_dims].unpack(cursor.take(_REST[n_dims].size, item))
    weights = 1
    for dim in dims:
        weights *= dim
        if dim == 0 or weights > MAX_BYTES:
            raise file.reject(item, f"dimensions {list(dims)} are zero or overflow 2^63 weights", at)
    at += 8 * n_dims
    if number not in GGMLType._value2member_map_:
        what = (
            f"type {number} ({REMOVED_TYPES[number]}) was removed from ggml"
            if number in REMOVED_TYPES
            else f"unknown tensor type {number}"
        )
        raise file.reject(item, what, at, remedy="Quantise the model again with a current llama.cpp.")
    kind = GGMLType(number)
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
        if first + r.nbytes > file.size:
            raise file.reject(
                item,
                f"{r.nbytes} bytes of data at byte {first} reach past the end of the file ({file.size})",
                r.record_at,
                remedy="The download stopped early or the file is damaged: fetch it again.",
            )
        placed.append(TensorRecord(r.name, r.type, r.shape, first, r.nbytes, r.record_at))
    placed.sort(key=lambda r: r.offset)
    for before, after in pairwise(placed):
        if before.offset + before.nbytes > after.offset:
            raise file.reject(
                f"tensor {after.name!r}",
                f"its data at byte {after.offset} overlaps that of {before.name!r}, which ends at byte "
                f"{before.offset + before.nbytes}",
                after.record_at,
            )
    return placed
