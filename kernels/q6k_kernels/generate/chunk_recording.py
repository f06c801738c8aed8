"""Chunks of prompts as CUDA graphs: what is computed of each token alone is recorded, mixing is launched between.

A host may take longer to launch a chunk of up to some thousand tokens than the GPU to compute it. All launches
from one mixing to the next (`step_model`) depend on the number of tokens alone, not on their positions or on the
cache, so they serve any chunk of any text. They are recorded, a graph a layer. Mixing is launched as ever: flash
attention's launch depends on the number of keys, which the host has to know.

A few numbers of tokens are recorded, `SIZES`. Other chunks take the next larger one. Its surplus rows hold numbers
of earlier chunks: rows do not affect each other, and mixing gets only those of tokens.

| launched one by one | why |
|---|---|
| up to `dispatch.DECODE_M` tokens | products quantise activations, as they do for few rows only |
| more tokens than `SIZES` has | the GPU takes longer than the host |
| the first chunk of a size | a program that answers one prompt would not get back the time for recording |
| the last token after the last layer that stores anything | it is a few launches |
| models that are divided among ranks | sums over ranks would have to be recorded, which nobody has measured |
| GPUs other than Hopper | for `dispatch.PREFILL_M` tokens weights are expanded, in memory that graphs would keep |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from q6k_kernels.cuda.dispatch import DECODE_M
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.heads import Heads
from q6k_kernels.generate.operations import StepOperations
from q6k_kernels.generate.step_model import Course, StepModel
from q6k_kernels.generate.step_reference import ProductInput

SIZES = (16, 32, *range(64, 512, 64), *range(512, 1025, 128))
"""Tokens of recorded chunks. Blocks of products have 16, 32, 64, 128 or 256 tokens. Those of large matrices, which
have the largest blocks that pay, are as many for a number of tokens as for the next one here, so they cost no more,
and are computed alike. Small matrices may have more blocks, and parts of sums that are cut elsewhere."""

Piece = Callable[[], tuple[Tensor, ...]]
"""Computes what lies before a mixing, and returns its input."""


def size_of(tokens: int) -> int | None:
    """Return the size of a recorded chunk for so many tokens; None if they are launched one by one."""
    return next((size for size in SIZES if size >= tokens), None) if tokens > DECODE_M else None


class ChunkRecorder:
    """The recorded chunks of one model, each made when a size comes up for the second time.

    Attributes:
        made: the recorded chunks by size.

    Args:
        run: operations whose launches share no memory with those of others.
        device: where they run. On the CPU what would be recorded is run.
    """

    def __init__(self, run: StepOperations, device: torch.device) -> None:
        self._run, self._device = run, device
        self._seen = set[int]()
        self.made = dict[int, _Recording]()
        self._graphs = _Graphs(device) if device.type == "cuda" else None
        self._tokens = torch.zeros(SIZES[-1], dtype=torch.int64, device=device)
        self._inputs = dict[int, Tensor]()

    def course(self, model: StepModel, tokens: Tensor, layers: int) -> RecordedCourse | None:
        """Return the recorded way of a chunk through the first layers; None if it is to be launched one by one.

        Args:
            model: the model, always the same.
            tokens: int64 (M,).
            layers: the layers, always as many.
        """
        size = size_of(len(tokens))
        if size is None:
            return None
        if size not in self._seen:
            self._seen.add(size)
            return None
        if size not in self.made:
            self.made[size] = self._recorded(model, size, layers)
        self._tokens[: len(tokens)] = tokens
        return RecordedCourse(self.made[size], len(tokens))

    def _recorded(self, model: StepModel, size: int, layers: int) -> _Recording:
        dtype = model.embedded(self._tokens[:1]).dtype
        inputs = list[Tensor]()
        for layer in model.layers[:layers]:
            k = _width(layer.heads)
            if k not in self._inputs:
                self._inputs[k] = torch.zeros(SIZES[-1], k, dtype=dtype, device=self._device)
            inputs.append(self._inputs[k][:size])
        made = _Recording(model, self._run, self._tokens[:size], inputs)
        if self._graphs is not None:
            made.pieces = self._graphs.of(made.pieces)
            made.course = made.course.changed(_lent)
        return made


class _Recording:
    """The pieces of a chunk of one size.

    Attributes:
        inputs: where each piece but the first finds the result of the mixing in the layer before.
        pieces: those before the mixing of each layer.
        course: the tokens after the pieces that have run, or were recorded.
    """

    def __init__(self, model: StepModel, run: StepOperations, tokens: Tensor, inputs: list[Tensor]) -> None:
        self._model, self._run, self._tokens, self.inputs = model, run, tokens, inputs
        self.pieces: list[Piece] = [self._begin, *(partial(self._go_on, each) for each in inputs[:-1])]
        self.course: Course

    def _begin(self) -> tuple[Tensor, ...]:
        self.course = Course.begin(self._model, self._run, self._tokens)
        return self.course.advance()

    def _go_on(self, mixed: Tensor) -> tuple[Tensor, ...]:
        return self.course.advance(ProductInput(mixed, None, mixed.shape[1]))


class RecordedCourse:
    """Tokens on their way through recorded layers, see `Course`.

    Args:
        recording: of their number or a larger one.
        tokens: their number.
    """

    def __init__(self, recording: _Recording, tokens: int) -> None:
        self._recording, self._tokens, self._pieces = recording, tokens, iter(recording.pieces)
        self._inputs = iter(recording.inputs)

    def advance(self, mixed: ProductInput | None = None) -> tuple[Tensor, ...]:
        """Go on to the next layer, see `Course.advance`."""
        if mixed is not None:
            assert mixed.halves is not None  # noqa: S101 -- all operations of chunks return them
            next(self._inputs)[: self._tokens] = mixed.halves
        return tuple(each[: self._tokens] for each in next(self._pieces)())

    def part(self, rows: slice, run: StepOperations) -> Course:
        """Return some of the tokens behind the last recorded layer, see `Course.part`."""
        return self._recording.course.part(slice(self._tokens), run).part(rows, run)


class _Graphs:
    """Makes CUDA graphs of pieces, which share their memory, as no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def of(self, pieces: list[Piece]) -> list[Piece]:
        """Return pieces as graphs, in the same order."""
        with torch.cuda.device(self._device):
            for piece in pieces:
                piece()  # compiles kernels, and starts libraries
            torch.cuda.empty_cache()  # nothing can be freed while a graph is recorded
            return [self._of(piece) for piece in pieces]

    def _of(self, piece: Piece) -> Piece:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                found = piece()
            finally:
                graph.capture_end()
        lent = tuple(_lent(each) for each in found)

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return lent

        return replay


class _Memory:
    """Describes the memory of a tensor of 16-bit numbers to torch, without keeping it."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(2 * each for each in tensor.stride()),
            "typestr": "<i2",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _lent(tensor: Tensor) -> Tensor:
    """Return a tensor in the memory of another, which later pieces may use again: it is read before they run."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)


def _width(heads: Heads | DeltaHeads) -> int:
    """Return the size of what mixing returns of a token."""
    if isinstance(heads, DeltaHeads):
        return heads.value_heads * heads.value_dim
    return heads.count * heads.dim
