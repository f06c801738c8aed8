"""What every launch needs: the GPU's limits, the current stream, and constants that kernels and hosts share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from q6k_kernels.formats.types import WeightType
from q6k_kernels.jit.compiler import Defines

if TYPE_CHECKING:
    from torch import Tensor

Variant = tuple[str, str, Defines]
"""A kernel to compile: file, name, macros."""
Launch = Callable[[Variant, tuple[int, int, int], int, bytes], None]
"""Launches a kernel: variant, grid, threads, arguments."""

ALIGNMENT = 16
"""Alignment in bytes of everything that kernels read or write."""
BIAS_KINDS: Mapping[torch.dtype, int] = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""`BiasKind` in `cuda/common.cuh`; 0 is none."""


@dataclass(frozen=True)
class Device:
    """The limits of a GPU that a launch depends on.

    Attributes:
        index: its ordinal.
        arch: compute capability, 90 for 9.0.
        multiprocessors: number of multiprocessors.
        shared_bytes: most shared memory of a block, in bytes.
        multiprocessor_shared_bytes: that of all blocks on a multiprocessor, each with 1 KB of overhead.
    """

    index: int
    arch: int
    multiprocessors: int
    shared_bytes: int
    multiprocessor_shared_bytes: int


@cache
def device(index: int) -> Device:
    """Return the GPU with that ordinal."""
    properties = torch.cuda.get_device_properties(index)
    return Device(
        index,
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # missing in torch's stubs
        properties.shared_memory_per_multiprocessor,
    )


def stream(on: Device) -> int:
    """Return torch's current CUstream on that GPU."""
    # Without an object for it, which takes longer than a launch.
    return torch._C._cuda_getCurrentRawStream(on.index)


def pointer(tensor: Tensor | None) -> int:
    """Return the address of a tensor; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def check_aligned(tiles: Tensor) -> None:
    """Check that tiles are 16-byte aligned, because kernels copy 16 bytes at a time.

    Raises:
        ValueError: they are not, as a view into other memory may be.
    """
    if tiles.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"tiles: expected memory aligned to {ALIGNMENT} bytes, found {tiles.data_ptr():#x}; clone them"
        )


def end_write(tiles: Tensor) -> None:
    """Separate the launch that wrote tiles from the next one, by a memset.

    Kernels that multiply begin to copy tiles while the launch before them ends (programmatic dependent launch), so
    that launch must not be the one that wrote them. Nothing overlaps with a memset.
    """
    torch.zeros(1, dtype=torch.uint8, device=tiles.device)


def common_macros(row: WeightType, fp16: bool) -> Defines:
    """Return the macros that specialise `cuda/common.cuh`: the weight type's, and the activations' dtype."""
    return (*row.macros, ("Q6K_FP16", int(fp16)))


def bias_arguments(bias: Tensor | None) -> tuple[int, int]:
    """Return the bias's pointer and `BiasKind`."""
    return (0, 0) if bias is None else (bias.data_ptr(), BIAS_KINDS[bias.dtype])
