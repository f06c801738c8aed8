"""Tensor maps: what a GPU of compute capability 9.0 or later needs to copy boxes of a tensor by itself.

cuTensorMapEncodeTiled is called by its address, not through its function in `cuda.bindings`: it takes a
CUtensorMap at a multiple of 64 bytes, and that of the bindings lies where Python's allocator puts it, at a
multiple of 16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import CFUNCTYPE, POINTER, c_int, c_uint32, c_uint64, c_void_p
from functools import cache, lru_cache
from typing import Any, Literal

from q6k_kernels.jit import driver

TYPES = {"uint32": ("UINT32", 4), "fp16": ("FLOAT16", 2), "bf16": ("BFLOAT16", 2)}
"""The end of CU_TENSOR_MAP_DATA_TYPE_*, and the bytes of an element."""
SWIZZLES = {0: "NONE", 32: "32B", 64: "64B", 128: "128B"}
"""The end of CU_TENSOR_MAP_SWIZZLE_*, by the bytes of a swizzled line."""
BYTES = 128
ALIGNMENT = 128
"""64 in CUDA 12, 128 since."""

_EncodeTiled = CFUNCTYPE(
    c_int,
    c_void_p,
    c_int,
    c_uint32,
    c_void_p,
    *(POINTER(c_uint64),) * 2,
    *(POINTER(c_uint32),) * 2,
    *(c_int,) * 4,
)


@cache
def _encode_tiled() -> Any:
    major, minor = driver.OLDEST
    address = driver.call("cuGetProcAddress", b"cuTensorMapEncodeTiled", 1000 * major + 10 * minor, 0)
    return _EncodeTiled(address)


@lru_cache(maxsize=1024)
def encode(
    pointer: int,
    dtype: Literal["uint32", "bf16", "fp16"],
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle_bytes: int = 0,
) -> bytes:
    """Encode a CUtensorMap, for a kernel's `const __grid_constant__` parameter.

    A copy brings a box of the tensor into shared memory, zeros where it reaches out of the tensor.

    Args:
        pointer: address of the first element, a multiple of 16.
        dtype: "uint32", "bf16" or "fp16".
        sizes: of the tensor, 2 to 5 dimensions, the contiguous one first: elements.
        strides: of all dimensions but the first: bytes, multiples of 16.
        box: its size in each dimension, at most 256; in the first a multiple of 16 bytes, and no more than
            `swizzle_bytes` unless that is 0.
        swizzle_bytes: 0, 32, 64 or 128.

    Returns:
        128 bytes.

    Raises:
        ValueError: an argument breaks a rule of cuTensorMapEncodeTiled.
        DriverCallError: the driver finds another reason.
    """
    rank, sizes, strides, box = len(sizes), tuple(sizes), tuple(strides), tuple(box)
    type_name, item = TYPES.get(dtype, ("", 1))
    width, box_bytes = sizes[0] * item, box[0] * item
    rules = (
        ("dtype", dtype, "one of " + ", ".join(TYPES), dtype in TYPES),
        ("swizzle_bytes", swizzle_bytes, "0, 32, 64 or 128", swizzle_bytes in SWIZZLES),
        ("pointer", pointer, "a multiple of 16", pointer % 16 == 0),
        ("sizes", sizes, "2 to 5 numbers", 2 <= rank <= 5),
        ("strides", strides, "one less than sizes", len(strides) == rank - 1),
        ("box", box, "as many as sizes", len(box) == rank),
        ("sizes", sizes, "1 to 2**32 each", all(0 < size <= 1 << 32 for size in sizes)),
        (
            "strides",
            strides,
            "multiples of 16 below 2**40, at least a row",
            all(stride % 16 == 0 and width <= stride < 1 << 40 for stride in strides),
        ),
        ("box", box, "1 to 256 each", all(0 < size <= 256 for size in box)),
        ("box", box, "a multiple of 16 bytes first", box_bytes % 16 == 0),
        ("box", box, f"at most {swizzle_bytes} bytes first", not 0 < swizzle_bytes < box_bytes),
    )
    for name, value, expected, holds in rules:
        if not holds:
            raise ValueError(f"tensor map: {name}: expected {expected}, found {value}")
    cuda = driver.library()
    storage = ctypes.create_string_buffer(BYTES + ALIGNMENT)
    offset = -ctypes.addressof(storage) % ALIGNMENT
    code = _encode_tiled()(
        ctypes.addressof(storage) + offset,
        getattr(cuda.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{type_name}"),
        rank,
        pointer,
        (c_uint64 * rank)(*sizes),
        (c_uint64 * (rank - 1))(*strides),
        (c_uint32 * rank)(*box),
        (c_uint32 * rank)(*(1 for _ in box)),
        cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(cuda.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{SWIZZLES[swizzle_bytes]}"),
        cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,  # zeros, that is, and not NaN
    )
    driver.check(cuda.CUresult(code), "cuTensorMapEncodeTiled", f"{dtype} {sizes}")
    return storage.raw[offset : offset + BYTES]
