"""Kernels compiled when they are first needed, for the GPU at hand, and launched with little ado.

`load` gives a kernel: from memory, else from the disk cache, else compiled (see `compiler`, `cubin_cache`,
`driver`). It may be called from any thread, for any GPU, and while a CUDA graph is captured. Where there is
no disk cache hit it takes some tenths of a second; `Kernel.launch` takes a few microseconds.
"""

from __future__ import annotations

import threading
from ctypes import addressof, c_void_p
from pathlib import Path

from q6k_kernels.errors import DriverCallError, SourceMissingError
from q6k_kernels.jit import compiler, cubin_cache, driver
from q6k_kernels.jit.abi import (
    CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
    CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED,
    CU_FUNC_ATTRIBUTE_NUM_REGS,
    CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
    CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
    CU_LAUNCH_PARAM_BUFFER_POINTER,
    CU_LAUNCH_PARAM_BUFFER_SIZE,
    CU_LAUNCH_PARAM_END,
    CUDA_ERROR_NOT_FOUND,
    CUDA_ERRORS_OF_IMAGES,
    CUDA_SUCCESS,
    LAUNCH_HEAD,
    LaunchDescription,
)
from q6k_kernels.jit.compiler import SOURCES, Defines

SHARED_BYTES = 48 << 10
"""Shared memory of a block, static and dynamic, that needs no permission."""
PORTABLE_CLUSTER = 8
"""The largest cluster that every GPU with clusters can run."""


class _Launch:
    """What a launch is described in, made once for each thread: filling it in is cheaper."""

    def __init__(self) -> None:
        self.description = LaunchDescription()
        self.head = memoryview(self.description).cast("B")
        first, second = self.description.attributes
        first.id, second.id = (
            CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        )
        self.cluster = first.value.cluster
        self.cluster.x = self.cluster.y = self.cluster.z = 1
        second.value.flag = 1
        self.cluster_address, self.dependent_address = addressof(first), addressof(second)
        self.extra = self.description.extra
        self.extra.buffer_follows, self.extra.size_follows = (
            CU_LAUNCH_PARAM_BUFFER_POINTER,
            CU_LAUNCH_PARAM_BUFFER_SIZE,
        )
        self.extra.size = addressof(self.description) + LaunchDescription.size.offset
        self.extra.end = CU_LAUNCH_PARAM_END
        self.context = c_void_p()
        self.config_address, self.extra_address = addressof(self.description), addressof(self.extra)
        self.context_address = addressof(self.context)


class _Threads(threading.local):
    def __init__(self) -> None:
        self.launch = _Launch()


_threads = _Threads()


class Kernel:
    """A kernel on one GPU.

    Attributes:
        name: its own.
        device: the GPU's ordinal.
        registers: of a thread.
        local_bytes: local memory of a thread: its stack and what spilled from registers.
        shared_bytes: static shared memory of a block.
    """

    def __init__(self, name: str, device: int, context: int, function: int) -> None:
        def attribute(which: int) -> int:
            return driver.function_attribute(function, which, name)

        self.name, self.device = name, device
        self.registers = attribute(CU_FUNC_ATTRIBUTE_NUM_REGS)
        self.local_bytes = attribute(CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
        self.shared_bytes = attribute(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
        self._context, self._function = context, function
        self._most_shared = SHARED_BYTES - self.shared_bytes
        self._most_cluster = PORTABLE_CLUSTER
        self._permissions = threading.Lock()
        self._get_current = driver.library().cuCtxGetCurrent
        self._launch_kernel = driver.library().cuLaunchKernelEx

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: bytes,
        *,
        stream: int,
        shared_bytes: int = 0,
        cluster: int = 1,
        dependent: bool = False,
    ) -> None:
        """Puts a launch into a stream of the kernel's GPU, whichever GPU is current.

        Args:
            grid: blocks in x, y, z.
            threads: of a block.
            arguments: the kernel's parameters, packed with their natural alignment.
            stream: a CUstream, as `torch.cuda.current_stream().cuda_stream` has it.
            shared_bytes: dynamic shared memory of a block.
            cluster: blocks of a cluster, in x; `grid[0]` is a multiple of it.
            dependent: whether it may start while the kernel before it in the stream still runs; it has to
                wait with griddepcontrol.wait before it touches what that one makes (sm_90 and later).

        Raises:
            DriverCallError: the driver refuses it, or an earlier kernel had failed.
        """
        if shared_bytes > self._most_shared or cluster > self._most_cluster:
            self._permit(shared_bytes, cluster)
        launch = _threads.launch
        if cluster > 1:
            launch.cluster.x = cluster
            attributes, count = launch.cluster_address, 2 if dependent else 1
        else:
            attributes, count = launch.dependent_address, 1 if dependent else 0
        LAUNCH_HEAD.pack_into(
            launch.head, 0, *grid, threads, 1, 1, shared_bytes, stream, attributes, count, len(arguments)
        )
        launch.extra.buffer = arguments
        code = self._get_current(launch.context_address)
        if code == CUDA_SUCCESS and launch.context.value == self._context:
            code = self._launch_kernel(launch.config_address, self._function, None, launch.extra_address)
        else:
            # A thread that has not used CUDA yet, or one that is at another GPU.
            with driver.current(self._context):
                code = self._launch_kernel(launch.config_address, self._function, None, launch.extra_address)
        if code != CUDA_SUCCESS:
            driver.check(
                code,
                "cuLaunchKernelEx",
                f"{self.name} on GPU {self.device} (grid {grid}, {threads} threads, {shared_bytes} bytes of "
                f"dynamic shared memory, clusters of {cluster})",
            )

    def _permit(self, shared_bytes: int, cluster: int) -> None:
        with self._permissions, driver.relaxed_capture(), driver.current(self._context):
            if shared_bytes > self._most_shared:
                # All there is, at once: the limit belongs to the function, which others may hold, too.
                most = max(shared_bytes, driver.most_shared_bytes(self.device) - self.shared_bytes)
                self._set(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most, "dynamic shared memory")
                self._most_shared = most
            if cluster > self._most_cluster:
                self._set(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, "clusters of more than 8")
                self._most_cluster = cluster

    def _set(self, attribute: int, value: int, what: str) -> None:
        driver.set_function_attribute(self._function, attribute, value, f"{what} of {self.name}")


_guard = threading.Lock()
_locks: dict[tuple[object, ...], threading.Lock] = {}
_libraries: dict[tuple[object, ...], int] = {}
_kernels: dict[tuple[object, ...], Kernel] = {}


def load(file: str, kernel: str, defines: Defines, device: int, *, sources: Path = SOURCES) -> Kernel:
    """A kernel, ready to be launched on a GPU.

    Args:
        file: the file that holds it, as `decode.cuh`, in `sources`.
        kernel: its name, `extern "C" __global__`.
        defines: macros that specialise the file.
        device: the GPU's ordinal.
        sources: the folder with `common.cuh` and `file`.

    Raises:
        CudaError: one of `errors`, for what is missing or failed.
    """
    wanted = (file, kernel, defines, device, sources)
    if (known := _kernels.get(wanted)) is not None:
        return known
    arch = compiler.architecture(driver.capability(device))
    unit = (file, defines, arch, sources)
    with _guard:
        lock = _locks.setdefault(unit, threading.Lock())
    with lock:
        if (known := _kernels.get(wanted)) is None:
            known = _kernels[wanted] = _load(unit, kernel, device)
    return known


def cubin(file: str, defines: Defines, arch: str, sources: Path = SOURCES) -> bytes:
    """The compiled file, from the disk cache if it is there. Needs no GPU.

    Raises:
        CompilerMissingError, CompileFailedError, SourceMissingError: see `compiler.compile_cubin`.
    """
    source, options = compiler.source_text(file, sources), compiler.options(defines, arch)
    name = cubin_cache.key(compiler.identity(), *options, source)
    return cubin_cache.fetch(name, lambda: compiler.compile_cubin(source, file, options)[0])


def _load(unit: tuple[str, Defines, str, Path], kernel: str, device: int) -> Kernel:
    context = driver.primary_context(device)
    with driver.relaxed_capture(), driver.current(context):
        if (loaded := _libraries.get(unit)) is None:
            loaded = _libraries[unit] = _load_library(unit)
        try:
            handle = driver.find_kernel(loaded, kernel)
        except DriverCallError as error:
            if error.code != CUDA_ERROR_NOT_FOUND:
                raise
            raise SourceMissingError(f"{unit[0]} has no kernel {kernel}", "Install q6k-convert again.") from error
        # This brings the code to the GPU: left to the first launch, it would happen in a graph's capture.
        return Kernel(kernel, device, context, driver.load_function(handle, kernel))


def _load_library(unit: tuple[str, Defines, str, Path]) -> int:
    file, _, arch, _ = unit
    code = cubin(*unit)
    try:
        return driver.load_library(code, f"{file} for {arch}")
    except DriverCallError as error:
        if error.code not in CUDA_ERRORS_OF_IMAGES:
            raise
        compiled, supported = compiler.version(), driver.version()
        raise DriverCallError(
            f"{error.cause}; it was compiled by NVRTC {compiled[0]}.{compiled[1]} "
            f"({compiler.library_path()}), and the driver supports CUDA {supported[0]}.{supported[1]}",
            "Update the driver, or install a torch, and remove an NVRTC, so that NVRTC is no newer than it.",
            error.code,
        ) from error
