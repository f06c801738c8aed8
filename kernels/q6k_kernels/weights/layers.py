"""Layers on packed weights: PackedLinear and PackedEmbedding, in place of nn.Linear and nn.Embedding.

    head = PackedLinear.from_weight(weight)
    embed = PackedEmbedding.from_weight(weight, dtype=torch.bfloat16)

The tiles are a parameter `tiles`, uint8, without a gradient. Layers made from one `PackedWeight`, such as a
tied embedding and head, have the same parameter, so torch treats them like its own tied layers: they still share it
when a module that holds them is moved, copied (`copy.deepcopy`), or saved with `torch.save` and loaded again. A
state dict has the tiles under both names. Like torch's own, layers need tying again where torch makes parameters
anew: after `load_state_dict(assign=True)`, `to_empty` from the meta device, and conversions with
`torch.__future__.set_overwrite_module_params_on_conversion(True)`.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from q6k_kernels.formats.checks import Activations, check_activations, check_dtype
from q6k_kernels.formats.tiles import tiles_shape
from q6k_kernels.formats.types import DEFAULT, weight_type
from q6k_kernels.ops import schema
from q6k_kernels.weights import gradients
from q6k_kernels.weights.casting import Castable, Change, converted
from q6k_kernels.weights.weight import PackedWeight, check_packed, check_width

Device = torch.device | str | int | None


class _Packed(Castable):
    """A layer with a weight (N, K) as parameter `tiles`."""

    tiles: Tensor

    def __init__(self, n: int, k: int, format: str, device: Device) -> None:
        row = weight_type(format)
        if n < 1 or k < 1 or k % row.block:
            raise ValueError(
                f"expected one row of weights or more, each a multiple of {row.block} long; found {n} of {k}"
            )
        super().__init__()
        self._shape, self.format = (n, k), format
        zeros = torch.zeros(tiles_shape((n, k), row), dtype=torch.uint8, device=device)
        self.tiles = nn.Parameter(zeros, requires_grad=False)

    @property
    def weight(self) -> PackedWeight:
        """The weight; shares the layer's parameter."""
        return PackedWeight(self.tiles, self._shape, self.format)


def _matrix(weight: PackedWeight) -> tuple[int, ...]:
    """Return the shape (N, K) of a weight; raise ValueError for a stack, TypeError for a dense tensor."""
    check_packed(weight)
    if len(weight.shape) != 2:
        raise ValueError(f"weight: expected (N, K), found a stack {weight.shape}: take one, weight[expert]")
    return weight.shape


class PackedLinear(_Packed):
    """A linear layer y = x Wᵀ + bias on a packed weight, in place of nn.Linear; see `q6k_kernels.linear`.

    It begins with a weight of zeros; `load_state_dict` or `from_weight` give it another.

    Args:
        in_features: K, a multiple of the weight type's block, 32 or 256.
        out_features: N.
        bias: whether there is one, a parameter (N,).
        format: the name of the weight type, see `formats.types`.
        activations: "auto", "int8" or "bf16", see `q6k_kernels.linear`.
        device: device of the weight; "meta" is allowed.
        dtype: dtype of the bias: bfloat16, float16 or float32.

    Raises:
        ValueError: an argument is none of these.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        format: str = DEFAULT,
        activations: Activations = "auto",
        device: Device = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        check_dtype(dtype)
        check_activations(activations)
        super().__init__(out_features, in_features, format, device)
        self.in_features, self.out_features = in_features, out_features
        self.activations = activations
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def from_weight(
        cls, weight: PackedWeight, bias: Tensor | None = None, activations: Activations = "auto"
    ) -> Self:
        """Make a layer that shares the weight's parameter, and the bias's memory.

        Args:
            weight: (N, K).
            bias: bfloat16, float16 or float32 (N,), on the weight's device.
            activations: "auto", "int8" or "bf16".

        Raises:
            ValueError: a stack of weights, or a bias of another shape, dtype or device.
        """
        n, k = _matrix(weight)
        layer = cls(k, n, format=weight.format, activations=activations, device="meta")
        layer.tiles = weight.parameter()
        if bias is not None:
            check_dtype(bias.dtype)
            if bias.shape != (n,) or bias.device != weight.device:
                found = f"{tuple(bias.shape)} on {bias.device}"
                raise ValueError(f"bias: expected ({n},) on {weight.device}, found {found}")
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the transposed weight, plus the bias: (..., K) -> (..., N) of x's dtype."""
        check_width(x, self.in_features)
        product = gradients.linear if gradients.wanted(x, self.bias) else schema.linear
        return product(x, self.tiles, self.bias, self.out_features, self.format, self.activations)

    def extra_repr(self) -> str:
        """Return the text between the brackets of `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format!r}, activations={self.activations!r}"
        )


class PackedEmbedding(_Packed):
    """Rows of a packed weight by index, in place of nn.Embedding; see `q6k_kernels.embedding`.

    It begins with a weight of zeros; `load_state_dict` or `from_weight` give it another.

    Args:
        num_embeddings: N.
        embedding_dim: K, a multiple of the weight type's block, 32 or 256.
        format: the name of the weight type, see `formats.types`.
        device: device of the weight; "meta" is allowed.
        dtype: dtype of the rows: bfloat16, float16 or float32; another when the layer is converted, as by `to`.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        format: str = DEFAULT,
        device: Device = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        check_dtype(dtype)
        super().__init__(num_embeddings, embedding_dim, format, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = dtype

    @classmethod
    def from_weight(cls, weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> Self:
        """Make a layer that shares the parameter of a weight (N, K).

        Raises:
            ValueError: a stack of weights, or another dtype than bfloat16, float16 or float32.
        """
        n, k = _matrix(weight)
        layer = cls(n, k, format=weight.format, device="meta", dtype=dtype)
        layer.tiles = weight.parameter()
        return layer

    def forward(self, indices: Tensor) -> Tensor:
        """Return the rows at indices of any shape (...), as (..., K) of `dtype`."""
        return schema.embedding(
            indices, self.tiles, self.num_embeddings, self.embedding_dim, self.format, self.dtype
        )

    def _apply(self, fn: Change, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = converted(self.dtype, fn, self.tiles.device)
        return self

    def extra_repr(self) -> str:
        """Return the text between the brackets of `repr`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format!r}, dtype={self.dtype}"


class ScaledEmbedding(PackedEmbedding):
    """An embedding whose rows are multiplied by a factor, as in Gemma; it and they are rounded to `dtype`.

    Attributes:
        factor: the factor, not rounded.
    """

    factor: float

    @classmethod
    def from_scaled(cls, weight: PackedWeight, dtype: torch.dtype, factor: float) -> Self:
        """Make a layer that shares the parameter of a weight (N, K); see `PackedEmbedding.from_weight`."""
        layer = cls.from_weight(weight, dtype)
        layer.factor, layer._rounded = factor, rounded(factor, dtype)
        return layer

    def forward(self, indices: Tensor) -> Tensor:
        """Return the rows of indices of any shape, (..., K) in `dtype`."""
        return super().forward(indices) * self._rounded

    def _apply(self, fn: Change, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._rounded = rounded(self.factor, self.dtype)
        return self


def rounded(factor: float, dtype: torch.dtype) -> float:
    """Round a factor to a dtype."""
    return float(torch.tensor(factor, dtype=dtype))
