"""The CUDA driver: what it takes to load a cubin and to launch its kernels.

Calls, structures and values are those of NVIDIA's own bindings, `cuda.bindings.driver`, which find libcuda where
the dynamic linker does. They take about 0.1 s to import, so that happens with the first call. torch has the
driver loaded and a context of every GPU it uses, the primary one; everything here goes to that context, so
memory and streams are shared with torch. A call that fails raises `DriverCallError` with the driver's own words.

Launches go through the bindings as well: with a driver that does nothing, `loader.Kernel.launch` takes 2.0
microseconds, and with calls and prepared structures of ctypes in their place 2.1.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from q6k_kernels.errors import DriverCallError, DriverMissingError, GpuMissingError

OLDEST = (12, 0)
"""CUDA version that a driver must support: the first with libraries independent of a context."""
ERRORS_OF_EARLIER_KERNELS = {
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
}
"""The context is lost, and the call that reports it is not to blame."""
_UPDATE = "Install NVIDIA's driver 525 or later (CUDA 12.0); `nvidia-smi` shows which one is there."
_INSTALL = "A torch for CUDA brings it along; else `pip install cuda-bindings`."


@cache
def bindings() -> Any:
    """Import `cuda.bindings.driver`.

    Raises:
        DriverMissingError: it is not installed, or does not load.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DriverMissingError(
            f"cuda-bindings, which calls the NVIDIA driver, is not installed or does not load: {error}", _INSTALL
        ) from error
    return driver


@cache
def library() -> Any:
    """Initialise the driver, and return its bindings.

    Raises:
        DriverMissingError: there is no driver, it is older than `OLDEST`, or cuda-bindings is missing.
        GpuMissingError: it has no GPU to drive.
        DriverCallError: it does not initialise.
    """
    version()
    try:
        _call("cuInit", 0)
    except DriverCallError as error:
        if error.result != "CUDA_ERROR_NO_DEVICE":
            raise
        raise GpuMissingError("the NVIDIA driver finds no GPU", "Run where `nvidia-smi` lists one.") from error
    return bindings()


def _call(function: str, *arguments: Any, what: str = "") -> Any:
    """Call a function of the driver, for `what`, and return the first of its results, if it has any."""
    called = getattr(bindings(), function)
    try:
        code, *results = called(*arguments)
    except RuntimeError as error:  # what the bindings raise without libcuda, or without the function in it
        reason = " ".join(str(error).split()).rstrip(".")
        raise DriverMissingError(f"the NVIDIA driver does not load or is too old: {reason}", _UPDATE) from error
    except (KeyError, ValueError) as error:  # the driver is newer than the bindings, and so is its error
        raise _failure(function, what, "CUresult", f"{error}, unknown to cuda-bindings") from error
    check(code, function, what)
    return results[0] if results else None


def check(code: Any, function: str, what: str = "") -> None:
    """Raise DriverCallError unless the CUresult that `function` returned, called for `what`, is success."""
    if code:
        _, text = bindings().cuGetErrorString(code)
        words = text.decode() if text else "unknown to this driver"
        raise _failure(function, what, code.name, f"{code.name} ({int(code)}), {words}")


def _failure(function: str, what: str, result: str, words: str) -> DriverCallError:
    if result in ERRORS_OF_EARLIER_KERNELS:
        remedy = (
            "A kernel launched earlier failed, ours or another; restart the process, and set "
            "CUDA_LAUNCH_BLOCKING=1 to see which."
        )
    else:
        remedy = "`q6k-convert doctor` says what works on this machine."
    return DriverCallError(f"{function}{f' for {what}' if what else ''} failed: {words}", remedy, result)


def version() -> tuple[int, int]:
    """Return the newest CUDA version that the driver supports, (major, minor); it takes no GPU.

    Raises:
        DriverMissingError: there is no driver, it is older than `OLDEST`, or cuda-bindings is missing.
    """
    number = _call("cuDriverGetVersion")
    found = number // 1000, number % 1000 // 10
    if found < OLDEST:
        raise DriverMissingError(
            f"the NVIDIA driver is too old: it supports CUDA {found[0]}.{found[1]}, "
            f"needed is {OLDEST[0]}.{OLDEST[1]}",
            _UPDATE,
        )
    return found


def call(function: str, *arguments: Any, what: str = "") -> Any:
    """Call a function of the initialised driver.

    Args:
        function: its name in `cuda.bindings.driver`.
        arguments: what it takes there; a handle may be an integer.
        what: what it is called for, named in errors.

    Returns:
        The first of its results; None if it has none.

    Raises:
        DriverCallError: it fails. Otherwise as `library`.
    """
    library()
    return _call(function, *arguments, what=what)


def device_count() -> int:
    """Count the GPUs. Raises like `library`."""
    return int(call("cuDeviceGetCount"))


@cache
def device_handle(device: int) -> int:
    """Return the CUdevice of an ordinal, which counts like torch's. Raises like `library`."""
    return int(call("cuDeviceGet", device, what=f"GPU {device}"))


def device_name(device: int) -> str:
    """Return a GPU's name as `nvidia-smi` has it."""
    name: bytes = call("cuDeviceGetName", 256, device_handle(device), what=f"GPU {device}")
    return name.partition(b"\0")[0].decode(errors="replace")


def device_memory(device: int) -> int:
    """Return the memory of a GPU in bytes."""
    return int(call("cuDeviceTotalMem", device_handle(device), what=f"GPU {device}"))


def device_attribute(device: int, attribute: str) -> int:
    """Return the value of an attribute, named as CU_DEVICE_ATTRIBUTE_*."""
    which = getattr(library().CUdevice_attribute, attribute)
    return int(call("cuDeviceGetAttribute", which, device_handle(device), what=f"GPU {device}"))


@cache
def most_shared_bytes(device: int) -> int:
    """Return how much shared memory a block may have, static and dynamic together, once it is permitted."""
    return device_attribute(device, "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")


@cache
def capability(device: int) -> tuple[int, int]:
    """Return the compute capability of a GPU, (major, minor)."""
    return (
        device_attribute(device, "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR"),
        device_attribute(device, "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR"),
    )


@cache
def launches_cooperatively(device: int) -> bool:
    """Return whether a GPU can promise that all blocks of a launch run at the same time."""
    return device_attribute(device, "CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH") == 1


_retain = threading.Lock()


def primary_context(device: int) -> int:
    """Return the context that torch uses on a GPU, made if need be and kept until the process ends."""
    with _retain:
        return _primary_context(device)


@cache
def _primary_context(device: int) -> int:
    return int(call("cuDevicePrimaryCtxRetain", device_handle(device), what=f"GPU {device}"))


@contextmanager
def current(context: int) -> Iterator[None]:
    """Make a context the calling thread's, and restore the one before afterwards."""
    call("cuCtxPushCurrent", context)
    try:
        yield
    finally:
        call("cuCtxPopCurrent")


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Let the calling thread load code while it, or another, captures a CUDA graph."""
    relaxed = library().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = call("cuThreadExchangeStreamCaptureMode", relaxed)
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", before)


def load_library(cubin: bytes, what: str) -> int:
    """Load a cubin, and return its CUlibrary, which serves every GPU of the architecture."""
    return int(call("cuLibraryLoadData", cubin, None, None, 0, None, None, 0, what=what))


def find_kernel(loaded: int, name: str) -> int:
    """Return the CUkernel of that name in a CUlibrary."""
    return int(call("cuLibraryGetKernel", loaded, name.encode(), what=name))


def load_function(kernel: int, what: str) -> int:
    """Bring a CUkernel to the GPU of the current context, and return its CUfunction there."""
    return int(call("cuKernelGetFunction", kernel, what=what))


def function_attribute(function: int, attribute: str, what: str) -> int:
    """Return the value of an attribute, named as CU_FUNC_ATTRIBUTE_*."""
    which = getattr(library().CUfunction_attribute, attribute)
    return int(call("cuFuncGetAttribute", which, function, what=what))


def resident_blocks(function: int, threads: int, shared_bytes: int, what: str) -> int:
    """Return how many blocks of that size, with so much dynamic shared memory, a multiprocessor runs at once."""
    return int(call("cuOccupancyMaxActiveBlocksPerMultiprocessor", function, threads, shared_bytes, what=what))


def set_function_attribute(function: int, attribute: str, value: int, what: str) -> None:
    """Set an attribute, named as CU_FUNC_ATTRIBUTE_*."""
    which = getattr(library().CUfunction_attribute, attribute)
    call("cuFuncSetAttribute", function, which, value, what=f"{what} to {value}")
