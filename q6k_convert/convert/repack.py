"""Repack GGUF blocks into the arrays of a bundle, or dequantise them, with compiled code, at the speed of the disk.

`q6k_kernels.formats.blocks` and `planes` define both in plain numpy; the tests compare the two.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from q6k_convert.errors import EnvironmentMissingError
from q6k_kernels.formats.blocks import ScaleNumber, block_bytes
from q6k_kernels.formats.ggml import TYPE_SIZES, GGMLType
from q6k_kernels.formats.types import DTYPE_BYTES, WeightType

PATHS = {"portable": 0, "avx2": 1, "neon": 2}
"""Code paths of the compiled repacker, by name. A processor has the portable one and at most one other."""

_EXTENSION = "q6k_convert.convert._repack"


@cache
def _library() -> ctypes.CDLL:
    spec = find_spec(_EXTENSION)
    if spec is None or spec.origin is None:
        raise EnvironmentMissingError(
            f"the compiled repacker {_EXTENSION} is not installed",
            "Install q6k-convert with a C compiler at hand: `pip install .` in its folder.",
        )
    library = ctypes.CDLL(spec.origin)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.q6k_best_path.restype = ctypes.c_int
    library.q6k_best_path.argtypes = []
    library.q6k_encode.restype = ctypes.c_int
    library.q6k_encode.argtypes = [ctypes.c_char_p, ctypes.c_int, pointer, number, pointer]
    library.q6k_first_with.restype = number
    library.q6k_first_with.argtypes = [pointer, number, number, ctypes.c_int, ctypes.c_uint64]
    return library


def best_path() -> str:
    """Return the name in `PATHS` of the fastest path that this processor supports."""
    best: int = _library().q6k_best_path()
    return next(name for name, code in PATHS.items() if code == best)


def array_bytes(row: WeightType) -> dict[str, int]:
    """Return the bytes that one block takes in each array of a weight type, by role."""
    return {array.role: row.block // array.weights * DTYPE_BYTES[array.dtype] for array in row.arrays}


def to_planes(blocks: Any, arrays: Mapping[str, Any], row: WeightType, path: str | None = None) -> None:
    """Repack blocks into the arrays of a bundle in one pass. Several threads may call it at once.

    Args:
        blocks: n contiguous blocks: anything with the buffer protocol (a read-only one is copied).
        arrays: by role, contiguous writable buffers of n times `array_bytes(row)` bytes.
        row: the weight type.
        path: a name in `PATHS`; by default the fastest.

    Raises:
        ValueError: a buffer has the wrong size, type or layout, or the repacker does not know the weight type.
        EnvironmentMissingError: the compiled repacker is missing, or lacks that path.
    """
    source, targets = _writable(blocks), {role: memoryview(array) for role, array in arrays.items()}
    count, rest = divmod(source.nbytes, block_bytes(row))
    sizes = {role: count * each for role, each in array_bytes(row).items()}
    found = {role: view.nbytes for role, view in targets.items()}
    plain = all(view.itemsize == 1 and view.c_contiguous for view in (source, *targets.values()))
    if rest or found != sizes or not plain or any(view.readonly for view in targets.values()):
        raise ValueError(
            f"{source.nbytes} bytes of {row.ggml} blocks need contiguous writable arrays of {sizes} bytes, "
            f"found {found}"
        )
    if not _encode(row.name, path, source, count, [targets[role] for role in sizes]):
        raise ValueError(f"the compiled repacker does not know the weight type {row.name}; install it again")


def dequantizes_natively(ggml: str) -> bool:
    """Return whether `dequantize` takes blocks of a GGML type: those that are worth it and have no weight type."""
    return _encode(ggml, None, memoryview(b""), 0, [])


def dequantize(blocks: Any, weights: Any, ggml: str, path: str | None = None) -> None:
    """Dequantise blocks to bf16: GGUF's fp32 weights, rounded to nearest even. Several threads may call it at once.

    Args:
        blocks: n contiguous blocks: anything with the buffer protocol (a read-only one is copied).
        weights: a contiguous writable buffer of 2 bytes for each weight.
        ggml: a GGML type that `dequantizes_natively` accepts.
        path: a name in `PATHS`; by default the fastest.

    Raises:
        ValueError: a buffer has the wrong size, type or layout, or the repacker does not dequantise the type.
        EnvironmentMissingError: the compiled repacker is missing, or lacks that path.
    """
    source, target = _writable(blocks), memoryview(weights)
    block, size = TYPE_SIZES[GGMLType[ggml]]
    count, rest = divmod(source.nbytes, size)
    plain = all(view.itemsize == 1 and view.c_contiguous for view in (source, target))
    if rest or target.nbytes != 2 * block * count or not plain or target.readonly:
        raise ValueError(
            f"{source.nbytes} bytes of {ggml} blocks need a contiguous writable buffer of {2 * block * count} "
            f"bytes, found {target.nbytes}"
        )
    if not _encode(ggml, path, source, count, [target]):
        raise ValueError(f"the compiled repacker does not dequantise {ggml}")


def _encode(name: str, path: str | None, source: memoryview, count: int, targets: Sequence[memoryview]) -> bool:
    """Call the compiled code; return whether it knows the type."""
    pointers = (ctypes.c_void_p * len(targets))(*map(_address, targets)) if count else None
    address = _address(source) if count else None
    failed: int = _library().q6k_encode(name.encode(), PATHS[path or best_path()], address, count, pointers)
    if failed == -2:
        raise EnvironmentMissingError(f"the repacker has no path {path!r} on this machine")
    return failed == 0


def first_nonfinite(blocks: Any, size: int, numbers: Sequence[ScaleNumber]) -> tuple[int, ScaleNumber] | None:
    """Find the first block with a scale that is NaN or infinite.

    Args:
        blocks: contiguous blocks: anything with the buffer protocol (a read-only one is copied).
        size: bytes of a block.
        numbers: the scales of a block, see `q6k_kernels.formats.blocks.STEPS`.

    Returns:
        The index of the block and the first such number in it; None if all are finite.

    Raises:
        ValueError: the last block is incomplete.
        EnvironmentMissingError: the compiled repacker is missing.
    """
    source = _writable(blocks)
    count, rest = divmod(source.nbytes, size)
    if rest:
        raise ValueError(f"expected whole blocks of {size} bytes, found {source.nbytes} bytes")
    found = None
    for number in numbers if count else ():
        words = _address(source) + number.at
        block: int = _library().q6k_first_with(words, count, size, number.size, number.mask)
        if block < count:  # the next numbers matter in earlier blocks only
            found, count = (block, number), block
    return found


def _writable(data: Any) -> memoryview:
    """Return the data's memory, or a copy of it if it is read-only, for ctypes takes no other."""
    view = memoryview(data)
    return memoryview(bytearray(view)) if view.readonly else view


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
