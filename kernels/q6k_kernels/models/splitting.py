"""Which part of each layer a rank has: transformers' plan of tensor parallelism, applied to packed weights.

    a group of heads     rows of q, k and v, and the same columns of the output projection
    blocks of a network  rows of gate and up, and the same columns of down
    other matrices       rows or columns, where the plan names them alone
    words                rows of the embedding and of the head
    experts              whole experts of a stack, whatever the plan says of their rows

Heads that share keys and values stay together, and so do the weights of a block of `down`: no block is cut. Where
a head's columns of the output projection begin inside a block, two ranks have that block, each with zeros as the
inputs of the other's columns. Units that do not divide are spread unevenly. Fewer units than ranks stay whole on
every rank, as does what the plan does not name, and what a file has in another order than transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.formats.types import TILE_ROWS
from q6k_kernels.models import mixtures
from q6k_kernels.models.matching import HEAD
from q6k_kernels.models.ranks import Ranks, Share
from q6k_kernels.models.stored import AS_IT_IS, INTERLEAVED, Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 32
"""Inputs that are rounded to 8 bits together, see `ops.reference`: they stay together, so that they are rounded as
on one GPU."""
_ROWS, _COLUMNS = ("colwise_gather_output", "colwise_rep"), ("rowwise_split_input", "rowwise_rep")
"""transformers' names of plans for layers that have all inputs and give all outputs."""
_OURS = "q6k_unchanged"


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """Return the ranks among which `from_pretrained` is to divide a model; None if there is but one.

    Raises:
        UnsupportedModelError: it is to be divided in a way that packed weights cannot be.
    """
    asked: Any = getattr(model.config, "distributed_config", None)
    if asked is None:
        return None
    others = ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size")
    if more := [name for name in others if (getattr(asked, name, None) or 1) > 1]:
        raise UnsupportedModelError(f"{more[0]}: packed weights are divided by tp_size alone", "Leave it out.")
    if (asked.tp_size or 1) == 1:
        return None
    if asked.tp_plan not in (None, "auto"):
        raise UnsupportedModelError("tp_plan: packed weights are divided by the model's own plan", "Take 'auto'.")
    if dist.get_world_size() != asked.tp_size:
        raise UnsupportedModelError(
            f"tp_size: expected that of the default group, {dist.get_world_size()}, found {asked.tp_size}",
            "Start as many processes as there are parts.",
        )
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave_to_us(model: PreTrainedModel) -> None:
    """Give a model a plan by which transformers divides nothing: it names all layers, so no warning lists any."""
    from transformers.distributed import tensor_parallel

    styles: Any = tensor_parallel.ALL_PARALLEL_STYLES  # type: ignore[attr-defined]

    class Unchanged(tensor_parallel.TensorParallelLayer):
        """A style that changes nothing."""

        def install_forward(self, module: nn.Module, *_: Any, **__: Any) -> nn.Module:
            """Return the module."""
            return module

    styles.register(_OURS, Unchanged())
    named = [name for name, module in model.named_modules() if name and [*module.parameters(recurse=False)]]
    model._tp_plan = dict.fromkeys(map(in_all_layers, named), _OURS)


@dataclass(frozen=True)
class Splitter:
    """The division of one model.

    Attributes:
        model: the model on the meta device.
        ranks: the ranks.
        plan: transformers' plan, a style for each name of a module, with * for the number of a layer.
        block: returns the length of the blocks of a module's weight, 1 if it is not packed.
        stored: returns how a module's weight is stored.
    """

    model: PreTrainedModel
    ranks: Ranks
    plan: dict[str, str]
    block: Callable[[str], int]
    stored: Callable[[str], Stored]

    def parts(self) -> dict[str, Share]:
        """Return the part of each divided layer, by its name."""
        found = dict[str, Share]()
        for name, module in self.model.named_modules():
            if mixtures.is_mixture(module) or isinstance(module, mixtures.ClampedExperts):
                found |= self._experts(name, module)
            elif not name.endswith(".linear_attn"):
                found |= self._layers(name, module)
        return found | self._words()

    def _experts(self, name: str, module: nn.Module) -> dict[str, Share]:
        own = self._share(len(module.get_parameter(mixtures.DOWN)))
        return {name: Share("experts", own.start, own.stop)} if own else {}

    def _layers(self, name: str, module: nn.Module) -> dict[str, Share]:
        """Divide the matrices that are attributes of a module."""
        layers = {
            (f"{name}.{attribute}", self._style(f"{name}.{attribute}")): each
            for attribute, each in module.named_children()
            if isinstance(each, nn.Linear) and name
        }
        rows = {of: each for (of, style), each in layers.items() if style == "colwise"}
        columns = {of: each for (of, style), each in layers.items() if style == "rowwise"}
        found = self._together(module, rows, columns) if rows and len(columns) == 1 else {}
        for (of, style), each in layers.items():
            if style in _ROWS and self.stored(of) == AS_IT_IS:
                found |= self._rows(of, each.out_features)
            elif style in _COLUMNS and self.stored(of) == AS_IT_IS:
                block = max(GROUP, self.block(of))
                found |= self._columns({of: each}, each.in_features // block, "columns")
        return found

    def _together(
        self, module: nn.Module, rows: dict[str, nn.Linear], columns: dict[str, nn.Linear]
    ) -> dict[str, Share]:
        """Divide matrices of which the last has the others' outputs as inputs: of attention, or of a network."""
        [(of, last)] = columns.items()
        head: int | None = getattr(module, "head_dim", None)
        unit = max(GROUP, self.block(of)) if head is None else head * int(module.num_key_value_groups)  # type: ignore[arg-type]
        units = last.in_features // unit
        own = self._share(units)
        if (
            own is None
            or any(self.stored(each) not in (AS_IT_IS, INTERLEAVED) for each in (*rows, of))
            or any(each.out_features % units for each in rows.values())
            or (head is not None and not _of_any_head(module, head))
        ):
            return {}
        size = {each: layer.out_features // units for each, layer in rows.items()}
        found = {each: Share("rows", own.start * count, own.stop * count) for each, count in size.items()}
        return found | self._columns(columns, units, "own columns")

    def _columns(self, columns: dict[str, nn.Linear], units: int, way: Any) -> dict[str, Share]:
        [(of, layer)] = columns.items()
        own = self._share(units)
        if own is None:
            return {}
        size, block = layer.in_features // units, self.block(of)
        begin = own.start * size
        end = own.stop * size if own.stop < units else layer.in_features
        cut = any(each.start * size % block for each in self.ranks.shares(units))
        return {of: Share(way, begin, end, begin % block, -end % block, cut)}

    def _rows(self, of: str, count: int) -> dict[str, Share]:
        tiles = -(-count // TILE_ROWS)
        own = self._share(tiles)
        if own is None:
            return {}
        ends = [min(count, each.stop * TILE_ROWS) for each in self.ranks.shares(tiles)]
        counts = tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))
        return {of: Share("gathered rows", own.start * TILE_ROWS, ends[self.ranks.rank], counts=counts)}

    def _words(self) -> dict[str, Share]:
        """Divide the words of head and embedding alike, as they may be one."""
        head: Any = self.model.get_submodule(HEAD)
        if self._style(HEAD) not in _ROWS or not (found := self._rows(HEAD, head.out_features)):
            return {}
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        own = found[HEAD]
        return {HEAD: own, name: Share("words", own.begin, own.end, counts=own.counts)}

    def _share(self, units: int) -> range | None:
        """Return this rank's units; None if there are fewer than ranks."""
        return self.ranks.shares(units)[self.ranks.rank] if units >= self.ranks.size else None

    def _style(self, module: str) -> str | None:
        return self.plan.get(in_all_layers(module))


def in_all_layers(module: str) -> str:
    """Return a module's name as plans have it, with * for the number of a layer."""
    return ".".join("*" if part.isdecimal() else part for part in module.split("."))


def _of_any_head(module: nn.Module, head: int) -> bool:
    """Check that what an attention has beside its matrices is the same for all heads, such as a head's norm."""
    return all(tuple(each.shape) == (head,) for each in _beside_matrices(module))


def _beside_matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, nn.Linear):
            yield from child.parameters()
