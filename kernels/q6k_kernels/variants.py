"""Every kernel there is, by GPU architecture: what a build for that architecture has to get through."""

from __future__ import annotations

from q6k_kernels import decode, gemm_mma, gemm_wgmma, row_kernels
from q6k_kernels.launching import Device, Variant

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that kernels are compiled for in tests; others of 8.0 and later are like one of them."""
_SHARED_KB = {80: (163, 164), 86: (99, 100), 89: (99, 100), 90: (227, 228), 100: (227, 228), 120: (99, 100)}


def device_like(arch: int) -> Device:
    """A GPU of that architecture with its documented shared memory (CUDA C++ Programming Guide) and 100 units."""
    block, multiprocessor = _SHARED_KB[arch]
    return Device(0, arch, 100, block << 10, multiprocessor << 10)


def all_variants(arch: int) -> list[Variant]:
    """The kernels that may be loaded on a GPU of that architecture."""
    device = device_like(arch)
    return (
        decode.variants(device) + gemm_wgmma.variants(device) + gemm_mma.variants(arch) + row_kernels.variants(arch)
    )
