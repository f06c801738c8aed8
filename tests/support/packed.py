"""Random packed weights: their planes, the weight, and its numbers by the reference."""

from __future__ import annotations

import numpy as np
import torch

import oracles
from gguf_builder import q6k_blocks
from q6k_kernels.ops import reference
from q6k_kernels.weights.weight import PackedWeight


def planes(shape: tuple[int, ...], scales: str, seed: int = 5) -> dict[str, torch.Tensor]:
    """Random blocks as a bundle has them."""
    return planes_of(q6k_blocks(int(np.prod(shape)) // 256, seed), shape, scales)


def planes_of(blocks: bytes, shape: tuple[int, ...], scales: str) -> dict[str, torch.Tensor]:
    """Blocks as a bundle has them, by the per-element oracle."""
    dtypes = {"scale": torch.bfloat16 if scales == "bf16" else torch.int8, "steps": torch.float16}
    return {
        role: torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        .view(dtypes.get(role, torch.uint8))
        .view(*shape[:-1], -1)
        for role, raw in oracles.bundle_arrays(blocks, scales).items()
    }


def weight(shape: tuple[int, ...], scales: str = "bf16", seed: int = 5) -> PackedWeight:
    return PackedWeight.from_planes(**planes(shape, scales, seed))


def numbers(
    shape: tuple[int, ...], scales: str = "bf16", seed: int = 5, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """The same weights, by the reference."""
    flat = {role: plane.flatten(0, -2) for role, plane in planes(shape, scales, seed).items()}
    return reference.dequantize(**flat, dtype=dtype).view(shape)
