"""Decoding steps prepared for repeated use: in eager mode on the CPU, as CUDA graphs on a GPU.

A graph of transformers' step reads a fixed number of slots of the cache. So there is a graph for each of a few
lengths, each four times the one before, and a short text does not pay for a long cache.

Launches inside a graph overlap, but between two graphs a GPU waits for some microseconds. Our own steps (`step`)
depend only on numbers on the device, so several in a row are also recorded as one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from q6k_kernels.generate.mailbox import LAG
from q6k_kernels.models.cache_layout import SLACK

SMALLEST_BUCKET, BUCKET_FACTOR = 1024, 4
"""The cache lengths that steps are recorded for: the first, and the ratio of one to the next. Reading a cache four
times too long costs less than reading the weights of most models."""
TOGETHER = 8
"""Steps of the longer graph, which saves seven of eight waits. Twice as many would save only half of the remaining
waits, and run twice as many steps in vain at the end of an answer."""
assert TOGETHER <= LAG  # noqa: S101 -- they start only behind as many running steps
assert LAG + TOGETHER < SLACK  # noqa: S101 -- the cache must be able to undo all steps run in vain
LONGEST_MS = 50.0
"""Longest time of the longer graph in milliseconds. Its tokens arrive together; twenty times a second still looks
fluent. For slower steps the wait is less than a thousandth of their time."""


def bucket(position: int, capacity: int, slots: int) -> int:
    """Return the number of slots of the cache that a step of transformers' model reads.

    Args:
        position: position of the step.
        capacity: capacity of the cache.
        slots: slots of its full layers.
    """
    keys = SMALLEST_BUCKET
    while keys <= position:
        keys *= BUCKET_FACTOR
    # A graph for more than half of the cache would save little over one for all of it.
    return keys if 2 * keys <= capacity else slots


class Recorder:
    """The recorded forms of a step, each made at its first use.

    Attributes:
        together: steps to run at once: 1, or `TOGETHER` once the first recording has shown that steps are short.
        made: the forms, by slots that are read and number of steps.

    Args:
        state: returns the tensors that a step reads and changes, all on one device: the token, its position, and
            states. It is asked before each recording, as states exist only after the first token.
        several: whether several steps may be recorded in a row.
    """

    def __init__(self, state: Callable[[], tuple[Tensor, ...]], *, several: bool) -> None:
        self._state, self._device = state, state()[0].device
        self._several = several
        self._pool: Any = None
        self.together = 1
        self.made = dict[tuple[int, int], Callable[[], object]]()

    def form(
        self, step: Callable[[int], None], keys: int, count: int, within: Callable[[], AbstractContextManager[None]]
    ) -> Callable[[], object]:
        """Return a function that runs the step `count` times. Ask for one step before several.

        Args:
            step: the step, called with `keys`. A recorded form does not keep it, so its owner can be freed.
            keys: slots of the cache that the step reads.
            count: number of steps.
            within: makes the context that the step needs.
        """
        if (keys, count) not in self.made:
            make = self._recorded if self._device.type == "cuda" else self._in_eager
            self.made[keys, count] = make(step, keys, count, within)
        return self.made[keys, count]

    def _in_eager(
        self, step: Callable[[int], None], keys: int, count: int, within: Callable[[], AbstractContextManager[None]]
    ) -> Callable[[], object]:
        def run() -> None:
            with within():
                for _ in range(count):
                    step(keys)

        return run

    def _recorded(
        self, step: Callable[[int], None], keys: int, count: int, within: Callable[[], AbstractContextManager[None]]
    ) -> Callable[[], object]:
        """Record the steps as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), within():
            if count == 1:
                self._run_first(step, keys)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool):
                for _ in range(count):
                    step(keys)
            if count == 1 and self._several and TOGETHER * self._milliseconds(graph) <= LONGEST_MS:
                self.together = TOGETHER
        return graph.replay

    def _run_first(self, step: Callable[[int], None], keys: int) -> None:
        """Run the step in eager mode, which compiles its kernels."""
        put_back = self._put_back()
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(keys)
                put_back()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

    def _milliseconds(self, graph: torch.cuda.CUDAGraph) -> float:
        """Measure one step."""
        put_back = self._put_back()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        graph.replay()  # the first replay uploads the graph
        put_back()
        begin.record()
        graph.replay()
        end.record()
        put_back()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def _put_back(self) -> Callable[[], None]:
        """Return a function that undoes a step. The next step overwrites what it wrote into the cache."""
        state = self._state()
        before = [each.clone() for each in state]

        def put_back() -> None:
            for each, value in zip(state, before, strict=True):
                each.copy_(value)

        return put_back
