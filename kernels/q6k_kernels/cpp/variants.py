"""All kernels by GPU architecture, which a build for that architecture has to compile."""

from __future__ import annotations

from functools import cache
from itertools import product

from q6k_kernels.cuda import decode, decode_plan, experts_decode, experts_gemm, gemm_mma, gemm_wgmma, rows
from q6k_kernels.cuda.device import Device, Variant
from q6k_kernels.formats.types import CODE_MACROS, WEIGHT_TYPES, WeightType
from q6k_kernels.generate import attend_cuda, chunk_cuda, persist_cuda, step_cuda, texts_cuda

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that tests compile kernels for; every other one from 8.0 on resembles one of them."""
_SHARED_KB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""Shared memory of a block in KB, by architecture; a multiprocessor has 1 KB more."""
_SHAPES = tuple(product((1024, 4096, 16384, 65536, 262144), (1024, 4096, 8192, 16384, 21504, 32768)))
"""Common shapes of weights, (N, K), whose plans `shared_bytes` examines."""
_TOKENS = (*range(1, decode_plan.MOST_TOKENS + 1), 16, 32, 64)
"""Rows of activations that `shared_bytes` examines, for each size of every kernel."""
_SIZED = (
    *(decode.KERNEL, gemm_wgmma.KERNEL, gemm_mma.KERNEL),
    *(experts_decode.KERNEL, experts_gemm.WGMMA, experts_gemm.MMA),
)
"""Kernels whose shared memory depends on their macros or on sizes."""
_Key = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A kernel that a plan may choose: its name, the values of its weight type's macros, and its own values."""


def device_like(arch: int) -> Device:
    """Return a GPU of an architecture, with 100 multiprocessors and the architecture's shared memory.

    Sizes are those of the CUDA Programming Guide ("Technical Specifications per Compute Capability"). An
    architecture that is not listed there gets the smallest size of its major version, 99 KB a block for 8.x and
    12.x and 227 KB for 9.x, 10.x and 11.x. An unknown major version gets the smallest size of all, 99 KB.

    Args:
        arch: compute capability, 90 for 9.0.

    Raises:
        ValueError: `arch` is below 80, which no kernel supports.
    """
    if arch < 80:
        raise ValueError(f"arch: expected a compute capability of 80 or later, as 90 for 9.0, found {arch}")
    family = [kb for known, kb in _SHARED_KB.items() if known // 10 == arch // 10]
    block = _SHARED_KB.get(arch) or min(family or _SHARED_KB.values())
    return Device(0, arch, 100, block << 10, block + 1 << 10)


def all_variants(arch: int) -> list[Variant]:
    """Return the kernels that may be loaded on a GPU of an architecture.

    Raises:
        ValueError: `arch` is below 80.
    """
    return list(_all(arch))


@cache
def _all(arch: int) -> tuple[Variant, ...]:
    device = device_like(arch)
    return (
        *decode.variants(device),
        *(gemm_wgmma.variants(device) or gemm_mma.variants(arch)),
        *rows.variants(arch),
        *experts_decode.variants(),
        *experts_gemm.variants(device),
        *step_cuda.variants(device),
        *persist_cuda.variants(device),
        *chunk_cuda.variants(),
        *texts_cuda.variants(),
    )


def shared_bytes(arch: int) -> dict[Variant, int]:
    """Return the largest dynamic shared memory of each kernel's launches, in bytes of a block.

    It is exact for kernels whose shared memory does not depend on sizes. For `decode` it is the largest among plans
    for common shapes of weights. Kernels that no plan chooses are left out; kernels without shared memory have 0.

    Raises:
        ValueError: `arch` is below 80.
    """
    largest = _of_plans(device_like(arch))
    found = dict[Variant, int]()
    for variant in all_variants(arch):
        _, kernel, defines = variant
        if kernel == attend_cuda.ATTEND:
            found[variant] = attend_cuda.attend_bytes(dict(defines))
        elif kernel == persist_cuda.PERSIST:  # as much as there is, with as many stages as fit
            found[variant] = device_like(arch).shared_bytes
        elif kernel not in _SIZED:
            found[variant] = 0
        elif (key := _key(kernel, dict(defines))) in largest:
            found[variant] = largest[key]
    return found


def _key(kernel: str, macros: dict[str, int]) -> _Key:
    own = (value for name, value in macros.items() if name not in (*CODE_MACROS, "Q6K_FP16"))
    return kernel, tuple(macros[name] for name in CODE_MACROS), tuple(own)


@cache
def _of_plans(device: Device) -> dict[_Key, int]:
    largest = dict[_Key, int]()

    def meet(kernel: str, row: WeightType, own: tuple[int, ...], taken: int) -> None:
        key = kernel, tuple(value for _, value in row.macros), tuple(map(int, own))
        largest[key] = max(taken, largest.get(key, 0))

    for row in WEIGHT_TYPES.values():
        for (n, k), m in product(_SHAPES, _TOKENS):
            mma = gemm_mma.plan(m, n, k, row, device)
            meet(gemm_mma.KERNEL, row, (mma.tokens, mma.parts, mma.slots), mma.shared_bytes)
            chosen = decode_plan.plan(m, n, k, row, device) if m <= decode_plan.MOST_TOKENS else None
            if chosen is not None:
                meet(decode.KERNEL, row, (*chosen.kernel, chosen.cluster > 1), chosen.shared_bytes)
        for config in gemm_wgmma.CONFIGS:
            own = config.tokens, config.consumers, config.stages(row), config.x_stages, config.occupancy
            meet(gemm_wgmma.KERNEL, row, own, config.shared_bytes(row))
            own = (
                config.tokens,
                config.consumers,
                experts_gemm.stages(config, row),
                config.x_stages,
                config.occupancy,
            )
            meet(experts_gemm.WGMMA, row, own, experts_gemm.shared_bytes(config, row))
        for tokens in experts_gemm.MMA_TOKENS:
            own_mma = tokens, 1, gemm_mma.slots_of(device.arch)
            meet(experts_gemm.MMA, row, own_mma, experts_gemm.mma_bytes(row, device.arch))
    return largest
