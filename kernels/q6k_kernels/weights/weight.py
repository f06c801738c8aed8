"""A packed weight as one object, and the operations on it as functions.

    y = linear(x, weight)              x (..., K), weight (N, K) -> (..., N)
    rows = embedding(indices, weight)      -> (..., K)
    w = dequantize(weight, torch.float32)  -> (N, K)

They run on the tensors' device, the CPU or a GPU. Weights have no gradient; x and bias of `linear` may.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from q6k_kernels.cuda import device as launching
from q6k_kernels.formats.checks import Activations
from q6k_kernels.formats.tiles import check_tiles, unpack
from q6k_kernels.formats.types import TILE_ROWS, WeightType, weight_type
from q6k_kernels.ops import schema
from q6k_kernels.weights import gradients


@dataclass(frozen=True, eq=False, repr=False)
class PackedWeight:
    """A weight (N, K), or a stack of them (E, N, K), packed as `formats.tiles` lays it out in memory.

    Attributes:
        tiles: uint8 (T, B, tile_bytes) or (E, T, B, tile_bytes). Read-only.
        shape: (N, K) or (E, N, K).
        format: the name of its weight type, see `formats.types`.

    Raises:
        ValueError: there is no such weight type, or tiles and shape do not agree.
    """

    tiles: Tensor
    shape: tuple[int, ...]
    format: str

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or self.tiles.ndim != len(self.shape) + 1:
            raise ValueError(
                f"shape: expected (N, K) with tiles of 3 dimensions or (E, N, K) with tiles of 4, found "
                f"{tuple(self.shape)} with tiles of {self.tiles.ndim}"
            )
        *stack, n, k = self.shape
        check_tiles(self.tiles, n, k, self.row, stack=True)
        if stack != list(self.tiles.shape[:-3]):
            raise ValueError(
                f"shape: expected {len(self.tiles)} weights for these tiles, found {tuple(self.shape)}"
            )
        object.__setattr__(self, "shape", (*stack, n, k))

    def parameter(self) -> nn.Parameter:
        """Return the tiles as a parameter without a gradient: one for all layers that are made from this weight.

        `tiles` itself becomes that parameter, so a weight and its layers stay one when a module moves them.
        """
        if not isinstance(self.tiles, nn.Parameter):
            object.__setattr__(self, "tiles", nn.Parameter(self.tiles, requires_grad=False))
        return cast("nn.Parameter", self.tiles)

    @property
    def n(self) -> int:
        """N: outputs of a linear layer, or rows of an embedding; that of each weight in a stack."""
        return self.shape[-2]

    @property
    def k(self) -> int:
        """K: inputs of a linear layer, or width of an embedding."""
        return self.shape[-1]

    @property
    def row(self) -> WeightType:
        """The weight type."""
        return weight_type(self.format)

    @property
    def device(self) -> torch.device:
        """The device of the tiles."""
        return self.tiles.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tiles, uint8."""
        return self.tiles.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tiles in bytes."""
        return self.tiles.nbytes

    def __repr__(self) -> str:
        size = f"{self.nbytes / (1 << 20):.1f} MiB"
        return f"PackedWeight({self.shape}, {self.format!r}, device='{self.device}', {size})"

    def __getitem__(self, expert: int) -> PackedWeight:
        """Return one weight (N, K) of a stack; it shares the stack's memory."""
        if len(self.shape) != 3:
            raise ValueError(f"only a stack (E, N, K) has experts to index, found {self.shape}; see `rows`")
        if not -self.shape[0] <= expert < self.shape[0]:
            raise IndexError(f"expert: expected 0 to {self.shape[0] - 1}, found {expert}")
        return PackedWeight(self.tiles[expert], self.shape[1:], self.format)

    def __iter__(self) -> Iterator[PackedWeight]:
        """Yield the weights of a stack."""
        return (self[expert] for expert in range(self.shape[0] if len(self.shape) == 3 else 1))

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Return the rows `start` to `stop` of a weight (N, K), which share its memory.

        Raises:
            ValueError: it is a stack, the range is empty, or an end is neither a multiple of 16 nor N.
        """
        if len(self.shape) != 2:
            raise ValueError(
                f"rows: expected a weight (N, K), found a stack {self.shape}: take one, weight[expert]"
            )
        if start % TILE_ROWS or not 0 <= start < stop <= self.n or (stop % TILE_ROWS and stop != self.n):
            raise ValueError(
                f"rows: expected 0 <= start < stop <= {self.n}, both multiples of {TILE_ROWS} "
                f"(or stop = {self.n}), found {start} to {stop}"
            )
        tiles = self.tiles[start // TILE_ROWS : -(-stop // TILE_ROWS)]
        return PackedWeight(tiles, (stop - start, self.k), self.format)

    @staticmethod
    def cat(weights: Sequence[PackedWeight]) -> PackedWeight:
        """Concatenate weights along N, such as q, k and v, or gate and up, to multiply with all at once.

        Args:
            weights: of the same weight type, K and (for stacks) E; N of all but the last is a multiple of 16.

        Raises:
            ValueError: they do not fit together.
        """
        if not weights:
            raise ValueError("weights: expected one or more, found none")
        first = weights[0]
        for at, weight in enumerate(weights):
            if (*weight.shape[:-2], weight.k, weight.format) != (*first.shape[:-2], first.k, first.format):
                raise ValueError(
                    f"weights: expected all but N as in {first.shape} of {first.format}, "
                    f"found {weight.shape} of {weight.format} at {at}"
                )
            if at < len(weights) - 1 and weight.n % TILE_ROWS:
                raise ValueError(
                    f"weights: expected N a multiple of {TILE_ROWS} for all but the last, found {weight.n} at {at}"
                )
        tiles = torch.cat([weight.tiles for weight in weights], dim=-3)
        if tiles.is_cuda:
            launching.end_write(tiles)
        return PackedWeight(tiles, (*first.shape[:-2], sum(weight.n for weight in weights), first.k), first.format)

    @staticmethod
    def from_planes(planes: Sequence[Tensor], format: str) -> PackedWeight:
        """Pack the arrays of a bundle, on their device.

        Args:
            planes: one tensor for each of the weight type's `arrays`, in that order: (N, width) or (E, N, width).
            format: the name of the weight type.

        Raises:
            ValueError: there is no such weight type, a dtype is wrong, or shapes or devices do not agree.
        """
        k = planes[0].shape[-1] * weight_type(format).arrays[0].weights
        return PackedWeight(schema.pack(planes, format), (*planes[0].shape[:-1], k), format)

    def planes(self) -> list[Tensor]:
        """Unpack the weight into the arrays of a bundle, as `from_planes` takes them."""
        return unpack(self.tiles, self.n, self.k, self.row)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the weights as numbers: (N, K) or (E, N, K) of bfloat16, float16 or float32, rounded once."""
        if len(self.shape) == 2:
            return schema.dequantize(self.tiles, self.n, self.k, self.format, dtype)
        result = torch.empty(self.shape, dtype=dtype, device=self.device)
        for expert, tiles in enumerate(self.tiles):
            result[expert] = schema.dequantize(tiles, self.n, self.k, self.format, dtype)
        return result

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> PackedWeight:
        """Return the weight on another device; itself if it is there already."""
        return self._with(self.tiles.to(device, non_blocking=non_blocking))

    def cuda(self) -> PackedWeight:
        """Return the weight on the current GPU."""
        return self.to("cuda")

    def cpu(self) -> PackedWeight:
        """Return the weight on the CPU."""
        return self.to("cpu")

    def pin_memory(self) -> PackedWeight:
        """Return the weight in page-locked CPU memory, from which `to(gpu, non_blocking=True)` does not block."""
        return self._with(self.tiles.pin_memory())

    def _with(self, tiles: Tensor) -> PackedWeight:
        return self if tiles is self.tiles else PackedWeight(tiles, self.shape, self.format)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weight as tensors, for safetensors: `tiles`, `shape` int64, `format` ASCII in uint8."""
        format = torch.frombuffer(bytearray(self.format.encode()), dtype=torch.uint8)
        shape = torch.tensor(self.shape, dtype=torch.int64)
        return {"tiles": self.tiles.detach(), "shape": shape, "format": format}

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> PackedWeight:
        """Make a weight from what `state_dict` returns.

        Raises:
            ValueError: the keys are not `tiles`, `shape` and `format`, or these do not agree.
        """
        if set(state) != {"tiles", "shape", "format"}:
            raise ValueError(f"state: expected tiles, shape, format, found {', '.join(sorted(state)) or 'nothing'}")
        name = bytes(state["format"].tolist()).decode("ascii", "replace")
        return PackedWeight(state["tiles"], tuple(state["shape"].tolist()), name)

    def __reduce__(self) -> tuple[Any, ...]:
        # By the constructor, so that a saved weight is checked when it is loaded.
        return PackedWeight, (self.tiles, self.shape, self.format)


def _from_file(tiles: Tensor, shape: tuple[int, ...], format: str) -> PackedWeight:
    """Make a weight for `torch.load(weights_only=True)`, which may not make objects around the constructor.

    It takes a tensor of its own, because a file can give another memory or shape to a tensor that it has loaded.
    """
    return PackedWeight(tiles.detach(), shape, format)


# Allows torch.load(weights_only=True), the default, to make one once this module is imported.
torch.serialization.add_safe_globals([(_from_file, f"{__name__}.PackedWeight")])


def check_width(x: Tensor, k: int) -> None:
    """Check that rows of x are k long; tiles alone do not tell, as they are padded.

    Raises:
        ValueError: they are not.
    """
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x: expected (..., {k}), found {tuple(x.shape)}")


def check_packed(weight: object) -> None:
    """Check that a weight is packed: a bundle also loads tensors that it stores dense.

    Raises:
        TypeError: it is not.
    """
    if isinstance(weight, PackedWeight):
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a PackedWeight, found {type(weight).__name__}")
    raise TypeError(
        f"weight: expected a PackedWeight, found a dense tensor of {weight.dtype} {tuple(weight.shape)}: the "
        "bundle stores it so, and its `info(name).format` is None; torch's own functions take it"
    )


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, activations: Activations = "auto"
) -> Tensor:
    """Multiply x with the transposed weight and add the bias: sums in fp32, rounded once (see `ops.reference`).

    Args:
        x: bfloat16 or float16 (..., K), on the CPU also float32; any strides, zero rows allowed.
        weight: (N, K), on x's device. On a GPU the tiles may be read while the kernel launched just before
            ends, so that kernel must not change them.
        bias: bfloat16, float16 or float32 (N,).
        activations: "int8" quantises x to 8 bits in groups of 32 and sums integers, for a few rows;
            "bf16" multiplies in x's own dtype; "auto" picks by the number of rows.

    Returns:
        New (..., N) of x's dtype.

    Raises:
        TypeError: the weight is a dense tensor.
        ValueError: a dtype, shape, device or option is wrong, the weight is a stack, or x or bias requires a
            gradient while gradients are recorded and activations are "int8".
    """
    check_packed(weight)
    check_width(x, weight.k)
    product = gradients.linear if gradients.wanted(x, bias) else schema.linear
    return product(x, weight.tiles, bias, weight.n, weight.format, activations)


def embedding(indices: Tensor, weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return rows of a weight as numbers.

    Args:
        indices: int64 or int32, any shape, each 0..N-1, on the weight's device.
        weight: (N, K).
        dtype: bfloat16, float16 or float32; rows are rounded once.

    Returns:
        New (..., K) of `dtype`.

    Raises:
        ValueError: a dtype, shape or device is wrong.
        IndexError: an index is out of range, on the CPU. On a GPU it stops the kernel, as in
            `torch.nn.functional.embedding`: the next call that waits for the GPU raises.
    """
    check_packed(weight)
    return schema.embedding(indices, weight.tiles, weight.n, weight.k, weight.format, dtype)


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the weights as numbers, as `PackedWeight.dequantize` does."""
    check_packed(weight)
    return weight.dequantize(dtype)
