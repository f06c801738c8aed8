"""The driver's calls: errors that say what failed, contexts put back, tensor maps as asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fake_cuda import COMPILER, NAME, FakeCuda
from q6k_kernels.errors import DriverCallError, DriverMissingError, GpuMissingError
from q6k_kernels.jit import driver, loader, tensor_map

# What is missing


def refusal(function: Any = driver.library) -> str:
    with pytest.raises((DriverMissingError, GpuMissingError, DriverCallError)) as caught:
        function()
    assert caught.value.remedy
    return f"{type(caught.value).__name__}: {caught.value.cause}"


def test_no_bindings(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    cuda.reset()
    assert "cuda-bindings, which calls the NVIDIA driver, is not installed" in refusal()
    with pytest.raises(DriverMissingError, match="pip install cuda-bindings"):
        driver.version()


OLD = "int cuInit(unsigned flags) { return 0; }"
"""A driver from before the function that the bindings look up all others with."""


@pytest.mark.parametrize("source", [None, OLD])
def test_a_driver_that_does_not_load(source: str | None, tmp_path: Path) -> None:
    library, reason = tmp_path / NAME, "cuda"
    if source is None:
        library.write_bytes(b"not a library")
    else:
        reason = "cuGetProcAddress"
        (tmp_path / "old.c").write_text(source)
        command = [COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{NAME}", str(tmp_path / "old.c")]
        subprocess.run([*command, "-o", str(library)], check=True)
    program = (
        "from q6k_kernels.jit import driver\n"
        "try: driver.library()\n"
        "except driver.DriverMissingError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = f"the NVIDIA driver does not load or is too old: .*{reason}.*[^.]\\. Install NVIDIA's driver 525"
    assert re.match(expected, done.stdout), done.stdout


def test_a_driver_that_is_too_old(cuda: FakeCuda) -> None:
    cuda.reset(version=11080)
    assert refusal() == "DriverMissingError: the NVIDIA driver is too old: it supports CUDA 11.8, needed is 12.0"
    cuda.reset(version=12000)
    assert driver.version() == (12, 0)


def test_a_driver_without_a_gpu(cuda: FakeCuda) -> None:
    cuda.reset(devices=0)
    assert refusal() == "GpuMissingError: the NVIDIA driver finds no GPU"
    assert driver.version() == (13, 0)


CALLS = {
    "cuInit": driver.library,
    "cuDriverGetVersion": driver.version,
    "cuDeviceGetCount": driver.device_count,
    "cuDeviceGet": lambda: driver.device_handle(0),
    "cuDeviceGetName": lambda: driver.device_name(0),
    "cuDeviceGetAttribute": lambda: driver.capability(0),
    "cuDeviceTotalMem_v2": lambda: driver.device_memory(0),
    "cuDevicePrimaryCtxRetain": lambda: driver.primary_context(0),
    "cuCtxPushCurrent_v2": lambda: driver.current(1).__enter__(),
    "cuThreadExchangeStreamCaptureMode": lambda: driver.relaxed_capture().__enter__(),
    "cuLibraryLoadData": lambda: driver.load_library(b"\x7fELF" + bytes(2048), "k.cuh"),
    "cuLibraryGetKernel": lambda: driver.find_kernel(0, "k"),
    "cuKernelGetFunction": lambda: driver.load_function(0, "k"),
    "cuFuncGetAttribute": lambda: driver.function_attribute(0, "CU_FUNC_ATTRIBUTE_NUM_REGS", "k"),
    "cuFuncSetAttribute": lambda: driver.set_function_attribute(
        0, "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", 1, "k"
    ),
    "cuTensorMapEncodeTiled": lambda: tensor_map.encode(0, "bf16", (64, 8), (128,), (64, 8), 128),
}


@pytest.mark.parametrize("function", CALLS)
def test_a_failing_call_is_named_with_the_drivers_words(function: str, cuda: FakeCuda) -> None:
    cuda.fail(function, 1)
    cause = refusal(CALLS[function])
    assert cause.startswith(f"DriverCallError: {function.removesuffix('_v2')}")
    assert cause.endswith(" failed: CUDA_ERROR_INVALID_VALUE (1), some words about it")


@pytest.mark.parametrize(
    ("code", "result", "cause", "remedy"),
    [
        (
            719, "CUDA_ERROR_LAUNCH_FAILED", r"CUDA_ERROR_LAUNCH_FAILED \(719\), some words about it",
            "A kernel launched earlier failed",
        ),
        (
            2, "CUDA_ERROR_OUT_OF_MEMORY", r"CUDA_ERROR_OUT_OF_MEMORY \(2\), unknown to this driver",
            "`q6k-convert doctor`",
        ),
        (4242, "CUresult", ".*4242.*, unknown to cuda-bindings", "`q6k-convert doctor`"),
    ],
)  # fmt: skip
def test_errors_of_other_kinds(code: int, result: str, cause: str, remedy: str, cuda: FakeCuda) -> None:
    cuda.fail("cuDeviceGetCount", code)
    with pytest.raises(DriverCallError) as caught:
        driver.device_count()
    assert caught.value.result == result
    assert re.fullmatch(f"cuDeviceGetCount failed: {cause}", caught.value.cause)
    assert caught.value.remedy.startswith(remedy)


def test_errors_of_earlier_kernels_are_nvidias() -> None:
    results = driver.bindings().CUresult
    names = driver.ERRORS_OF_EARLIER_KERNELS | loader.ERRORS_OF_IMAGES | {"CUDA_ERROR_NO_DEVICE"}
    assert all(getattr(results, name).name == name for name in names)


# Devices and contexts


def test_devices_are_described(cuda: FakeCuda) -> None:
    cuda.reset(devices=2, capability=121)
    assert driver.device_count() == 2
    assert driver.device_name(1) == "Fake GPU 1"
    assert driver.capability(1) == (12, 1)
    assert driver.device_memory(0) == 80 << 30
    assert driver.device_attribute(1, "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT") == 133
    with pytest.raises(DriverCallError, match="cuDeviceGet for GPU 2 failed"):
        driver.device_handle(2)


def test_a_primary_context_is_retained_once(cuda: FakeCuda) -> None:
    cuda.reset(devices=2)
    threads = [threading.Thread(target=driver.primary_context, args=(1,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert driver.primary_context(1) == 0x1001
    assert cuda.lines("retain") == ["retain 1"]


def test_context_and_capture_mode_are_put_back_after_an_error(cuda: FakeCuda) -> None:
    with pytest.raises(KeyError), driver.relaxed_capture(), driver.current(0x1000):  # noqa: PT012
        assert (cuda.depth, cuda.mode) == (1, 2)
        raise KeyError
    assert (cuda.depth, cuda.mode) == (0, 0)


# Tensor maps


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            (4096, "bf16", (512, 100), (1024,), (64, 64), 128),
            "map bf16 at 4096 dims=512,100 stride=1024 box=64,64 steps=1,1 swizzle=128 l2=1 zeros=1",
        ),
        (
            (1 << 40, "fp16", (8, 1), (4096,), (256, 256)),
            "map fp16 at 1099511627776 dims=8,1 stride=4096 box=256,256 steps=1,1 swizzle=0 l2=1 zeros=1",
        ),
        (
            (32, "uint32", (224, 16, 5), (896, 3584), (224, 4, 4)),
            "map uint32 at 32 dims=224,16,5 stride=896,3584 box=224,4,4 steps=1,1,1 swizzle=0 l2=1 zeros=1",
        ),
    ],
)
def test_a_tensor_map_says_what_was_asked(arguments: Any, expected: str, cuda: FakeCuda) -> None:
    encoded = tensor_map.encode(*arguments)
    assert encoded == b"".join(i.to_bytes(8, "little") for i in range(16))
    assert tensor_map.encode(*arguments) is encoded
    assert cuda.lines("map") == [expected]


RIGHT: dict[str, Any] = {
    "pointer": 4096, "dtype": "bf16", "sizes": (512, 100), "strides": (1024,), "box": (64, 64),
    "swizzle_bytes": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("pointer", 4104, "pointer: expected a multiple of 16, found 4104"),
        ("dtype", "fp32", "dtype: expected one of uint32, fp16, bf16, found fp32"),
        ("sizes", (512,), "sizes: expected 2 to 5 numbers, found (512,)"),
        ("sizes", (1, 2, 3, 4, 5, 6), "sizes: expected 2 to 5 numbers, found (1, 2, 3, 4, 5, 6)"),
        ("sizes", (512, 0), "sizes: expected 1 to 2**32 each, found (512, 0)"),
        ("sizes", ((1 << 32) + 1, 4), "sizes: expected 1 to 2**32 each, found (4294967297, 4)"),
        ("strides", (1024, 2048), "strides: expected one less than sizes, found (1024, 2048)"),
        ("strides", (1032,), "strides: expected multiples of 16 below 2**40, at least a row, found (1032,)"),
        ("strides", (1008,), "strides: expected"),
        ("strides", (1 << 40,), "strides: expected"),
        ("box", (64,), "box: expected as many as sizes, found (64,)"),
        ("box", (64, 257), "box: expected 1 to 256 each, found (64, 257)"),
        ("box", (0, 64), "box: expected 1 to 256 each, found (0, 64)"),
        ("box", (36, 64), "box: expected a multiple of 16 bytes first, found (36, 64)"),
        ("box", (72, 64), "box: expected at most 128 bytes first, found (72, 64)"),
        ("swizzle_bytes", 256, "swizzle_bytes: expected 0, 32, 64 or 128, found 256"),
    ],
)
def test_a_tensor_map_that_breaks_a_rule_is_refused(name: str, value: Any, expected: str, cuda: FakeCuda) -> None:
    tensor_map.encode(**RIGHT)
    with pytest.raises(ValueError, match=re.escape(f"tensor map: {expected}")):
        tensor_map.encode(**RIGHT | {name: value})
    assert len(cuda.lines("map")) == 1
