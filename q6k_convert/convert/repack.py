"""Q6_K, ggml's 6-bit format: one block decoded plainly, many blocks repacked fast.

Byte map of a block of 256 weights: ql:128 qh:64 scales:16 d:2 = 210 bytes. A block is two halves of
128 weights; weight 32j+l of a half (j = 0..3, l = 0..31) has its low nibble in `ql[32*(j%2) + l]` of
that half (low nibble for j < 2, high for the rest) and its high pair in bits 2j of `qh[l]`. A weight is
`d * scales[e // 16] * q` with d fp16, scales int8 and q the 6-bit code minus 32.
Source: block_q6_K and dequantize_row_q6_K in ggml.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from q6k_convert.errors import EnvironmentMissingError
from q6k_kernels.formats.ggml import GROUP, SUPER_BLOCK
from q6k_kernels.formats.types import DTYPE_BYTES, WeightType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BLOCK_BYTES = 210
SCALES_AT, D_AT = 192, 208
"""Where in a block the sub-scales and d lie."""
PATHS = {"portable": 0, "avx2": 1}
"""The ways the compiled repacker knows, by name."""

_EXTENSION = "q6k_convert.convert._repack"


def decode(blocks: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Q6_K blocks to integer weights and their scales, exactly.

    Args:
        blocks: uint8 (..., bytes), the last dimension a whole number of 210-byte blocks.

    Returns:
        q, int8 (..., K) with values -32..31, and scale, float32 (..., K/16), each d * sub-scale
        computed without rounding, so that `q * repeat(scale, 16)` in fp32 is ggml's dequantisation.

    Raises:
        ValueError: wrong dtype or a broken last block.
    """
    import numpy as np  # here, because a conversion can do without and starts sooner

    if blocks.dtype != np.uint8 or blocks.ndim == 0 or blocks.shape[-1] % BLOCK_BYTES:
        raise ValueError(
            f"expected uint8 (..., n * {BLOCK_BYTES}), found {blocks.dtype} {blocks.shape}: "
            "the last dimension holds whole Q6_K blocks"
        )
    lead = blocks.shape[:-1]
    weights = blocks.shape[-1] // BLOCK_BYTES * SUPER_BLOCK
    flat = np.ascontiguousarray(blocks).reshape(-1, BLOCK_BYTES)
    nibble_shifts, pair_shifts = np.array([0, 4], dtype=np.uint8), np.array([0, 2, 4, 6], dtype=np.uint8)
    # (block, half, nibble, 64) flattens to weight order: low nibbles of ql[0..63], then high ones.
    low = flat[:, None, :128].reshape(-1, 2, 1, 64) >> nibble_shifts[:, None] & 15
    high = flat[:, None, 128:192].reshape(-1, 2, 1, 32) >> pair_shifts[:, None] & 3
    u = low.reshape(-1, SUPER_BLOCK) | high.reshape(-1, SUPER_BLOCK) << 4
    q = u.view(np.int8) - np.int8(32)
    d = np.ascontiguousarray(flat[:, D_AT:]).view("<f2").astype(np.float32)
    with np.errstate(invalid="ignore"):  # an infinite d times a zero sub-scale
        scale = d * flat[:, SCALES_AT:D_AT].view(np.int8).astype(np.float32)
    return q.reshape(*lead, weights), scale.reshape(*lead, weights // GROUP)


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
    """The name in `PATHS` of the fastest repacking path this processor has."""
    best: int = _library().q6k_best_path()
    return next(name for name, code in PATHS.items() if code == best)


def array_bytes(row: WeightType) -> dict[str, int]:
    """Return the bytes that one block takes in each array of a weight type, by role."""
    return {array.role: row.block // array.weights * DTYPE_BYTES[array.dtype] for array in row.arrays}


def to_planes(blocks: Any, arrays: Mapping[str, Any], row: WeightType, path: str | None = None) -> int | None:
    """Repack blocks straight into the arrays of a bundle, in one pass; threads may run it at once.

    Args:
        blocks: n * 210 contiguous bytes: anything with the buffer protocol (a read-only one is copied).
        arrays: by role, contiguous writable buffers of n times `array_bytes(row)` bytes.
        row: the weight type: it says whether scales are d * sub-scale, rounded to nearest even, or both numbers.
        path: a name in `PATHS`; by default the fastest.

    Returns:
        The index of the first block whose d is NaN or infinite, None if there is none.

    Raises:
        ValueError: a buffer of the wrong size, type or layout.
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
