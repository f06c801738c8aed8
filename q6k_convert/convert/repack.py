"""Repack Q6_K blocks into the arrays of a bundle with compiled code, at the speed of the disk.

`q6k_kernels.formats.blocks` describes a block and decodes it in plain numpy; the tests compare the two.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from q6k_convert.errors import EnvironmentMissingError
from q6k_kernels.formats.blocks import BLOCK_BYTES
from q6k_kernels.formats.types import DTYPE_BYTES, WeightType

PATHS = {"portable": 0, "avx2": 1}
"""Code paths of the compiled repacker, by name."""

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
    pointer = ctypes.c_void_p
    library.q6k_best_path.restype = ctypes.c_int
    library.q6k_best_path.argtypes = []
    library.q6k_to_planes.restype = ctypes.c_int64
    library.q6k_to_planes.argtypes = [
        ctypes.c_int, pointer, ctypes.c_int64, ctypes.c_int, pointer, pointer, pointer, pointer
    ]  # fmt: skip
    return library


def best_path() -> str:
    """Return the name in `PATHS` of the fastest path that this processor supports."""
    best: int = _library().q6k_best_path()
    return next(name for name, code in PATHS.items() if code == best)


def array_bytes(row: WeightType) -> dict[str, int]:
    """Return the bytes that one block takes in each array of a weight type, by role."""
    return {array.role: row.block // array.weights * DTYPE_BYTES[array.dtype] for array in row.arrays}


def to_planes(blocks: Any, arrays: Mapping[str, Any], row: WeightType, path: str | None = None) -> int | None:
    """Repack blocks into the arrays of a bundle in one pass. Several threads may call it at once.

    Args:
        blocks: n * 210 contiguous bytes: anything with the buffer protocol (a read-only one is copied).
        arrays: by role, contiguous writable buffers of n times `array_bytes(row)` bytes.
        row: the weight type. Its scales are either d * sub-scale, rounded to nearest even, or both numbers apart.
        path: a name in `PATHS`; by default the fastest.

    Returns:
        The index of the first block whose d is NaN or infinite, None if there is none.

    Raises:
        ValueError: a buffer has the wrong size, type or layout.
        EnvironmentMissingError: the compiled repacker is missing, or lacks that path.
    """
    source, targets = memoryview(blocks), {suffix: memoryview(array) for suffix, array in arrays.items()}
    count, rest = divmod(source.nbytes, BLOCK_BYTES)
    sizes = {suffix: count * each for suffix, each in array_bytes(row).items()}
    found = {suffix: view.nbytes for suffix, view in targets.items()}
    plain = all(view.itemsize == 1 and view.c_contiguous for view in (source, *targets.values()))
    if rest or found != sizes or not plain or any(view.readonly for view in targets.values()):
        raise ValueError(
            f"{source.nbytes} bytes of blocks need contiguous writable arrays of {sizes} bytes, found {found}"
        )
    if not count:
        return None
    buffers = [bytearray(source) if source.readonly else source]
    buffers += [targets[suffix] for suffix in row.roles]
    pointers = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in buffers]
    result: int = _library().q6k_to_planes(
        PATHS[path or best_path()], pointers[0], count, int(row.stepped), *pointers[1:4],
        pointers[4] if row.stepped else None,
    )  # fmt: skip
    if result == -2:
        raise EnvironmentMissingError(f"the repacker has no path {path!r} on this machine")
    return None if result < 0 else result
