"""Linear layers that share their input, run as one: q, k and v of attention, gate and up of a feed-forward network,
the input projections of a gated delta net.

Loading stacks the rows of their weights in one packed weight, so one launch computes all their products. A launch
reads weights of one type, for which its kernel is compiled: where types differ (in llama.cpp's mixtures v often has
more bits than q and k), neighbours of one type are stacked, and each stack takes a launch.
transformers' modules stay unchanged: a hook computes the product before the module's forward, and in place of its
projections the module has `Part`s, each of which returns a view of its columns of the product.

    attention(x)  ->  y = qkv_proj(x) and attention(y), in which q_proj(y) = y[..., :q], k_proj(y) = y[..., q:q+k]

A file may have a layer's inputs in another order than transformers (`ReorderedInput`).

Nothing is kept between calls and nothing depends on data, so modules can be compiled and captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from q6k_kernels.cuda import device as launching
from q6k_kernels.formats.checks import Activations
from q6k_kernels.formats.tiles import tiles_shape
from q6k_kernels.formats.types import TILE_ROWS, weight_type
from q6k_kernels.weights.layers import PackedLinear
from q6k_kernels.weights.weight import PackedWeight


@dataclass(frozen=True)
class Group:
    """Projections of one module that run as one, in the order of their stacked rows.

    Attributes:
        name: attribute of the fused layer.
        parts: attributes of the projections.
        without: attribute of a projection that the module must not have, for the group of those that have none.
        mixed: whether unpacked projections join the packed ones, each neighbours of them as one layer.
    """

    name: str
    parts: tuple[str, ...]
    without: str = ""
    mixed: bool = False


QKV = Group("qkv_proj", ("q_proj", "k_proj", "v_proj"))
QK = Group("qkv_proj", ("q_proj", "k_proj"), without="v_proj")
GATE_UP = Group("gate_up_proj", ("gate_proj", "up_proj"))
IN_PROJ = Group("in_proj", ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), mixed=True)
GROUPS = (QKV, QK, GATE_UP, IN_PROJ)


class Stacks(nn.Module):
    """Stacked projections of several weight types, as one layer: its product is those of all, one after the other.

    Args:
        layers: a layer for each stack, in the order of the projections.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the products with all weights, (..., K) -> (..., N), N that of all together."""
        return torch.cat([layer(x) for layer in self.layers], -1)


class Part(nn.Module):
    """The place of one projection in a fused product; it returns a view of its columns.

    Args:
        begin, end: its columns.
    """

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def forward(self, products: Tensor) -> Tensor:
        """Return this projection's columns, (..., end - begin), of the product of all, (..., N)."""
        return products[..., self.begin : self.end]

    def extra_repr(self) -> str:
        """Return the columns, for the module's printed form."""
        return f"{self.begin}:{self.end}"


class SiluInPlace(nn.Module):
    """SiLU, which writes over its input unless that has a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x sigmoid(x)."""
        return nn.functional.silu(x, inplace=not (torch.is_grad_enabled() and x.requires_grad))


class ReorderedInput(nn.Module):
    """A packed layer whose file has its inputs in another order.

    Args:
        linear: the layer.
        inputs: the input that each of its inputs is, int64 (K,).
    """

    inputs: Tensor

    def __init__(self, linear: PackedLinear, inputs: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("inputs", inputs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, (..., K) -> (..., N)."""
        y: Tensor = self.linear(x.index_select(-1, self.inputs))
        return y


def groups(model: nn.Module) -> Iterator[tuple[str, nn.Module, Group]]:
    """Yield name, module and group of each module that has all projections of a group as nn.Linear."""
    for name, module in model.named_modules():
        for group in GROUPS:
            complete = all(isinstance(getattr(module, part, None), nn.Linear) for part in group.parts)
            if complete and getattr(module, group.without, None) is None:
                yield name, module, group


def stacks(rows: Sequence[int], formats: Sequence[str | None]) -> list[slice]:
    """Divide projections into neighbours that can be stacked: of one type, each beginning at a tile boundary.

    Args:
        rows: N of each weight.
        formats: the name of each weight's type; None if it is not packed.

    Returns:
        The stacks as slices, in order.
    """
    begins = [
        at for at in range(len(rows)) if at == 0 or formats[at] != formats[at - 1] or rows[at - 1] % TILE_ROWS
    ]
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(rows)], strict=True)]


def join(
    rows: Sequence[int], k: int, format: str, load: Callable[[int], PackedWeight], device: torch.device
) -> PackedWeight:
    """Stack weights of the same type and K; only one of them at a time exists twice in memory.

    Args:
        rows: N of each weight; see `stacks`.
        k: K of all weights.
        format: the name of their weight type.
        load: returns weight number i, (rows[i], K), on the device.
        device: device of the weights and of the result.
    """
    shape, at = (sum(rows), k), 0
    tiles = torch.empty(tiles_shape(shape, weight_type(format)), dtype=torch.uint8, device=device)
    for index, count in enumerate(rows):
        end = at + -(-count // TILE_ROWS)
        tiles[at:end].copy_(load(index).tiles)
        at = end
    if tiles.is_cuda:
        launching.end_write(tiles)
    return PackedWeight(tiles, shape, format)


def fuse(
    module: nn.Module,
    group: Group,
    rows: Sequence[int],
    weights: Sequence[PackedWeight | Tensor],
    biases: Sequence[Tensor | None],
    activations: Activations = "auto",
) -> None:
    """Make a module run its projections as one.

    Args:
        module: a module of transformers. Its forward takes the input of the projections as its first argument or as
            `hidden_states`, and uses only its shape for anything else.
        group: the projections.
        rows: N of each projection.
        weights: each stack's weight, (sum of rows, K), packed or not.
        biases: (sum of rows,) or None for each stack.
        activations: see `PackedLinear`.
    """
    layers = [_layer(*each, activations) for each in zip(weights, biases, strict=True)]
    setattr(module, group.name, layers[0] if len(layers) == 1 else Stacks(layers))
    at = 0
    for part, count in zip(group.parts, rows, strict=True):
        setattr(module, part, Part(at, at + count))
        at += count
    module.register_forward_pre_hook(_HOOKS[group.name], with_kwargs=True)


def _layer(weight: PackedWeight | Tensor, bias: Tensor | None, activations: Activations) -> nn.Module:
    if isinstance(weight, PackedWeight):
        return PackedLinear.from_weight(weight, bias, activations)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _multiply(product: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if args:
        return (product(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": product(kwargs["hidden_states"])}


def _multiply_qkv(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _multiply(module.qkv_proj, args, kwargs)  # type: ignore[arg-type]


def _multiply_gate_up(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return _multiply(module.gate_up_proj, args, kwargs)  # type: ignore[arg-type]


def _multiply_in_proj(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return _multiply(module.in_proj, args, kwargs)  # type: ignore[arg-type]


# Module-level functions that find the fused layer by the module they are called for: so copies and pickles of a
# model use their own layers.
_HOOKS = {QKV.name: _multiply_qkv, GATE_UP.name: _multiply_gate_up, IN_PROJ.name: _multiply_in_proj}
