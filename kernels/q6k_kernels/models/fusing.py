"""Linear layers that share their input, run as one: q, k and v of attention, gate and up of a feed-forward network.

The rows of their weights lie below each other in one packed weight, put there as they are loaded, and one launch
multiplies them all. transformers' modules stay as they are: a hook multiplies before the module begins, and what it
takes for its projections are parts that take views out of the product.

    attention(x)  ->  y = qkv_proj(x) and attention(y), in which q_proj(y) = y[..., :q], k_proj(y) = y[..., q:q+k]

Nothing is kept between calls, nothing depends on data, so that it compiles and is captured in CUDA graphs.
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
    """Projections of one module, in the order in which their rows are put below each other.

    Attributes:
        name: of the whole.
        parts: of each.
    """

    name: str
    parts: tuple[str, ...]


QKV = Group("qkv_proj", ("q_proj", "k_proj", "v_proj"))
GATE_UP = Group("gate_up_proj", ("gate_proj", "up_proj"))


class Part(nn.Module):
    """Takes a projection's outputs, a view, out of the product of all.

    Args:
        begin, end: which columns.
    """

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def forward(self, products: Tensor) -> Tensor:
        """(..., N of all) -> (..., N of this one)."""
        return products[..., self.begin : self.end]

    def extra_repr(self) -> str:
        """What is shown between the brackets."""
        return f"{self.begin}:{self.end}"


def groups(model: nn.Module) -> Iterator[tuple[str, nn.Module, Group]]:
    """Modules that have all the projections of a group, each an nn.Linear: name, module, group."""
    for name, module in model.named_modules():
        for group in (QKV, GATE_UP):
            if all(isinstance(getattr(module, part, None), nn.Linear) for part in group.parts):
                yield name, module, group


def can_join(rows: Sequence[int]) -> bool:
    """Whether weights with that many rows each can be one: each but the first has to begin with new tiles."""
    return len(rows) > 1 and all(count % TILE_ROWS == 0 for count in rows[:-1])


def join(
    rows: Sequence[int], k: int, format: str, load: Callable[[int], PackedWeight], device: torch.device
) -> PackedWeight:
    """Put weights of the same type and K below each other, of which only one at a time exists a second time.

    Args:
        rows: N of each; see `can_join`.
        k: K.
        format: the name of their weight type.
        load: gives weight number i, (rows[i], K), on the device.
        device: where they are.
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
    weight: PackedWeight,
    bias: Tensor | None,
    activations: Activations = "auto",
) -> None:
    """Makes a module run its projections as one.

    Args:
        module: of transformers, whose forward takes `hidden_states`, or what it multiplies, as its first argument,
            and uses it for nothing but these projections and its shape.
        group: which projections.
        rows: N of each.
        weight: all of them, (sum of rows, K).
        bias: (sum of rows,), or None.
        activations: see `PackedLinear`.
    """
    setattr(module, group.name, PackedLinear.from_weight(weight, bias, activations))
    at = 0
    for part, count in zip(group.parts, rows, strict=True):
        setattr(module, part, Part(at, at + count))
        at += count
    module.register_forward_pre_hook(_HOOKS[group.name], with_kwargs=True)


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


# Functions of this module, that find the layer by the module they are called for: so copies and pickles of a model
# use their own layers.
_HOOKS = {QKV.name: _multiply_qkv, GATE_UP.name: _multiply_gate_up}
