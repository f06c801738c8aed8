"""A decoding step of a whole model as one launch, `cuda/persist.cuh`.

All blocks run at once and wait for each other's values. So the launch is cooperative: where the GPU has no room for
all of them, because other programs share it, it is refused, and nobody waits for ever; steps are launches then.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda.device import Device, Variant, pointer
from q6k_kernels.formats.types import DEFAULT, WEIGHT_TYPES, WeightType
from q6k_kernels.generate.operations import StepOperations
from q6k_kernels.generate.planning import Planner, refuse
from q6k_kernels.generate.schedule import WARPS, Schedule
from q6k_kernels.jit import loader

PERSIST_FILE, PERSIST = "persist.cuh", "q6k_persist"
ARCH = 90
"""The compute capability that it is for: its warps hand registers to each other."""
THREADS = 32 * (WARPS + 4)
STAGES = (4, 3, 2)
"""Stages of the ring of tiles, the best first: as many as fit."""
PENDING = 2
"""Chunks of tiles of later rows that are under way at a time."""
TIMES = 6
"""Times of a row, see `note_time` in `cuda/persist.cuh` and `cuda/persist_attend.cuh`."""
_GIVEN = struct.Struct("@PPPPPiii0P")


class PersistentStep:
    """A step as one launch, planned when it is first called: then the cache has its buffers.

    Attributes:
        schedule: what it runs; None before.
        stages: stages of its ring of tiles; 0 before.
        trace: where to note when a block does what, int64 (rows, blocks, `TIMES`) in ns; None: nowhere.

    Args:
        where: a GPU.
        dtype: dtype of activations, bfloat16 or float16.

    Raises:
        UnsupportedModelError: the GPU is not of compute capability 9.0.
    """

    def __init__(self, where: torch.device, dtype: torch.dtype) -> None:
        self._device = launching.device(torch.cuda.current_device() if where.index is None else where.index)
        self._where, self._dtype = where, dtype
        self.schedule: Schedule | None = None
        self.stages = 0
        self.trace: Tensor | None = None
        if self._device.arch != ARCH:
            refuse(f"compute capability {self._device.arch / 10}: expected {ARCH / 10}")

    def __call__(
        self, hidden: Tensor, position: Tensor, through_the_model: Callable[[StepOperations], object]
    ) -> Tensor:
        """Launch the step of a token.

        Args:
            hidden: its embedding, (1, K).
            position: its position, int64 (1,): the same tensor each time.
            through_the_model: performs the operations of a step, which are planned at the first call.

        Returns:
            The logits, (1, V) in 16 bits, in the same memory each time.

        Raises:
            UnsupportedModelError: the model has what a persistent kernel has not, or a block does not fit.
            BlocksNotResidentError: not all blocks can run at the same time.
        """
        if self.schedule is None:
            planner = Planner(self._device, self._where, self._dtype)
            through_the_model(planner)
            self._take(planner.schedule())
        schedule = self.schedule
        assert schedule is not None  # noqa: S101 -- just made
        loader.load(*self._variant, self._device.index).launch(
            (schedule.grid, 1, 1),
            THREADS,
            _GIVEN.pack(
                *(each.data_ptr() for each in (self._rows, hidden, position, self._epoch)),
                pointer(self.trace),
                len(schedule.rows),
                schedule.hidden,
                schedule.activation_bytes,
            ),
            stream=launching.stream(self._device),
            shared_bytes=schedule.shared_bytes(self.stages),
            cooperative=True,
        )
        return schedule.logits

    def _take(self, schedule: Schedule) -> None:
        fitting = [stages for stages in STAGES if schedule.shared_bytes(stages) <= self._device.shared_bytes]
        if not fitting:
            needed = schedule.shared_bytes(STAGES[-1])
            refuse(f"blocks of {needed} bytes of shared memory: expected up to {self._device.shared_bytes}")
        rows = bytearray().join(row.packed() for row in schedule.rows)
        self._rows = torch.frombuffer(rows, dtype=torch.uint8).to(self._where)
        self._epoch = torch.ones(1, dtype=torch.int32, device=self._where)
        fp16 = self._dtype is torch.float16
        self._variant = variant(schedule.types, schedule.head_dim, schedule.hidden, fitting[0], fp16=fp16)
        self.schedule, self.stages = schedule, fitting[0]


def variant(types: tuple[WeightType, ...], dim: int, hidden: int, stages: int, *, fp16: bool) -> Variant:
    """Return the kernel for one or two weight types, a size of heads, a hidden size, and stages of the ring."""
    second = tuple((name.replace("Q6K_", "Q6K_SECOND_", 1), value) for name, value in types[-1].macros)
    others = {
        "Q6K_TYPES": len(types),
        "Q6K_FP16": int(fp16),
        "Q6K_TOKENS": 1,
        "Q6K_FUSED": 0,
        "Q6K_WARPS": WARPS,
        "Q6K_STAGES": stages,
        "Q6K_OCCUPANCY": 1,
        "Q6K_PENDING": PENDING,
        "Q6K_HEAD_DIM": dim,
        "Q6K_NORM_ROUNDS": -(-hidden // (8 * 32 * WARPS)),
    }
    return PERSIST_FILE, PERSIST, (*types[0].macros, *second, *others.items())


def variants(device: Device) -> list[Variant]:
    """Return the kernels of common models that a GPU may load; others are compiled when they are needed."""
    if device.arch != ARCH:
        return []
    default = WEIGHT_TYPES[DEFAULT]
    mixed = next(row for row in WEIGHT_TYPES.values() if row.bits == 4 and row.minimum and row.stepped)
    every = product(((default,), (mixed, default)), ((64, 2048, 3), (128, 4096, 2), (128, 5376, 2)), (False, True))
    return [variant(types, *sizes, fp16=fp16) for types, sizes, fp16 in every]
