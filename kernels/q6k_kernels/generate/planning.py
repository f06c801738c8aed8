"""The plan of a persistent kernel: the operations of a decoding step become the rows of a schedule.

    planner = Planner(device, where, dtype)
    through_the_model(planner)
    schedule = planner.schedule()

A `Planner` takes the operations of a step, as `step_cuda.Kernels` does, but notes them. Tensors that it returns are
memory in which blocks publish words (`cuda/words.cuh`): int32, one for each 16-bit value. Two sets of them serve
all layers in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from q6k_kernels.cuda.device import BIAS_KINDS, Device, pointer
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.formats.types import TILE_ROWS, WeightType, weight_type
from q6k_kernels.generate import attend_cuda
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.mixture import Mixed, Mixture
from q6k_kernels.generate.schedule import (
    ATTENTION,
    GATED,
    MEMORY,
    NORM,
    SAME,
    VALUES,
    WARPS,
    Schedule,
    ScheduleRow,
    count_units,
    pieces,
)
from q6k_kernels.generate.step_cuda import GATES
from q6k_kernels.generate.step_reference import ProductInput
from q6k_kernels.models.layer import Activation
from q6k_kernels.weights.layers import PackedLinear

if TYPE_CHECKING:
    from torch import nn

MOST_HIDDEN = 2 * 8 * 32 * WARPS
"""The largest hidden size: a thread has up to two pieces of eight values of the residual stream."""
MOST_TYPES = 2
SETS = 2
"""Sets of memory for words, which layers take in turn."""
HEAD_DIMS = (64, 96, 128, 256)
"""Sizes of heads for which attention may have room beside the ring of tiles."""


@dataclass(frozen=True)
class _Source:
    """What products multiply: a row's fields that say so."""

    source: int
    input: int = 0
    after: int = 0
    weight: int = 0
    factor: float = 1.0
    scale: float = 1.0
    epsilon: float = 0.0
    expects: int = 0


def refuse(what: str) -> NoReturn:
    """Raise UnsupportedModelError: there is no persistent kernel for something."""
    raise UnsupportedModelError(f"no persistent kernel for {what}", "Generate without persistent=True.")


def _refusing(what: str) -> Callable[..., Any]:
    def refused(*_: object) -> NoReturn:
        refuse(what)

    return refused


class Planner:
    """The operations of a step, as rows of a schedule; see `step_reference` for what they compute.

    Args:
        device: the GPU's limits.
        where: the GPU.
        dtype: dtype of activations.
    """

    def __init__(self, device: Device, where: torch.device, dtype: torch.dtype) -> None:
        self._device, self._where, self._dtype = device, where, dtype
        self._rows = list[ScheduleRow]()
        self._types = list[WeightType]()
        self._memory = list[Tensor]()
        self._buffers = dict[tuple[int, int, int], Tensor]()
        self._tags = dict[int, int]()
        self._sources = dict[int, _Source]()
        self._attentions = list[tuple[ScheduleRow, Heads]]()
        self._layer = self._made = self._last = 0
        self._hidden: Tensor | None = None
        self._size = 0

    delta = staticmethod(_refusing("gated delta nets"))
    route = mix = staticmethod(_refusing("a mixture of experts"))
    choose = choose_of_texts = staticmethod(_refusing("the choice of a token, which follows the kernel"))

    def supports_mixture(self, mixture: Mixture) -> str:
        """Return that mixtures are not supported."""
        del mixture
        return "a mixture of experts"

    def supports(self, hidden: int, between: int, heads: Heads | DeltaHeads) -> str:
        """Return why a persistent kernel does not support a model's sizes; "" if it does."""
        del hidden, between, heads
        return ""

    def reserve(self, heads: Heads | DeltaHeads) -> None:
        """Allocate nothing: `schedule` does."""

    def add_norm(
        self,
        hidden: Tensor,
        delta: Tensor | Mixed | None,
        after: Norm | None,
        norm: Norm | None,
        users: list[nn.Module],
        factor: float = 1.0,
        scale: float = 1.0,
        further: tuple[Norm, Norm] | None = None,
    ) -> tuple[Tensor, ProductInput]:
        """Note the residual sum and its norm."""
        if isinstance(delta, Mixed) or further is not None:
            refuse("a mixture of experts")
        if norm is None or norm.centred or (after is not None and after.centred):
            refuse("norms of another form than one root mean square before each product")
        if not users or (delta is None) != (self._hidden is None):
            refuse("networks beside attention")
        for user in users:
            _expect_packed(user)
        k = hidden.shape[-1]
        if k > MOST_HIDDEN or k % 32:
            refuse(f"a hidden size of {k}: expected a multiple of 32 up to {MOST_HIDDEN}")
        self._hidden, self._size = hidden, k
        self._keep(norm.weight, *([] if after is None else [after.weight]))
        source = _Source(
            NORM,
            pointer(delta),
            0 if after is None else after.weight.data_ptr(),
            norm.weight.data_ptr(),
            factor,
            1.0 if delta is None else scale,
            norm.epsilon,
            0 if delta is None else self._tag_of(delta),
        )
        return hidden, self._input(source, k)

    def multiply(self, module: nn.Module, activations: ProductInput) -> Tensor:
        """Note a product, and return its words, (1, N)."""
        module = _expect_packed(module)
        assert activations.codes is not None  # noqa: S101 -- all operations here return them
        kept, n, bias = activations.codes, module.out_features, module.bias
        source = self._sources[id(kept)]
        out = self._words(n)
        same = self._last == id(kept)
        row = ScheduleRow(
            tiles=module.tiles.data_ptr(),
            bias=pointer(bias),
            bias_kind=0 if bias is None else BIAS_KINDS[bias.dtype],
            output=out.data_ptr(),
            type=self._type(weight_type(module.format)),
            k=activations.k,
            n=n,
            row_tiles=-(-n // TILE_ROWS),
            tag=self._rows[-1].tag if same else len(self._rows),
            **({"source": SAME} if same else vars(source)),
        )
        self._last = id(kept)
        self._keep(module.tiles, kept)
        self._rows.append(row)
        self._tags[_memory_of(out)] = row.tag
        return out

    def gate(self, gate: Tensor, up: Tensor | None, activation: Activation, users: list[nn.Module]) -> ProductInput:
        """Note the activation function of `gate` times `up`, which belong to the last product."""
        del users
        row, width = self._rows[-1], gate.shape[-1]
        whole = up is not None and row.n == 2 * width and width % TILE_ROWS == 0
        if not whole or row.source == SAME:
            refuse("a network whose gate and up are not one product")
        out = self._words(width)
        row.result, row.gate, row.output = GATED, GATES[activation], out.data_ptr()
        self._tags[_memory_of(out)] = row.tag
        return self._values(out)

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        heads: Heads,
        cached: Cached,
        position: Tensor,
        users: list[nn.Module],
    ) -> ProductInput:
        """Note attention."""
        del position, users
        if k is None or v is None:
            refuse("layers with the keys and values of earlier ones")
        if heads.gated or heads.neighbours or heads.sinks is not None or heads.normed != "head":
            refuse("heads with gates, sinks, or a norm or rotation of another form")
        if cached.keys.dtype != self._dtype:
            refuse("a cache of 8 bits")
        if heads.dim not in HEAD_DIMS or any(other.dim != heads.dim for _, other in self._attentions):
            refuse(f"heads of {heads.dim} values, or of several sizes")
        tags = {self._tag_of(each) for each in (q, k, v)}
        if len(tags) != 1:
            refuse("queries, keys and values of different inputs")
        self._layer, self._made = self._layer + 1, 0
        out = self._words(heads.count * heads.dim)
        of_tensors: dict[str, Tensor | None] = {
            "keys": cached.keys,
            "values": cached.values,
            "cosines": heads.cosines,
            "sines": heads.sines,
            "q_norm": None if heads.q_norm is None else heads.q_norm.weight,
            "k_norm": None if heads.k_norm is None else heads.k_norm.weight,
            "growth": heads.growth,
        }
        self._keep(*(each for each in of_tensors.values() if each is not None))
        row = ScheduleRow(
            **{name: pointer(each) for name, each in of_tensors.items()},
            input=q.data_ptr(),
            of_keys=k.data_ptr(),
            of_values=v.data_ptr(),
            output=out.data_ptr(),
            scale=heads.scale,
            softcap=heads.softcap or 0.0,
            epsilon=0.0 if heads.q_norm is None else heads.q_norm.epsilon,
            kind=ATTENTION,
            n=out.shape[-1],
            expects=tags.pop(),
            tag=len(self._rows),
            slots=cached.keys.shape[-2],
            window=cached.window,
            group=heads.count // heads.key_heads,
            rotated=2 * heads.cosines.shape[1],
            values_normed=int(heads.values_normed),
        )
        self._rows.append(row)
        self._attentions.append((row, heads))
        self._tags[_memory_of(out)] = row.tag
        return self._values(out)

    def schedule(self) -> Schedule:
        """Return the schedule of the operations so far, of which the last product gives the logits."""
        rows, last = self._rows, self._rows[-1]
        if not self._attentions or last.kind == ATTENTION:
            refuse("a model without attention, or without a product at its end")
        logits = torch.empty(1, last.n, dtype=self._dtype, device=self._where)
        last.result, last.output = MEMORY, logits.data_ptr()
        self._keep(logits)
        grid = min(self._device.multiprocessors, count_units(rows))
        dim = self._attentions[0][1].dim
        made = Schedule(rows, tuple(self._types), dim, self._size, grid, logits, self._memory)
        rows[-1:] = pieces(last, grid * made.spare_tiles, self._types[last.type], self._dtype)
        for turn, (row, heads) in enumerate(self._attentions):
            self._divide(row, heads, grid, turn % SETS)
        return made

    def _divide(self, row: ScheduleRow, heads: Heads, grid: int, turn: int) -> None:
        """Divide a row of attention among the blocks."""
        rows, row.splits, row.heads = attend_cuda.grid(heads, replace(self._device, multiprocessors=grid))
        if rows * row.splits > grid:
            refuse(f"{rows} parts of attention on {grid} blocks")
        row.partials = self._buffer(2 * rows * row.splits * row.heads * (heads.dim + 2), turn, -1).data_ptr()

    def _input(self, source: _Source, k: int) -> ProductInput:
        mark = torch.empty(0)  # stands for the activations, which only blocks have
        self._sources[id(mark)] = source
        self._memory.append(mark)
        return ProductInput(None, mark, k)

    def _values(self, words: Tensor) -> ProductInput:
        source = _Source(VALUES, words.data_ptr(), expects=self._tag_of(words))
        return self._input(source, words.shape[-1])

    def _words(self, n: int) -> Tensor:
        self._made += 1
        return self._buffer(n, self._layer % SETS, self._made)

    def _buffer(self, size: int, turn: int, which: int) -> Tensor:
        key = turn, which, size
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(1, size, dtype=torch.int32, device=self._where)
            self._keep(self._buffers[key])
        return self._buffers[key]

    def _tag_of(self, words: Tensor) -> int:
        return self._tags[_memory_of(words)]

    def _type(self, row: WeightType) -> int:
        if row not in self._types:
            if len(self._types) == MOST_TYPES:
                refuse(f"more than {MOST_TYPES} weight types")
            self._types.append(row)
        return self._types.index(row)

    def _keep(self, *tensors: Tensor) -> None:
        self._memory.extend(tensors)


def _expect_packed(module: nn.Module) -> PackedLinear:
    if isinstance(module, PackedLinear) and module.activations != "bf16":
        return module
    how = f" with activations={module.activations!r}" if isinstance(module, PackedLinear) else ""
    refuse(f"a {type(module).__name__}{how}: expected packed layers that multiply in 8 bits")


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
