"""Layers with weights of a byte each, which CPUs multiply with quickly; see `ops.products`.

They take the place of `PackedLinear`, `PackedEmbedding` and `PackedStack` in a model on a CPU. Their tensors are
buffers: scales in fp32 would, as parameters, pass for the model's dtype. Layers made of one weight share them.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from q6k_kernels.ops import products
from q6k_kernels.ops.products import Bytes
from q6k_kernels.weights.casting import Castable, Change, converted
from q6k_kernels.weights.layers import rounded
from q6k_kernels.weights.weight import PackedWeight


def bytes_of(weight: PackedWeight) -> Bytes:
    """Turn a packed weight (N, K), or a stack (E, N, K) as (E * N, K), into weights of a byte each."""
    tiles, (*stack, n, k) = weight.tiles.detach(), weight.shape
    if not stack:
        return products.of_tiles(tiles, n, k, weight.row)
    each = [products.of_tiles(of_one, n, k, weight.row) for of_one in tiles]
    least = [one.least for one in each if one.least is not None]
    codes, scale = torch.cat([one.codes for one in each]), torch.cat([one.scale for one in each])
    return Bytes(codes, scale, torch.cat(least) if least else None)


class _OfBytes(Castable):
    """A layer whose weight has a byte each."""

    kept = ("codes", "scale", "least")

    codes: Tensor
    scale: Tensor
    least: Tensor | None

    def __init__(self, weight: Bytes) -> None:
        super().__init__()
        for name in ("codes", "scale", "least"):
            self.register_buffer(name, getattr(weight, name))

    @property
    def weight(self) -> Bytes:
        """The weight; shares the layer's buffers."""
        return Bytes(self.codes, self.scale, self.least)

    def extra_repr(self) -> str:
        """Return the text between the brackets of `repr`."""
        return f"codes={tuple(self.codes.shape)}, group={self.codes.shape[1] // self.scale.shape[1]}"


class ByteLinear(_OfBytes):
    """A linear layer y = x Wᵀ + bias, in place of `PackedLinear` on a CPU.

    Args:
        weight: (N, K).
        bias: (N,), or None.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Bytes, bias: nn.Parameter | None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.codes.shape
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the transposed weight, plus the bias: (..., K) -> (..., N) of x's dtype."""
        return products.linear(x, self.weight, self.bias)


class ByteEmbedding(_OfBytes):
    """Rows of a weight by index, in place of `PackedEmbedding` on a CPU.

    Args:
        weight: (N, K).
        dtype: dtype of the rows.
        factor: factor of the rows; it and they are rounded to the dtype. None for none.
    """

    def __init__(self, weight: Bytes, dtype: torch.dtype, factor: float | None) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.codes.shape
        self.dtype, self.factor = dtype, factor
        self._rounded = None if factor is None else rounded(factor, dtype)

    def forward(self, indices: Tensor) -> Tensor:
        """Return the rows at indices of any shape (...), as (..., K) of `dtype`."""
        rows = products.embedding(indices, self.weight, self.dtype)
        return rows if self._rounded is None else rows * self._rounded

    def _apply(self, fn: Change, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = converted(self.dtype, fn, self.codes.device)
        self._rounded = None if self.factor is None else rounded(self.factor, self.dtype)
        return self


class ByteStack(_OfBytes):
    """A stack of linear layers of which each row of activations meets some, in place of `PackedStack` on a CPU.

    Args:
        weight: (E * N, K).
        count: E.
        bias: (E, N), or None.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Bytes, count: int, bias: nn.Parameter | None) -> None:
        super().__init__(weight)
        self.count, self.bias = count, bias
        self.out_features, self.in_features = len(weight.codes) // count, weight.codes.shape[1]

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Multiply each row with the weights of its experts, as `PackedStack.forward` does.

        Raises:
            IndexError: there is no such expert.
        """
        chosen, top, n = experts.reshape(-1), experts.shape[1], self.out_features
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.count:
            raise IndexError(f"experts: expected 0 to {self.count - 1}, found others")
        rows_of_x = x.reshape(-1, self.in_features)
        y = x.new_empty(len(chosen), n)
        for expert in sorted(set(chosen.tolist())):
            pairs = (chosen == expert).nonzero()[:, 0]
            rows = rows_of_x[pairs if x.ndim == 3 else pairs // top]
            bias = None if self.bias is None else self.bias[expert]
            y[pairs] = products.linear(rows, self.weight.rows(slice(expert * n, (expert + 1) * n)), bias)
        return y.view(*experts.shape, n)
