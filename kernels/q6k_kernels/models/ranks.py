"""What a layer does whose weight is divided among the ranks of torch.distributed, one GPU each.

    rows      of a matrix: a rank has some of the outputs; where all ranks need all of them, they are gathered
    columns   of a matrix: a rank has some of the inputs, and the ranks' products are summed
    words     of an embedding: a rank finds its own words' rows, and the ranks' rows are summed
    experts   of a mixture: a rank computes its own experts, and the ranks' outputs are summed

A sum of parts is one of numbers of the model's dtype, each rounded once. Everything else is what one GPU computes.
All collectives are those of the default group, in an order that depends on no data, so steps can be captured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.weights.transfer import Piece

Way = Literal["rows", "gathered rows", "columns", "own columns", "words", "experts"]
"""How a layer is divided. "own columns": of its inputs a rank has only those of its columns."""


_DIVIDED = "q6k_divided"
"""Name of the attribute that divided models have."""
_SHARE = "q6k_share"
"""Name of the attribute of a matrix that is divided."""


@dataclass(frozen=True)
class Ranks:
    """The ranks: which of them this process is, and how many there are."""

    rank: int
    size: int

    def shares(self, units: int) -> list[range]:
        """Divide units among the ranks: the first ones have one more where they do not divide."""
        least, more = divmod(units, self.size)
        ends = [rank * least + min(rank, more) for rank in range(self.size + 1)]
        return [range(*pair) for pair in pairwise(ends)]


@dataclass(frozen=True)
class Share:
    """The part of a layer that a rank has.

    Attributes:
        way: how the layer is divided.
        begin, end: the rank's rows, columns, words or experts.
        left, right: columns of the same blocks before and after the rank's; their inputs count as zeros.
        cut: whether any rank's columns begin inside a block.
        counts: the rows of each rank, where they are gathered.
    """

    way: Way
    begin: int
    end: int
    left: int = 0
    right: int = 0
    cut: bool = False
    counts: tuple[int, ...] = ()

    @property
    def of_columns(self) -> bool:
        """Whether the layer's inputs are divided."""
        return self.way in ("columns", "own columns")

    def piece(self, rows: int) -> Piece:
        """Return what is read of a weight with so many rows."""
        if self.of_columns:
            return Piece(0, rows, (self.begin - self.left, self.end + self.right))
        return Piece(self.begin, self.end)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the rank's part of a parameter, of a bias if it has one dimension."""
        if self.of_columns:
            return (*whole[:-1], self.left + self.end - self.begin + self.right) if len(whole) == 2 else whole
        return (self.end - self.begin, *whole[1:])


def shapes_of_parts(
    model: nn.Module, parts: Mapping[str, Share], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters with those of the parts that this rank has.

    Of a bias that is added to a sum, the first rank has all, and the others have none: those lose it here.
    """
    found = dict(shapes)
    for name, part in parts.items():
        if part.of_columns and part.begin and f"{name}.bias" in found:
            model.get_submodule(name).register_parameter("bias", None)
            del found[f"{name}.bias"]
        for parameter in (f"{name}.weight", f"{name}.bias"):
            if parameter in found:
                found[parameter] = part.shape(shapes[parameter])
    return found


def connect(model: nn.Module, parts: Mapping[str, Share]) -> None:
    """Make layers that have a part of their weight return what the whole layer would.

    Args:
        model: the model, filled.
        parts: each divided layer's part, by its name.
    """
    if parts:
        model.__dict__[_DIVIDED] = True
    for name, part in parts.items():
        module = model.get_submodule(name)
        if part.way == "experts":
            if hasattr(module, "num_experts"):  # transformers' own, of weights that are not packed
                module.num_experts = part.end - part.begin  # type: ignore[assignment]
            model.set_submodule(name, SpreadExperts(module, part.begin, part.end - part.begin))
        elif part.way == "words":
            model.set_submodule(name, SpreadWords(module, part, sum(part.counts)))
        elif part.way == "gathered rows" or part.of_columns:
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
            setattr(module, _SHARE, part)
            module.register_forward_pre_hook(_given)
            module.register_forward_hook(_joined)


class SpreadWords(nn.Module):
    """An embedding of which this rank has some words.

    Attributes:
        num_embeddings: words of all ranks.

    Args:
        rows: the embedding of the rank's words.
        part: which words these are.
        words: words of all ranks.
    """

    def __init__(self, rows: nn.Module, part: Share, words: int) -> None:
        super().__init__()
        self.rows, self.num_embeddings = rows, words
        self.begin, self.own = part.begin, part.end - part.begin
        if isinstance(rows, nn.Embedding):
            rows.num_embeddings, rows.padding_idx = self.own, None

    def forward(self, indices: Tensor) -> Tensor:
        """Return the rows at indices of any shape (...), as (..., K)."""
        local = indices - self.begin
        is_own = (local >= 0) & (local < self.own)
        rows: Tensor = self.rows(torch.where(is_own, local, 0))
        return summed(torch.where(is_own[..., None], rows, 0))


class SpreadExperts(nn.Module):
    """The experts of a mixture of which this rank has some; called as they are.

    Another rank's expert becomes one that the token has here, with a weight of zero: so no weights are read for it.

    Args:
        experts: the rank's experts.
        begin: the first of them.
        count: their number.
    """

    def __init__(self, experts: nn.Module, begin: int, count: int) -> None:
        super().__init__()
        self.experts, self.begin, self.count = experts, begin, count

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of all experts' outputs, see `PackedExperts`."""
        return summed(self.experts(hidden_states, *self.here(top_k_index, top_k_weights)))

    def here(self, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rank's experts in place of all ranks', and their weights."""
        local = top_k_index - self.begin
        is_own = (local >= 0) & (local < self.count)
        instead = torch.where(is_own, local, 0).amax(-1, keepdim=True)
        return torch.where(is_own, local, instead), torch.where(is_own, top_k_weights, 0)


def _given(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the inputs of a layer's columns, with zeros as those of other ranks' columns."""
    share: Share = getattr(module, _SHARE)
    x = inputs[0][..., share.begin : share.end] if share.way == "columns" else inputs[0]
    return pad(x, (share.left, share.right)) if share.left or share.right else x


def _joined(module: nn.Module, _inputs: Any, y: Tensor) -> Tensor:
    return joined(module, y)


def joined(module: nn.Module, y: Tensor) -> Tensor:
    """Return the product of a whole matrix, of that of a layer's own part.

    Args:
        module: a layer, divided or not; its hooks do the same.
        y: what it computes without hooks, (..., N); a sum takes its place.
    """
    share: Share | None = module.__dict__.get(_SHARE)  # nn.Module looks long for what is not there
    if share is None:
        return y
    if share.of_columns:
        return summed(y)
    _check_no_gradient(y)
    own = pad(y, (0, max(share.counts) - y.shape[-1])).contiguous()
    every = [torch.empty_like(own) for _ in share.counts]
    dist.all_gather(every, own)
    return torch.cat([of_rank[..., :count] for of_rank, count in zip(every, share.counts, strict=True)], -1)


def summed(y: Tensor) -> Tensor:
    """Sum a new tensor over the ranks."""
    _check_no_gradient(y)
    dist.all_reduce(y)
    return y


def is_divided(model: nn.Module) -> bool:
    """Check whether a model is divided among ranks."""
    return bool(model.__dict__.get(_DIVIDED))


def no_step(model: nn.Module) -> str:
    """Return what of a divided model our own step does not compute, alike on all ranks; nothing if it does all."""
    for module in model.modules():
        share: Share | None = getattr(module, _SHARE, None)
        if share is not None and share.of_columns and (share.cut or share.way == "columns"):
            return "columns of several ranks in one block, or of an input that all ranks have"
    return ""


def all_agree(yes: bool, device: torch.device) -> bool:
    """Check that all ranks say yes; every one has to ask."""
    said = torch.tensor([yes], dtype=torch.int32, device=device)
    dist.all_reduce(said, dist.ReduceOp.MIN)
    return bool(said)


def check_whole(model: nn.Module, what: str) -> None:
    """Check that a model is not divided among ranks, for something that reads its layers one by one.

    Raises:
        UnsupportedModelError: it is divided.
    """
    if is_divided(model):
        _refuse(what)


def _check_no_gradient(y: Tensor) -> None:
    if y.requires_grad:
        _refuse("train")


def _refuse(what: str) -> NoReturn:
    raise UnsupportedModelError(
        f"a model that is divided among ranks cannot {what}",
        "Load it whole: without tp_plan, on one GPU or with device_map over several.",
    )
