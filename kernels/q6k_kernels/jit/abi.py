"""The part of NVIDIA's cuda.h that is used here: values, structures and signatures, under its names."""

from __future__ import annotations

import ctypes
import struct
from ctypes import POINTER, Structure, Union, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

CUDA_SUCCESS = 0
CUDA_ERROR_NO_DEVICE = 100
CUDA_ERROR_NOT_FOUND = 500
CUDA_ERRORS_OF_IMAGES = {
    200,  # CUDA_ERROR_INVALID_IMAGE
    209,  # CUDA_ERROR_NO_BINARY_FOR_GPU
    222,  # CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    300,  # CUDA_ERROR_INVALID_SOURCE
}
"""Code that the driver cannot use: damaged, of another architecture, or newer than it."""
CUDA_ERRORS_OF_EARLIER_KERNELS = {
    700,  # CUDA_ERROR_ILLEGAL_ADDRESS
    702,  # CUDA_ERROR_LAUNCH_TIMEOUT
    710,  # CUDA_ERROR_ASSERT
    714,  # CUDA_ERROR_HARDWARE_STACK_ERROR
    715,  # CUDA_ERROR_ILLEGAL_INSTRUCTION
    716,  # CUDA_ERROR_MISALIGNED_ADDRESS
    717,  # CUDA_ERROR_INVALID_ADDRESS_SPACE
    718,  # CUDA_ERROR_INVALID_PC
    719,  # CUDA_ERROR_LAUNCH_FAILED
}
"""The context is lost, and the call that reports it is not to blame."""

CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1
CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 3
CU_FUNC_ATTRIBUTE_NUM_REGS = 4
CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14
CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4
CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6
CU_LAUNCH_PARAM_END = 0
CU_LAUNCH_PARAM_BUFFER_POINTER = 1
CU_LAUNCH_PARAM_BUFFER_SIZE = 2
CU_STREAM_CAPTURE_MODE_RELAXED = 2
CU_TENSOR_MAP_DATA_TYPE = {"uint8": 0, "fp16": 6, "bf16": 9}
CU_TENSOR_MAP_ITEM_BYTES = {"uint8": 1, "fp16": 2, "bf16": 2}
CU_TENSOR_MAP_INTERLEAVE_NONE = 0
CU_TENSOR_MAP_SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}
"""By the bytes of a swizzled line."""
CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3
CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0
"""Zeros, that is, and not NaN."""
TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 128
"""64 in CUDA 12, 128 since."""


class _Cluster(Structure):
    _fields_ = (("x", c_uint), ("y", c_uint), ("z", c_uint))


class LaunchAttributeValue(Union):
    """CUlaunchAttributeValue."""

    _fields_ = (("pad", ctypes.c_char * 64), ("cluster", _Cluster), ("flag", c_int), ("_align", c_uint64))


class LaunchAttribute(Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_int), ("pad", ctypes.c_char * 4), ("value", LaunchAttributeValue))


class LaunchConfig(Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid_x", c_uint),
        ("grid_y", c_uint),
        ("grid_z", c_uint),
        ("block_x", c_uint),
        ("block_y", c_uint),
        ("block_z", c_uint),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("attribute_count", c_uint),
    )


class LaunchExtra(Structure):
    """The array `extra` of cuLaunchKernelEx that hands over a packed buffer of parameters."""

    _fields_ = (
        ("buffer_follows", c_void_p),
        ("buffer", c_char_p),
        ("size_follows", c_void_p),
        ("size", c_void_p),
        ("end", c_void_p),
    )


class LaunchDescription(Structure):
    """All that a launch is described in; `LAUNCH_HEAD` fills its first two fields in one go."""

    _fields_ = (
        ("config", LaunchConfig),
        ("size", c_size_t),
        ("attributes", LaunchAttribute * 2),
        ("extra", LaunchExtra),
    )


LAUNCH_HEAD = struct.Struct("@7IPPIN")
"""LaunchConfig's fields in their order, then the size of the parameters."""


_HANDLE = POINTER(c_void_p)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuCtxGetCurrent": (c_void_p,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_HANDLE,),
    "cuThreadExchangeStreamCaptureMode": (POINTER(c_int),),
    "cuLibraryLoadData": (_HANDLE, c_char_p, c_void_p, c_void_p, c_uint, c_void_p, c_void_p, c_uint),
    "cuLibraryGetKernel": (_HANDLE, c_void_p, c_char_p),
    "cuKernelGetFunction": (_HANDLE, c_void_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    # By address, as ctypes takes a number in a fraction of the time of a pointer: so every launch pays less.
    "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),
    "cuTensorMapEncodeTiled": (
        c_void_p,
        c_int,
        c_uint32,
        c_void_p,
        POINTER(c_uint64),
        POINTER(c_uint64),
        POINTER(c_uint32),
        POINTER(c_uint32),
        c_int,
        c_int,
        c_int,
        c_int,
    ),
}
