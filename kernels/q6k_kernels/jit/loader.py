"""Load kernels, which are compiled for the GPU at hand when they are first needed, and launch them.

`load` takes a kernel from memory, else from the disk cache, else compiles it (see `compiler`, `cubin_cache`,
`driver`). It may be called from any thread, for any GPU, and while a CUDA graph is captured. Where there is
no disk cache hit it takes some tenths of a second; `Kernel.launch` takes a few microseconds.
"""

from __future__ import annotations

import threading
from ctypes import addressof, c_char_p, c_size_t
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from q6k_kernels.errors import BlocksNotResidentError, DriverCallError, SourceMissingError
from q6k_kernels.jit import compiler, cubin_cache, driver
from q6k_kernels.jit.compiler import SOURCES, Compiled, Defines

SHARED_BYTES = 48 << 10
"""Shared memory that a block may have without permission, static and dynamic together."""
PORTABLE_CLUSTER = 8
"""The largest cluster that every GPU with clusters can run."""
ERRORS_OF_IMAGES = {
    "CUDA_ERROR_INVALID_IMAGE",
    "CUDA_ERROR_NO_BINARY_FOR_GPU",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    "CUDA_ERROR_INVALID_SOURCE",
}
"""Code that the driver cannot use: damaged, of another architecture, or newer than it."""


class _Launches(threading.local):
    """Descriptions of launches, those of each thread apart: made once, as filling them in is cheaper.

    Attributes:
        size: bytes of the parameters.
        extra: the array that tells cuLaunchKernelEx the packed parameters, item 1, and the address of `size`.
        parameters: the array that tells it the only parameter of a cooperative launch, which a graph takes no other
            way.
        configs: a CUlaunchConfig with its attributes, by the blocks of a cluster, `dependent` and `cooperative`.
    """

    def __init__(self) -> None:
        cuda = driver.bindings()
        self.size = c_size_t()
        self.extra = (c_char_p * 5)(
            cuda.CU_LAUNCH_PARAM_BUFFER_POINTER,
            None,
            cuda.CU_LAUNCH_PARAM_BUFFER_SIZE,
            c_char_p(addressof(self.size)),
            cuda.CU_LAUNCH_PARAM_END,
        )
        self.parameters = (c_char_p * 1)()
        self.extra_address, self.parameters_address = addressof(self.extra), addressof(self.parameters)
        self.configs = dict[tuple[int, bool, bool], Any]()


def _config(cluster: int, dependent: bool, cooperative: bool) -> Any:
    """Make a CUlaunchConfig with the attributes that `Kernel.launch` describes."""
    cuda, attributes = driver.bindings(), list[Any]()
    if cluster > 1:
        attributes.append(clustered := cuda.CUlaunchAttribute())
        clustered.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = clustered.value.clusterDim
        size.x, size.y, size.z = cluster, 1, 1
    if dependent:
        attributes.append(early := cuda.CUlaunchAttribute())
        early.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
    if cooperative:
        attributes.append(together := cuda.CUlaunchAttribute())
        together.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        together.value.cooperative = 1
    config = cuda.CUlaunchConfig()
    config.blockDimY = config.blockDimZ = 1
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


@cache
def _launches() -> _Launches:
    """Make the descriptions with the first kernel and not at import, as the bindings take a while to import."""
    return _Launches()


class Kernel:
    """A kernel on one GPU.

    Attributes:
        name: name of the function.
        device: ordinal of the GPU.
        registers: registers of a thread.
        local_bytes: local memory of a thread: its stack and what spilled from registers.
        shared_bytes: static shared memory of a block.
    """

    def __init__(self, name: str, device: int, context: int, function: int) -> None:
        def attribute(which: str) -> int:
            return driver.function_attribute(function, which, name)

        self.name, self.device = name, device
        self.registers = attribute("CU_FUNC_ATTRIBUTE_NUM_REGS")
        self.local_bytes = attribute("CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES")
        self.shared_bytes = attribute("CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES")
        self._context, self._function, self._launches = context, function, _launches()
        self._most_shared = SHARED_BYTES - self.shared_bytes
        self._most_cluster = PORTABLE_CLUSTER
        self._permissions = threading.Lock()
        cuda = driver.library()
        self._handle = cuda.CUfunction(function)
        self._get_current, self._launch_kernel = cuda.cuCtxGetCurrent, cuda.cuLaunchKernelEx

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
        cooperative: bool = False,
    ) -> None:
        """Put a launch into a stream of the kernel's GPU, whichever GPU is current.

        Args:
            grid: blocks in x, y, z.
            threads: threads of a block.
            arguments: the kernel's parameters, packed with their natural alignment; with `cooperative` its only
                parameter, a structure, as large as C++ makes it.
            stream: a CUstream, as `torch.cuda.current_stream().cuda_stream` has it.
            shared_bytes: dynamic shared memory of a block.
            cluster: blocks of a cluster, in x; `grid[0]` is a multiple of it.
            dependent: whether the kernel may start while the one before it in the stream still runs; it has to
                execute griddepcontrol.wait before it touches what that one writes (sm_90 and later).
            cooperative: whether blocks wait for each other, so that all have to run at the same time; the driver
                refuses a launch of more than fit (see `most_blocks`), which would never end.

        Raises:
            BlocksNotResidentError: `cooperative`, and not all blocks can run at the same time.
            DriverCallError: the driver refuses the launch, or an earlier kernel had failed.
        """
        if shared_bytes > self._most_shared or cluster > self._most_cluster:
            self._permit(shared_bytes, cluster)
        launch = self._launches
        if (config := launch.configs.get((cluster, dependent, cooperative))) is None:
            config = launch.configs[cluster, dependent, cooperative] = _config(cluster, dependent, cooperative)
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.sharedMemBytes, config.hStream = threads, shared_bytes, stream
        if cooperative:
            launch.parameters[0] = arguments
            parameters, extra = launch.parameters_address, 0
        else:
            launch.size.value, launch.extra[1] = len(arguments), arguments
            parameters, extra = 0, launch.extra_address
        code, context = self._get_current()
        if not code and int(context) == self._context:
            (code,) = self._launch_kernel(config, self._handle, parameters, extra)
        else:
            # A thread that has not used CUDA yet, or one that is at another GPU.
            with driver.current(self._context):
                (code,) = self._launch_kernel(config, self._handle, parameters, extra)
        if code:
            if code.name == "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE":
                raise self._too_large(grid, threads, shared_bytes)
            driver.check(
                code,
                "cuLaunchKernelEx",
                f"{self.name} on GPU {self.device} (grid {grid}, {threads} threads, {shared_bytes} bytes of "
                f"dynamic shared memory, clusters of {cluster})",
            )

    def most_blocks(self, threads: int, shared_bytes: int) -> int:
        """Return how many blocks of a cooperative launch a multiprocessor runs at the same time.

        It is 0 if not one has room, or if the GPU has no cooperative launches.

        Args:
            threads: threads of a block.
            shared_bytes: dynamic shared memory of a block.
        """
        room = driver.most_shared_bytes(self.device) - self.shared_bytes
        if shared_bytes > room or not driver.launches_cooperatively(self.device):
            return 0
        if shared_bytes > self._most_shared:
            self._permit(shared_bytes, 1)
        with driver.current(self._context):
            return driver.resident_blocks(self._function, threads, shared_bytes, self.name)

    def _too_large(self, grid: tuple[int, int, int], threads: int, shared_bytes: int) -> BlocksNotResidentError:
        each = self.most_blocks(threads, shared_bytes)
        processors = driver.device_attribute(self.device, "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT")
        return BlocksNotResidentError(
            f"the {prod(grid)} blocks of {self.name} wait for each other, and GPU {self.device} has no room for "
            f"all at once: {each} of {threads} threads and {shared_bytes} bytes of dynamic shared memory on "
            f"each of {processors} multiprocessors",
            "Give the process all of the GPU: no CUDA_MPS_ACTIVE_THREAD_PERCENTAGE, and no green context.",
        )

    def _permit(self, shared_bytes: int, cluster: int) -> None:
        with self._permissions, driver.relaxed_capture(), driver.current(self._context):
            if shared_bytes > self._most_shared:
                # All there is, at once: the limit belongs to the function, which others may hold, too.
                most = max(shared_bytes, driver.most_shared_bytes(self.device) - self.shared_bytes)
                self._set("CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", most, "dynamic shared memory")
                self._most_shared = most
            if cluster > self._most_cluster:
                self._set("CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED", 1, "clusters of more than 8")
                self._most_cluster = cluster

    def _set(self, attribute: str, value: int, what: str) -> None:
        driver.set_function_attribute(self._function, attribute, value, f"{what} of {self.name}")


_guard = threading.Lock()
_locks: dict[tuple[object, ...], threading.Lock] = {}
_libraries: dict[tuple[object, ...], int] = {}
_kernels: dict[tuple[object, ...], Kernel] = {}


def load(file: str, kernel: str, defines: Defines, device: int, *, sources: Path = SOURCES) -> Kernel:
    """Return a kernel, ready to be launched on a GPU.

    Args:
        file: the file in `sources` that holds the kernel, as "decode.cuh".
        kernel: name of the function, which is `extern "C" __global__`.
        defines: macros that specialise the file.
        device: ordinal of the GPU.
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


def compiled(file: str, defines: Defines, arch: str, sources: Path = SOURCES) -> Compiled:
    """Return a file compiled for an architecture, from the disk cache if it is there. Needs no GPU.

    Raises:
        CompilerMissingError, CompileFailedError, SourceMissingError: see `compiler.compile_cubin`.
    """
    source, options = compiler.source_text(file, sources), compiler.options(defines, arch)
    name = cubin_cache.key(compiler.identity(), *options, source)
    return cubin_cache.fetch(name, lambda: compiler.compile_cubin(source, file, options))


def _load(unit: tuple[str, Defines, str, Path], kernel: str, device: int) -> Kernel:
    context = driver.primary_context(device)
    with driver.relaxed_capture(), driver.current(context):
        if (loaded := _libraries.get(unit)) is None:
            loaded = _libraries[unit] = _load_library(unit)
        try:
            handle = driver.find_kernel(loaded, kernel)
        except DriverCallError as error:
            if error.result != "CUDA_ERROR_NOT_FOUND":
                raise
            raise SourceMissingError(f"{unit[0]} has no kernel {kernel}", "Install q6k-convert again.") from error
        # This brings the code to the GPU: left to the first launch, it would happen in a graph's capture.
        return Kernel(kernel, device, context, driver.load_function(handle, kernel))


def _load_library(unit: tuple[str, Defines, str, Path]) -> int:
    file, _, arch, _ = unit
    code = compiled(*unit).cubin
    try:
        return driver.load_library(code, f"{file} for {arch}")
    except DriverCallError as error:
        if error.result not in ERRORS_OF_IMAGES:
            raise
        made_by, supported = compiler.version(), driver.version()
        raise DriverCallError(
            f"{error.cause}; it was compiled by NVRTC {made_by[0]}.{made_by[1]} "
            f"({compiler.library_path()}), and the driver supports CUDA {supported[0]}.{supported[1]}",
            "Update the driver, or install a torch, and remove an NVRTC, so that NVRTC is no newer than it.",
            error.result,
        ) from error
