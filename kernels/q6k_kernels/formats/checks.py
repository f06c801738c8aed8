"""Checks of the operations' arguments: dtypes and shapes, with errors that state the rule and the value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from q6k_kernels.formats.types import WeightType

Activations = Literal["auto", "int8", "bf16"]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of activations and biases."""
PLANE_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "BF16": torch.bfloat16, "F16": torch.float16}
"""torch's dtype of an array, by safetensors' name."""


def check_planes(planes: Sequence[Tensor], row: WeightType, *, stack: bool = False) -> tuple[int, ...]:
    """Check planes and return the shape of their weight: (N, K), or (E, N, K) of a stack.

    Args:
        planes: one tensor for each of `row.arrays`, in that order.
        row: their weight type.
        stack: whether (E, N, K) is allowed.

    Raises:
        ValueError: there are too few or too many planes, a dtype is wrong, or the shapes do not agree.
    """
    if len(planes) != len(row.arrays):
        raise ValueError(f"planes: {row.name} has {', '.join(row.roles)}; found {len(planes)} tensors")
    first, codes = row.arrays[0], planes[0]
    if (
        codes.ndim not in ((2, 3) if stack else (2,))
        or codes.dtype != PLANE_DTYPES[first.dtype]
        or not codes.numel()
        or codes.shape[-1] * first.weights % row.block
    ):
        width = f"K/{first.weights}"
        shapes = f"(N, {width}) or (E, N, {width})" if stack else f"(N, {width})"
        raise ValueError(
            f"{first.role}: expected {plain(PLANE_DTYPES[first.dtype])} {shapes}, N >= 1, K a multiple of "
            f"{row.block}, found {found(codes)}"
        )
    lead, k = tuple(codes.shape[:-1]), codes.shape[-1] * first.weights
    for array, tensor in zip(row.arrays[1:], planes[1:], strict=True):
        dtype, shape = PLANE_DTYPES[array.dtype], (*lead, k // array.weights)
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{array.role} of {row.name}: with {first.role} of shape {tuple(codes.shape)} expected "
                f"{plain(dtype)} {shape}, found {found(tensor)}"
            )
    return *lead, k


def check_input(x: Tensor, n: int, k: int, bias: Tensor | None, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Check that x, of one of `dtypes`, and bias fit weights (N, K).

    Raises:
        ValueError: a dtype or shape is wrong.
    """
    if x.ndim == 0 or x.dtype not in dtypes or x.shape[-1] != k:
        raise ValueError(f"x: expected {either(dtypes)} (..., {k}), found {found(x)}")
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,)):
        raise ValueError(f"bias: expected {either(FLOATS)} ({n},), found {found(bias)}")


def check_dtype(dtype: torch.dtype) -> None:
    """Check that weights can be rounded to `dtype`; raise ValueError if not."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected {either(FLOATS)}, found {dtype}")


def check_activations(activations: str) -> None:
    """Check that `activations` is "auto", "int8" or "bf16"; raise ValueError if not."""
    if activations not in ("auto", "int8", "bf16"):
        raise ValueError(f"activations: expected auto, int8 or bf16, found {activations!r}")


def either(dtypes: tuple[torch.dtype, ...]) -> str:
    """Name dtypes in words: "bfloat16 or float16"."""
    *others, last = map(plain, dtypes)
    return f"{', '.join(others)} or {last}"


def plain(dtype: torch.dtype) -> str:
    """Name a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def found(tensor: Tensor) -> str:
    """Describe a tensor by its dtype and shape."""
    return f"{plain(tensor.dtype)} {tuple(tensor.shape)}"
