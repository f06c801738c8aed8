"""Keys and values of 8 bits: a code for each value, and a scale for each head and token.

    scale = largest / 127    code = value * (127 / largest), rounded to the nearest, half to even

Some values of a head's keys stand out, always the same. So keys and queries are mixed before, which leaves their
products as they are: a Hadamard transform of as many neighbours as the largest power of two that divides the size.
Where they have norms, the norms first make them alike in size, see `balancing`.

`largest` is the largest magnitude in the head's key or value, at least `LEAST`. All is in fp32, each operation
rounded; the kernels (`cuda/codes.cuh`) compute the same numbers. A token sees keys and values, its own too, as the
cache holds them; so results do not depend on how a prompt is divided into chunks.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

MOST = 127
LEAST = 2.0**-100
"""Keeps both quotients finite where all values are 0."""
CacheType = Literal["model", "int8"]
"""The numbers that a cache holds: those of the model's dtype, or codes of 8 bits."""
CACHE_TYPES: tuple[CacheType, ...] = get_args(CacheType)
FEW_SLOTS: dict[CacheType, int] = {"model": 16384, "int8": 4096}
"""Slots up to which a step reads few: its attention then has other blocks than for many, and a graph of its own."""


def mixed(vectors: Tensor) -> Tensor:
    """Return the Hadamard transform of vectors (..., dim), divided by the root of its size, in their dtype."""
    dim = vectors.shape[-1]
    together, apart, values = dim & -dim, 1, vectors.float()
    while apart < together:
        one, other = values.reshape(*vectors.shape[:-1], -1, 2, apart).unbind(-2)
        values = torch.stack([one + other, one - other], -2)
        apart *= 2
    found: Tensor = values.mul(together**-0.5).view(vectors.shape).to(vectors.dtype)
    return found


def coded(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, int8 (..., dim), and scales, float32 (...), of vectors (..., dim)."""
    values = vectors.float()
    largest = values.abs().amax(-1).clamp_min(LEAST)
    codes = (values * (MOST / largest)[..., None]).round().to(torch.int8)
    return codes, largest / MOST


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the vectors that codes and scales stand for, float32 (..., dim)."""
    return codes.float() * scales[..., None]
