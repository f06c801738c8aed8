"""The CUDA driver (libcuda) through ctypes: what it takes to load a cubin and to launch its kernels.

torch has the driver loaded and a context of every GPU it uses, the primary one; everything here goes to
that context, so memory and streams are shared with torch. A call that fails raises `DriverCallError` with the
driver's own words.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache, lru_cache
from typing import Literal

from q6k_kernels.errors import DriverCallError, DriverMissingError, GpuMissingError
from q6k_kernels.jit.abi import (
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
    CU_STREAM_CAPTURE_MODE_RELAXED,
    CU_TENSOR_MAP_DATA_TYPE,
    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    CU_TENSOR_MAP_INTERLEAVE_NONE,
    CU_TENSOR_MAP_ITEM_BYTES,
    CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
    CU_TENSOR_MAP_SWIZZLE,
    CUDA_ERROR_NO_DEVICE,
    CUDA_ERRORS_OF_EARLIER_KERNELS,
    CUDA_SUCCESS,
    SIGNATURES,
    TENSOR_MAP_ALIGNMENT,
    TENSOR_MAP_BYTES,
)

LIBRARY = "libcuda.so.1"
"""The driver's shared library, found by the dynamic linker."""
OLDEST = (12, 0)
"""CUDA version that a driver must support: the first with libraries independent of a context."""

_UPDATE = "Install NVIDIA's driver 525 or later (CUDA 12.0); `nvidia-smi` shows which one is there."


@cache
def library() -> ctypes.CDLL:
    """libcuda, initialised, every function that is used declared.

    Raises:
        DriverMissingError: there is none, or it is older than `OLDEST`.
        GpuMissingError: it has no GPU to drive.
        DriverCallError: it does not initialise.
    """
    version()
    found = _loaded()
    if (code := found.cuInit(0)) == CUDA_ERROR_NO_DEVICE:
        raise GpuMissingError("the NVIDIA driver finds no GPU", "Run where `nvidia-smi` lists one.")
    check(code, "cuInit")
    return found


@cache
def _loaded() -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DriverMissingError(f"the NVIDIA driver does not load: {error}", _UPDATE) from error
    for name, arguments in SIGNATURES.items():
        try:
            function = getattr(found, name)
        except AttributeError:
            raise DriverMissingError(f"the NVIDIA driver is too old: it has no {name}", _UPDATE) from None
        function.argtypes, function.restype = arguments, c_int
    return found


def check(code: int, function: str, what: str = "") -> None:
    """Raises DriverCallError unless `code`, returned by `function` called for `what`, is success."""
    if code == CUDA_SUCCESS:
        return
    found, name, text = _loaded(), c_char_p(), c_char_p()
    found.cuGetErrorName(code, byref(name))
    found.cuGetErrorString(code, byref(text))
    label, words = (name.value or b"CUresult").decode(), (text.value or b"unknown to this driver").decode()
    cause = f"{function}{f' for {what}' if what else ''} failed: {label} ({code}), {words}"
    if code in CUDA_ERRORS_OF_EARLIER_KERNELS:
        remedy = (
            "A kernel launched earlier failed, ours or another; restart the process, and set "
            "CUDA_LAUNCH_BLOCKING=1 to see which."
        )
    else:
        remedy = "`q6k-convert doctor` says what works on this machine."
    raise DriverCallError(cause, remedy, code)


def version() -> tuple[int, int]:
    """The newest CUDA version that the driver supports, (major, minor); it takes no GPU.

    Raises:
        DriverMissingError: there is no driver, or it is older than `OLDEST`.
    """
    number = c_int()
    check(_loaded().cuDriverGetVersion(byref(number)), "cuDriverGetVersion")
    found = number.value // 1000, number.value % 1000 // 10
    if found < OLDEST:
        raise DriverMissingError(
            f"the NVIDIA driver is too old: it supports CUDA {found[0]}.{found[1]}, "
            f"needed is {OLDEST[0]}.{OLDEST[1]}",
            _UPDATE,
        )
    return found


def device_count() -> int:
    """How many GPUs there are. Raises like `library`."""
    count = c_int()
    check(library().cuDeviceGetCount(byref(count)), "cuDeviceGetCount")
    return count.value


@cache
def device_handle(device: int) -> int:
    """The CUdevice of an ordinal, which counts like torch's. Raises like `library`."""
    handle = c_int()
    check(library().cuDeviceGet(byref(handle), device), "cuDeviceGet", f"GPU {device}")
    return handle.value


def device_name(device: int) -> str:
    """As `nvidia-smi` has it."""
    name = ctypes.create_string_buffer(256)
    check(library().cuDeviceGetName(name, len(name), device_handle(device)), "cuDeviceGetName", f"GPU {device}")
    return name.value.decode(errors="replace")


def device_memory(device: int) -> int:
    """Its memory in bytes."""
    total = c_size_t()
    check(library().cuDeviceTotalMem_v2(byref(total), device_handle(device)), "cuDeviceTotalMem", f"GPU {device}")
    return total.value


def device_attribute(device: int, attribute: int) -> int:
    """The value of one of CU_DEVICE_ATTRIBUTE_*."""
    value = c_int()
    code = library().cuDeviceGetAttribute(byref(value), attribute, device_handle(device))
    check(code, "cuDeviceGetAttribute", f"GPU {device}")
    return value.value


@cache
def most_shared_bytes(device: int) -> int:
    """Shared memory that a block may have, static and dynamic together, once it is permitted."""
    return device_attribute(device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)


@cache
def capability(device: int) -> tuple[int, int]:
    """Its compute capability, (major, minor)."""
    return (
        device_attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
        device_attribute(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    )


_retain = threading.Lock()


def primary_context(device: int) -> int:
    """The context that torch uses on a GPU, made if need be and kept until the process ends."""
    with _retain:
        return _primary_context(device)


@cache
def _primary_context(device: int) -> int:
    context = c_void_p()
    code = library().cuDevicePrimaryCtxRetain(byref(context), device_handle(device))
    check(code, "cuDevicePrimaryCtxRetain", f"GPU {device}")
    if context.value is None:
        raise DriverCallError(f"cuDevicePrimaryCtxRetain for GPU {device} returned no context", _UPDATE, code)
    return context.value


@contextmanager
def current(context: int) -> Iterator[None]:
    """Makes a context the calling thread's, and the one before afterwards."""
    driver = library()
    check(driver.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent")
    try:
        yield
    finally:
        check(driver.cuCtxPopCurrent_v2(byref(c_void_p())), "cuCtxPopCurrent")


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Lets the calling thread load code while it, or another, captures a CUDA graph."""
    driver, mode = library(), c_int(CU_STREAM_CAPTURE_MODE_RELAXED)
    check(driver.cuThreadExchangeStreamCaptureMode(byref(mode)), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        check(driver.cuThreadExchangeStreamCaptureMode(byref(mode)), "cuThreadExchangeStreamCaptureMode")


def load_library(cubin: bytes, what: str) -> int:
    """A CUlibrary, which serves every GPU of the cubin's architecture. `what` is for the error."""
    handle = c_void_p()
    check(
        library().cuLibraryLoadData(byref(handle), cubin, None, None, 0, None, None, 0), "cuLibraryLoadData", what
    )
    return handle.value or 0


def find_kernel(loaded: int, name: str) -> int:
    """The CUkernel of that name in a CUlibrary."""
    handle = c_void_p()
    check(library().cuLibraryGetKernel(byref(handle), loaded, name.encode()), "cuLibraryGetKernel", name)
    return handle.value or 0


def load_function(kernel: int, what: str) -> int:
    """The CUfunction of a CUkernel in the current context, its code on the GPU."""
    handle = c_void_p()
    check(library().cuKernelGetFunction(byref(handle), kernel), "cuKernelGetFunction", what)
    return handle.value or 0


def function_attribute(function: int, attribute: int, what: str) -> int:
    """The value of one of CU_FUNC_ATTRIBUTE_*; `what` is for the error."""
    value = c_int()
    check(library().cuFuncGetAttribute(byref(value), attribute, function), "cuFuncGetAttribute", what)
    return value.value


def set_function_attribute(function: int, attribute: int, value: int, what: str) -> None:
    """Sets one of CU_FUNC_ATTRIBUTE_*; `what` is for the error."""
    check(library().cuFuncSetAttribute(function, attribute, value), "cuFuncSetAttribute", f"{what} to {value}")


@lru_cache(maxsize=1024)
def encode_tensor_map(
    pointer: int,
    dtype: Literal["uint8", "bf16", "fp16"],
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle_bytes: int = 0,
) -> bytes:
    """A CUtensorMap, for a kernel's `const __grid_constant__` parameter.

    A copy brings a box of the tensor into shared memory, zeros where it reaches out of the tensor.

    Args:
        pointer: address of the first element, a multiple of 16.
        dtype: "uint8", "bf16" or "fp16".
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
    item = CU_TENSOR_MAP_ITEM_BYTES.get(dtype, 1)
    width, box_bytes = sizes[0] * item, box[0] * item
    rules = (
        ("dtype", dtype, "one of " + ", ".join(CU_TENSOR_MAP_DATA_TYPE), dtype in CU_TENSOR_MAP_DATA_TYPE),
        ("swizzle_bytes", swizzle_bytes, "0, 32, 64 or 128", swizzle_bytes in CU_TENSOR_MAP_SWIZZLE),
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
    storage = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
    offset = -ctypes.addressof(storage) % TENSOR_MAP_ALIGNMENT
    code = library().cuTensorMapEncodeTiled(
        ctypes.addressof(storage) + offset,
        CU_TENSOR_MAP_DATA_TYPE[dtype],
        rank,
        pointer,
        (c_uint64 * rank)(*sizes),
        (c_uint64 * (rank - 1))(*strides),
        (c_uint32 * rank)(*box),
        (c_uint32 * rank)(*(1 for _ in box)),
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE[swizzle_bytes],
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    check(code, "cuTensorMapEncodeTiled", f"{dtype} {sizes}")
    return storage.raw[offset : offset + TENSOR_MAP_BYTES]
