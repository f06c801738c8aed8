"""Gradients through products with packed weights, for what is trained around them; the weights stay as they are.

The operations have none: the check for one would cost time at every call. Layers and `linear` come here if one is
asked for. The product is that with 16-bit activations, as rounding to 8 bits has no gradient. The gradient of x is
dy W, with W in x's dtype, summed in fp32 and rounded once to x's dtype; that of the bias is the sum of dy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q6k_kernels.formats.checks import Activations
from q6k_kernels.formats.types import TILE_ROWS
from q6k_kernels.ops import grouped, schema

ROWS = 1 << 14
"""Rows of a weight that are dequantised at a time."""


def wanted(x: Tensor, bias: Tensor | None) -> bool:
    """Check whether a gradient of x or the bias is to be recorded."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def linear(x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, format: str, activations: Activations) -> Tensor:
    """Multiply as `schema.linear` does, and record the gradient.

    Raises:
        ValueError: activations are "int8", or as by `schema.linear`.
    """
    _check(activations)
    y: Tensor = _Linear.apply(x, tiles, bias, n, format)  # type: ignore[no-untyped-call]
    return y


def experts(
    x: Tensor, tiles: Tensor, chosen: Tensor, bias: Tensor | None, n: int, format: str, activations: Activations
) -> Tensor:
    """Multiply as `grouped.experts` does, and record the gradient of x.

    Raises:
        ValueError: activations are "int8", a bias requires a gradient, or as by `grouped.experts`.
    """
    _check(activations)
    if bias is not None and bias.requires_grad:
        raise ValueError("bias requires a gradient, and those of experts have none: pass bias.detach()")
    y: Tensor = _Experts.apply(x, tiles, chosen, bias, n, format)  # type: ignore[no-untyped-call]
    return y


def _check(activations: Activations) -> None:
    if activations == "int8":
        raise ValueError('activations: expected "bf16" or "auto" where a gradient is recorded, found "int8"')


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, format: str) -> Tensor:
        ctx.save_for_backward(tiles)
        ctx.sizes, ctx.bias_dtype = (n, x.shape[-1], format), None if bias is None else bias.dtype
        y = schema.linear(x, tiles, bias, n, format, "bf16")
        return y.clone() if y._is_view() else y  # of a view made here autograd lets nothing be written over

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (tiles,) = gradients, ctx.saved_tensors
        dx = _product(dy, tiles, *ctx.sizes) if ctx.needs_input_grad[0] else None
        over = tuple(range(dy.ndim - 1))
        bias = dy.float().sum(over).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, None, bias, None, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tiles: Tensor, chosen: Tensor, bias: Tensor | None, n: int, format: str
    ) -> Tensor:
        ctx.save_for_backward(tiles, chosen)
        ctx.sizes, ctx.shape = (n, x.shape[-1], format), x.shape
        y = grouped.experts(x, tiles, chosen, bias, n, format, "bf16")
        return y.clone() if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (tiles, chosen) = gradients, ctx.saved_tensors
        flat, of_pairs = chosen.reshape(-1), dy.reshape(-1, dy.shape[-1])
        dx = dy.new_empty(len(flat), ctx.sizes[1], dtype=torch.float32)
        for expert in flat.unique().tolist():
            pairs = (flat == expert).nonzero()[:, 0]
            dx[pairs] = _sums(of_pairs[pairs], tiles[expert], *ctx.sizes)
        dx = dx.view(*chosen.shape, -1)
        return (dx if len(ctx.shape) == 3 else dx.sum(1)).to(dy.dtype), None, None, None, None, None


def _product(dy: Tensor, tiles: Tensor, n: int, k: int, format: str) -> Tensor:
    return _sums(dy.reshape(-1, n), tiles, n, k, format).to(dy.dtype).view(*dy.shape[:-1], k)


def _sums(dy: Tensor, tiles: Tensor, n: int, k: int, format: str) -> Tensor:
    """Return dy W, (M, n) -> (M, k), in fp32; only some rows of W are numbers at a time."""
    total = torch.zeros(len(dy), k, dtype=torch.float32, device=dy.device)
    for begin in range(0, n, ROWS):
        end = min(begin + ROWS, n)
        part = tiles[begin // TILE_ROWS : -(-end // TILE_ROWS)]
        weight = schema.dequantize(part, end - begin, k, format, dy.dtype)
        left = dy[:, begin:end]
        # A GPU's products of 16 bits sum in fp32; a CPU's are slow.
        total += (left @ weight).float() if dy.is_cuda else left.float() @ weight.float()
    return total
