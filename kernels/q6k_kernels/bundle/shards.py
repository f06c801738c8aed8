"""The shards of a bundle: safetensors files laid out before a byte is written.

    file    = header_length:u64  header  data
    header  = compact JSON, space-padded so that data begins at a multiple of 8:
              {"__metadata__": {"format": "pt"}, key: {"dtype", "shape", "data_offsets": [begin, end]}, …}
    data    = the arrays back to back in header order, no holes, each aligned to its dtype

Arrays of wider dtypes come first; since every array is a whole number of elements, that alone aligns
all of them. The safetensors library has no streaming writer, hence this one: it fixes every offset in
advance, so that pieces can be written in any order by any number of threads.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1
}  # fmt: skip
"""safetensors dtype -> bytes an element, for the dtypes a bundle uses."""

MAX_SHARDS = 99_999
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array to be stored: its key, safetensors dtype and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """The layout of one safetensors file.

    Attributes:
        header: everything before the data, length field included.
        offsets: key -> first byte of the array in the file.
        size: size of the whole file in bytes.
    """

    name: str
    arrays: tuple[ArraySpec, ...]
    header: bytes
    offsets: dict[str, int]
    size: int


def lay_out(name: str, arrays: Iterable[ArraySpec]) -> Shard:
    """Order the arrays of a file and fix their offsets and the header."""
    ordered = tuple(sorted(arrays, key=lambda a: -DTYPE_BYTES[a.dtype]))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, begins = 0, dict[str, int]()
    for array in ordered:
        begins[array.key] = at
        end = at + array.nbytes
        entries[array.key] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    offsets = {key: len(header) + begin for key, begin in begins.items()}
    return Shard(name, ordered, header, offsets, len(header) + at)


def plan_shards(groups: Sequence[Sequence[ArraySpec]], max_bytes: int) -> list[Shard]:
    """Distribute groups of arrays over as few files as their order allows.

    A group (the arrays of one tensor) is never split, so a group larger than `max_bytes` has a file to
    itself. One file is called `model.safetensors`, several `model-00001-of-0000N.safetensors`.

    Args:
        groups: arrays that belong together, in the order they will be written.
        max_bytes: data bytes a file may hold.

    Raises:
        ValueError: the arrays would take more than 99,999 files.
    """
    files: list[list[ArraySpec]] = [[]]
    filled = 0
    for group in groups:
        size = sum(array.nbytes for array in group)
        if files[-1] and filled + size > max_bytes:
            files.append([])
            filled = 0
        files[-1].extend(group)
        filled += size
    if len(files) > MAX_SHARDS:
        raise ValueError(f"{len(files)} shards of at most {max_bytes} bytes, more than {MAX_SHARDS}")
    if len(files) == 1:
        return [lay_out(SINGLE_NAME, files[0])]
    return [
        lay_out(f"model-{number:05}-of-{len(files):05}.safetensors", arrays)
        for number, arrays in enumerate(files, 1)
    ]


def index_json(shards: Sequence[Shard]) -> bytes:
    """Return `model.safetensors.index.json`: which file holds which key (Hugging Face's convention)."""
    weight_map = {array.key: shard.name for shard in shards for array in shard.arrays}
    total = sum(array.nbytes for shard in shards for array in shard.arrays)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=1, ensure_ascii=False).encode() + b"\n"
