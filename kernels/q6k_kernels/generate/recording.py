"""Decoding steps made ready to be run again and again: in eager mode on the CPU, as CUDA graphs on a GPU.

A step of transformers' model reads as much of the cache as it is recorded for, so there is a graph for each of a
few lengths, each four times the one before, and a short text does not pay for a long cache.

Launches inside a graph overlap; where one graph ends and the next begins, a GPU waits for some microseconds. Our
own steps (`step`) depend on nothing but numbers on the device, so they are recorded several in a row, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from q6k_kernels.generate.kv_cache import SLACK
from q6k_kernels.generate.mailbox import LAG

SMALLEST_BUCKET, BUCKET_FACTOR = 1024, 4
"""Of the cache's lengths that steps are recorded for: what a step reads in vain of a cache four times too long is
less than it reads of most models' weights."""
TOGETHER = 8
"""Steps of the longer graph, which saves seven of eight waits. Twice as many would save half of what is left, and
at the end of an answer twice as many would be too many."""
assert TOGETHER <= LAG  # noqa: S101 -- they follow as many that are under way, or never would be run
assert LAG + TOGETHER < SLACK  # noqa: S101 -- the cache can take back no more than may turn out to be too many
LONGEST_MS = 50.0
"""What the longer graph may take. Its tokens arrive all at once, which twenty times a second still looks like a
flow; and of steps that take longer the wait is less than a thousandth."""


def bucket(position: int, capacity: int, slots: int) -> int:
    """How many slots of the cache a step of transformers' model looks at.

    Args:
        position: of the step.
        capacity: of the cache.
        slots: of its full layers.
    """
    keys = SMALLEST_BUCKET
    while keys <= position:
        keys *= BUCKET_FACTOR
    # One of nearly the whole cache would be recorded for little.
    return keys if 2 * keys <= capacity else slots


class Recorder:
    """Forms of a step, each made when it is first asked for.

    Attributes:
        together: steps that are worth being run at once: 1, or `TOGETHER` once the first recording has shown that
            they are short.
        made: the forms, by slots that are looked at and number of steps.

    Args:
        state: what a step begins with and changes, all on one device: the token and its position.
        several: whether several may be recorded in a row.
    """

    def __init__(self, state: tuple[Tensor, ...], *, several: bool) -> None:
        self._state, self._device = state, state[0].device
        self._several = several
        self._pool: Any = None
        self.together = 1
        self.made = dict[tuple[int, int], Callable[[], object]]()

    def form(
        self, step: Callable[[int], None], keys: int, count: int, within: Callable[[], AbstractContextManager[None]]
    ) -> Callable[[], object]:
        """What runs the step so many times. To be asked for one step before it is asked for several.

        Args:
            step: takes `keys`. Not kept where it is recorded, so that its owner goes when nobody uses it any more.
            keys: slots of the cache that it looks at.
            count: steps.
            within: what the step needs around it.
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
        """The steps as a CUDA graph."""
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
        """Run the step in eager mode, which compiles the kernels that it takes."""
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
        """What one step takes."""
        put_back = self._put_back()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        graph.replay()  # the first time brings it to the GPU
        put_back()
        begin.record()
        graph.replay()
        end.record()
        put_back()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def _put_back(self) -> Callable[[], None]:
        """Undoes a step: what it has written into the cache is written anew by the first step that counts."""
        before = [each.clone() for each in self._state]

        def put_back() -> None:
            for each, value in zip(self._state, before, strict=True):
                each.copy_(value)

        return put_back
