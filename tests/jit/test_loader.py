"""Loading and launching kernels, with the real compiler and a driver that writes down what it is asked."""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from fake_cuda import FakeCuda
from kernel_sources import ARCHITECTURES, KERNEL, ONE
from q6k_kernels.errors import (
    BlocksNotResidentError,
    CudaError,
    DriverCallError,
    GpuTooOldError,
    SourceMissingError,
)
from q6k_kernels.jit import compiler, driver, loader

pytestmark = pytest.mark.usefixtures("cache")


# Loading


def test_a_kernel_is_loaded_once_for_each_gpu(cuda: FakeCuda, sources: Path, compiled: list[Any]) -> None:
    cuda.reset(devices=2)
    kernels = {(name, gpu): loader.load("k.cuh", name, ONE, gpu, sources=sources)
               for _ in range(2) for name in ("k", "other") for gpu in (0, 1)}  # fmt: skip
    assert len({id(kernel) for kernel in kernels.values()}) == 4
    assert kernels["k", 1] is loader.load("k.cuh", "k", ONE, 1, sources=sources)
    assert len(compiled) == 1
    assert cuda.lines("library") == ["library mode=2"]
    assert cuda.lines("function") == [f"function device={gpu} mode=2" for gpu in (0, 1, 0, 1)]
    assert (cuda.depth, cuda.mode) == (0, 0)
    kernel = kernels["k", 1]
    assert (kernel.name, kernel.device, kernel.registers, kernel.local_bytes, kernel.shared_bytes) == (
        "k", 1, 77, 16, 0,
    )  # fmt: skip


def test_threads_that_want_the_same_kernel_compile_it_once(
    cuda: FakeCuda, sources: Path, compiled: list[Any]
) -> None:
    found, barrier = list[Any](), threading.Barrier(8)

    def load(value: int) -> None:
        barrier.wait()
        found.append(loader.load("k.cuh", "k", (("VALUE", value),), 0, sources=sources))

    threads = [threading.Thread(target=load, args=(index % 2,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(kernel) for kernel in found}) == len(compiled) == len(cuda.lines("library")) == 2


@pytest.mark.parametrize(("capability", "arch"), ARCHITECTURES.items())
def test_a_gpu_gets_code_of_its_own(
    capability: int, arch: str, cuda: FakeCuda, sources: Path, compiled: list[tuple[str, ...]]
) -> None:
    cuda.reset(capability=capability)
    loader.load("k.cuh", "k", ONE, 0, sources=sources)
    assert [options[1] for options in compiled] == [f"-arch={arch}"]


def test_an_old_gpu_is_refused(cuda: FakeCuda, sources: Path, compiled: list[Any]) -> None:
    cuda.reset(capability=75)
    with pytest.raises(GpuTooOldError, match=r"compute capability 7\.5"):
        loader.load("k.cuh", "k", ONE, 0, sources=sources)
    assert compiled == []


def test_a_kernel_that_the_file_does_not_have(cuda: FakeCuda, sources: Path) -> None:
    with pytest.raises(SourceMissingError, match="k.cuh has no kernel absent"):
        loader.load("k.cuh", "absent", ONE, 0, sources=sources)
    loader.load("k.cuh", "k", ONE, 0, sources=sources)
    cuda.fail("cuLibraryGetKernel", 1)
    with pytest.raises(DriverCallError, match="cuLibraryGetKernel for other failed"):
        loader.load("k.cuh", "other", ONE, 0, sources=sources)


def test_code_that_the_driver_cannot_use(cuda: FakeCuda, sources: Path) -> None:
    cuda.fail("cuLibraryLoadData", 209)
    with pytest.raises(DriverCallError) as caught:
        loader.load("k.cuh", "k", ONE, 0, sources=sources)
    assert "cuLibraryLoadData for k.cuh for sm_90a failed: CUDA_ERROR_NO_BINARY_FOR_GPU (209)" in caught.value.cause
    assert f"NVRTC {compiler.version()[0]}.{compiler.version()[1]} (" in caught.value.cause
    assert caught.value.cause.endswith("and the driver supports CUDA 13.0")
    assert (cuda.depth, cuda.mode) == (0, 0)
    cuda.fail("cuLibraryLoadData", 719)
    with pytest.raises(DriverCallError, match=r"\(719\), some words about it. A kernel launched earlier"):
        loader.load("k.cuh", "k", ONE, 0, sources=sources)


def test_a_failure_is_not_remembered(cuda: FakeCuda, sources: Path) -> None:
    (sources / "k.cuh").write_text("nonsense")
    with pytest.raises(CudaError):
        loader.load("k.cuh", "k", ONE, 0, sources=sources)
    (sources / "k.cuh").write_text(KERNEL)
    assert loader.load("k.cuh", "k", ONE, 0, sources=sources).name == "k"


# Launching


@pytest.fixture
def kernel(cuda: FakeCuda, sources: Path) -> loader.Kernel:
    return loader.load("k.cuh", "k", ONE, 0, sources=sources)


ARGUMENTS = struct.pack("@Pif", 0x7F00DEAD0010, -2, 1.5)
HEX = "1000adde007f0000feffffff0000c03f"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "shared=0 stream=0"),
        ({"stream": 1 << 46}, "shared=0 stream=70368744177664"),
        ({"shared_bytes": 49152}, "shared=49152 stream=0"),
        ({"cluster": 2}, "shared=0 stream=0 cluster=2,1,1"),
        ({"dependent": True}, "shared=0 stream=0 dependent=1"),
        ({"cluster": 8, "dependent": True}, "shared=0 stream=0 cluster=8,1,1 dependent=1"),
        ({"cooperative": True}, "shared=0 stream=0 cooperative=1"),
        ({"cooperative": True, "dependent": True}, "shared=0 stream=0 dependent=1 cooperative=1"),
    ],
)
def test_a_launch_says_what_was_asked(
    options: dict[str, Any], expected: str, kernel: loader.Kernel, cuda: FakeCuda
) -> None:
    several = [] if "cooperative" in options else [(b"", ""), (bytes(499), "00" * 499)]
    for arguments, shown in ((ARGUMENTS, HEX), *several):
        kernel.launch((16, 3, 2), 96, arguments, **{"stream": 0} | options)
        # Twice with another between: nothing of one launch stays in the next.
        kernel.launch((8, 1, 1), 32, b"\1", stream=7)
        assert cuda.lines("launch")[-2:] == [
            f"launch device=0 grid=16,3,2 block=96,1,1 {expected} arguments={shown}",
            "launch device=0 grid=8,1,1 block=32,1,1 shared=0 stream=7 arguments=01",
        ]
    assert cuda.lines("set") == []


def test_all_shared_memory_is_asked_for_when_more_is_needed(kernel: loader.Kernel, cuda: FakeCuda) -> None:
    """Once: no other holder of the function may be left with less than it was promised."""
    for size in (1000, 100_000, 60_000, 100_000, 200_000, 49_153):
        kernel.launch((1, 1, 1), 32, b"", stream=0, shared_bytes=size)
    assert cuda.lines("set") == [f"set shared={227 << 10} device=0"]
    with pytest.raises(DriverCallError, match="cuFuncSetAttribute for dynamic shared memory of k to 300000 failed"):
        kernel.launch((1, 1, 1), 32, b"", stream=0, shared_bytes=300_000)
    kernel.launch((1, 1, 1), 32, b"", stream=0, shared_bytes=200_000)
    assert len(cuda.lines("launch")) == 7


def test_static_shared_memory_counts(cuda: FakeCuda, sources: Path) -> None:
    cuda.reset(static_shared=1024)
    kernel = loader.load("k.cuh", "k", ONE, 0, sources=sources)
    assert kernel.shared_bytes == 1024
    for size in (48 * 1024 - 1024, 48 * 1024 - 1023):
        kernel.launch((1, 1, 1), 32, b"", stream=0, shared_bytes=size)
    assert cuda.lines("set") == [f"set shared={226 << 10} device=0"]


def test_large_clusters_are_permitted_once(kernel: loader.Kernel, cuda: FakeCuda) -> None:
    for _ in range(2):
        kernel.launch((32, 1, 1), 32, b"", stream=0, cluster=16)
    assert cuda.lines("set") == ["set cluster=1 device=0"]
    assert cuda.lines("launch")[0].endswith("cluster=16,1,1 arguments=")


def test_permissions_are_each_gpus_own(cuda: FakeCuda, sources: Path) -> None:
    cuda.reset(devices=2)
    for gpu in (0, 1):
        loader.load("k.cuh", "k", ONE, gpu, sources=sources).launch(
            (1, 1, 1), 32, b"", stream=0, shared_bytes=65536
        )
    assert cuda.lines("set") == [f"set shared={227 << 10} device={gpu}" for gpu in (0, 1)]


@pytest.mark.parametrize("at", [None, 0, 1])
def test_a_launch_goes_to_its_kernels_gpu_whatever_is_current(
    at: int | None, cuda: FakeCuda, sources: Path
) -> None:
    cuda.reset(devices=2)
    kernels = [loader.load("k.cuh", "k", ONE, gpu, sources=sources) for gpu in (0, 1)]
    before = 0
    if at is not None:
        driver.call("cuCtxPushCurrent", 0x1000 + at)
        before = 1
    for kernel in kernels:
        kernel.launch((1, 1, 1), 32, b"", stream=0)
    assert [line.split()[1] for line in cuda.lines("launch")] == ["device=0", "device=1"]
    assert cuda.depth == before


def test_a_launch_that_fails_says_how(kernel: loader.Kernel, cuda: FakeCuda) -> None:
    with pytest.raises(DriverCallError) as caught:
        kernel.launch((3, 1, 1), 64, b"", stream=0, cluster=2, shared_bytes=16)
    assert caught.value.cause == (
        "cuLaunchKernelEx for k on GPU 0 (grid (3, 1, 1), 64 threads, 16 bytes of dynamic shared memory, clusters "
        "of 2) failed: CUDA_ERROR_INVALID_VALUE (1), some words about it"
    )
    assert cuda.depth == 0


def test_blocks_that_wait_for_each_other_all_run_or_none(kernel: loader.Kernel, cuda: FakeCuda) -> None:
    kernel.launch((132, 1, 1), 512, ARGUMENTS, stream=0, shared_bytes=200_000, cooperative=True)
    with pytest.raises(BlocksNotResidentError) as caught:
        kernel.launch((19, 7, 1), 512, ARGUMENTS, stream=0, shared_bytes=200_000, cooperative=True)
    assert caught.value.cause == (
        "the 133 blocks of k wait for each other, and GPU 0 has no room for all at once: 1 of 512 threads and "
        "200000 bytes of dynamic shared memory on each of 132 multiprocessors"
    )
    assert caught.value.remedy.startswith("Give the process all of the GPU")
    kernel.launch((133, 1, 1), 512, b"", stream=0, shared_bytes=200_000)
    assert [line.split()[2] for line in cuda.lines("launch")] == ["grid=132,1,1", "grid=133,1,1"]
    cuda.refuse_cooperation()
    with pytest.raises(DriverCallError, match=r"cuLaunchKernelEx for k on GPU 0 .* failed: .*\(801\)"):
        kernel.launch((1, 1, 1), 32, ARGUMENTS, stream=0, cooperative=True)
    assert cuda.depth == 0


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "expected"),
    [
        (1024, 0, 2),
        (128, 0, 16),
        (512, 116_000, 1),
        (512, 115_000, 2),
        (32, 227 << 10, 1),
        (32, (227 << 10) + 1, 0),
    ],
)
def test_blocks_that_a_multiprocessor_has_room_for(
    threads: int, shared_bytes: int, expected: int, kernel: loader.Kernel, cuda: FakeCuda
) -> None:
    """With all the shared memory that a block may have, which the driver would not count before it is permitted."""
    assert kernel.most_blocks(threads, shared_bytes) == expected
    assert cuda.depth == 0


def test_a_gpu_without_cooperative_launches_has_room_for_none(kernel: loader.Kernel, cuda: FakeCuda) -> None:
    cuda.refuse_cooperation()
    assert kernel.most_blocks(32, 0) == 0


def test_threads_launch_side_by_side(kernel: loader.Kernel, cuda: FakeCuda) -> None:
    cuda.slow(50)
    threads = [
        threading.Thread(
            target=lambda thread: [
                kernel.launch((n + 1, 1, 1), 32, struct.pack("<II", thread, n), stream=thread) for n in range(100)
            ],
            args=(thread,),
        )
        for thread in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {
        f"launch device=0 grid={n + 1},1,1 block=32,1,1 shared=0 stream={thread} "
        f"arguments={struct.pack('<II', thread, n).hex()}"
        for thread in range(8)
        for n in range(100)
    }
    lines = cuda.lines("launch")
    assert len(lines) == 800
    assert set(lines) == expected
