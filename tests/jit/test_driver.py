"""The driver's calls: names and layouts as NVIDIA has them, errors that say what failed, contexts put back."""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from fake_cuda import COMPILER, FakeCuda
from q6k_kernels.errors import DriverCallError, DriverMissingError, GpuMissingError
from q6k_kernels.jit import abi, driver
from q6k_kernels.jit.abi import LaunchAttribute, LaunchAttributeValue, LaunchConfig

# Values and layouts


def test_values_are_those_of_nvidias_own_bindings() -> None:
    from cuda.bindings import driver as theirs

    enumerations = {
        "CU_DEVICE_ATTRIBUTE": theirs.CUdevice_attribute,
        "CU_FUNC_ATTRIBUTE": theirs.CUfunction_attribute,
        "CU_LAUNCH_ATTRIBUTE": theirs.CUlaunchAttributeID,
        "CU_STREAM_CAPTURE": theirs.CUstreamCaptureMode,
        "CU_TENSOR_MAP_INTERLEAVE": theirs.CUtensorMapInterleave,
        "CU_TENSOR_MAP_L2_PROMOTION": theirs.CUtensorMapL2promotion,
        "CU_TENSOR_MAP_FLOAT_OOB": theirs.CUtensorMapFloatOOBfill,
        "CUDA_": theirs.CUresult,
    }
    checked = 0
    for name, value in vars(abi).items():
        for prefix, enumeration in enumerations.items():
            if name.startswith(prefix) and isinstance(value, int):
                assert value == getattr(enumeration, name), name
                checked += 1
    assert checked >= 15
    sizes, dtypes = theirs.CUtensorMapSwizzle, theirs.CUtensorMapDataType
    assert abi.CU_TENSOR_MAP_SWIZZLE == {
        0: sizes.CU_TENSOR_MAP_SWIZZLE_NONE, 32: sizes.CU_TENSOR_MAP_SWIZZLE_32B,
        64: sizes.CU_TENSOR_MAP_SWIZZLE_64B, 128: sizes.CU_TENSOR_MAP_SWIZZLE_128B,
    }  # fmt: skip
    assert abi.CU_TENSOR_MAP_DATA_TYPE == {
        "uint8": dtypes.CU_TENSOR_MAP_DATA_TYPE_UINT8, "fp16": dtypes.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        "bf16": dtypes.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["CUDA_ERRORS_OF_IMAGES", "CUDA_ERRORS_OF_EARLIER_KERNELS"])
def test_errors_bear_the_names_beside_them(name: str) -> None:
    from cuda.bindings import driver as theirs

    source = Path(abi.__file__).read_text(encoding="utf-8")
    listed = re.findall(r"(\d+),  # (CUDA_ERROR_\w+)", source.partition(f"{name} = {{")[2].partition("}")[0])
    assert {int(code) for code, _ in listed} == getattr(abi, name)
    assert all(getattr(theirs.CUresult, label) == int(code) for code, label in listed)


def test_structures_are_laid_out_as_cuda_h_has_them(cuda: FakeCuda) -> None:
    ours = [
        ctypes.sizeof(LaunchConfig), LaunchConfig.stream.offset, LaunchConfig.attributes.offset,
        LaunchConfig.attribute_count.offset, ctypes.sizeof(LaunchAttribute), LaunchAttribute.value.offset,
        ctypes.sizeof(LaunchAttributeValue), abi.TENSOR_MAP_BYTES, ctypes.sizeof(ctypes.c_int),
    ]  # fmt: skip
    *theirs, alignment = cuda.layout(len(ours) + 1)
    assert ours == theirs
    assert abi.TENSOR_MAP_ALIGNMENT % alignment == 0
    assert abi.LaunchDescription.size.offset == ctypes.sizeof(LaunchConfig)
    assert abi.LAUNCH_HEAD.size == abi.LaunchDescription.attributes.offset


# What is missing


def refusal(function: Any = driver.library) -> str:
    with pytest.raises((DriverMissingError, GpuMissingError, DriverCallError)) as caught:
        function()
    assert caught.value.remedy
    return f"{type(caught.value).__name__}: {caught.value.cause}"


def test_no_driver(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", str(tmp_path / "libcuda.so.1"))
    assert refusal().startswith("DriverMissingError: the NVIDIA driver does not load: ")
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")
    assert "invalid ELF header" in refusal() or "file too short" in refusal()


def test_a_driver_without_a_function_that_is_needed(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, old = tmp_path / "old.c", tmp_path / "libold.so"
    source.write_text("int cuInit(unsigned flags) { return 0; }")
    subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(old)], check=True)
    monkeypatch.setattr(driver, "LIBRARY", str(old))
    assert refusal() == "DriverMissingError: the NVIDIA driver is too old: it has no cuDriverGetVersion"


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
    "cuFuncGetAttribute": lambda: driver.function_attribute(0, 1, "k"),
    "cuFuncSetAttribute": lambda: driver.set_function_attribute(0, 8, 1, "k"),
    "cuTensorMapEncodeTiled": lambda: driver.encode_tensor_map(0, "bf16", (64, 8), (128,), (64, 8), 128),
}


@pytest.mark.parametrize("function", CALLS)
def test_a_failing_call_is_named_with_the_drivers_words(function: str, cuda: FakeCuda) -> None:
    cuda.fail(function, 1)
    cause = refusal(CALLS[function])
    assert cause.startswith(f"DriverCallError: {function.removesuffix('_v2')}")
    assert cause.endswith(" failed: CUDA_ERROR_INVALID_VALUE (1), some words about it")


def test_every_function_is_declared_and_its_failure_tested() -> None:
    untested = {"cuGetErrorName", "cuGetErrorString", "cuCtxGetCurrent", "cuCtxPopCurrent_v2", "cuLaunchKernelEx"}
    assert set(CALLS) | untested == set(abi.SIGNATURES)


@pytest.mark.parametrize(
    ("code", "cause", "remedy"),
    [
        (719, "CUDA_ERROR_LAUNCH_FAILED (719), some words about it", "A kernel launched earlier failed"),
        (4242, "CUresult (4242), unknown to this driver", "`q6k-convert doctor`"),
    ],
)
def test_errors_of_other_kinds(code: int, cause: str, remedy: str, cuda: FakeCuda) -> None:
    cuda.fail("cuDeviceGetCount", code)
    with pytest.raises(DriverCallError) as caught:
        driver.device_count()
    assert caught.value.code == code
    assert caught.value.cause == f"cuDeviceGetCount failed: {cause}"
    assert caught.value.remedy.startswith(remedy)


# Devices and contexts


def test_devices_are_described(cuda: FakeCuda) -> None:
    cuda.reset(devices=2, capability=121)
    assert driver.device_count() == 2
    assert driver.device_name(1) == "Fake GPU 1"
    assert driver.capability(1) == (12, 1)
    assert driver.device_memory(0) == 80 << 30
    assert driver.device_attribute(1, abi.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) == 133
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
        assert (cuda.depth, cuda.mode) == (1, abi.CU_STREAM_CAPTURE_MODE_RELAXED)
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
            (32, "uint8", (240, 28, 5), (240, 6720), (240, 14, 4)),
            "map uint8 at 32 dims=240,28,5 stride=240,6720 box=240,14,4 steps=1,1,1 swizzle=0 l2=1 zeros=1",
        ),
    ],
)
def test_a_tensor_map_says_what_was_asked(arguments: Any, expected: str, cuda: FakeCuda) -> None:
    encoded = driver.encode_tensor_map(*arguments)
    assert encoded == b"".join(i.to_bytes(8, "little") for i in range(16))
    assert driver.encode_tensor_map(*arguments) is encoded
    assert cuda.lines("map") == [expected]


RIGHT: dict[str, Any] = {
    "pointer": 4096, "dtype": "bf16", "sizes": (512, 100), "strides": (1024,), "box": (64, 64),
    "swizzle_bytes": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("pointer", 4104, "pointer: expected a multiple of 16, found 4104"),
        ("dtype", "fp32", "dtype: expected one of uint8, fp16, bf16, found fp32"),
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
    driver.encode_tensor_map(**RIGHT)
    with pytest.raises(ValueError, match=re.escape(f"tensor map: {expected}")):
        driver.encode_tensor_map(**RIGHT | {name: value})
    assert len(cuda.lines("map")) == 1
