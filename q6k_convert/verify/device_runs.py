"""What the checks on a CPU and on a GPU share: which rows are read, what a run comes to."""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from q6k_kernels.bundle.manifest import StoredTensor
from q6k_kernels.bundle.structure import Entry

if TYPE_CHECKING:
    from torch import Tensor

SEED = 0
"""Of the activations: bf16, standard normal, the same for all tensors of one K."""


@dataclass(frozen=True)
class DeviceRun:
    """One matrix times `m` rows of activations.

    Attributes:
        m: rows of activations.
        activations: "int8" or "bf16", the formula.
        worst_error_in_tolerances: of all outputs; right up to 1, infinite for a NaN or infinity too many.
        passed: whether it is.
        seconds: spent multiplying, without reading and checking; on a GPU a call's, made from Python.
        gb_per_s: packed bytes by that time, in 10**9 a second; None on the CPU, where it would say nothing.
        first_bad: the first wrong output: its coordinate, its value and the right one.
    """

    m: int
    activations: str
    worst_error_in_tolerances: float
    passed: bool
    seconds: float
    gb_per_s: float | None
    first_bad: str | None


class Rows:
    """Reads some rows of a planar tensor; the matrices of a stack lie below each other."""

    def __init__(self, directory: Path, headers: dict[str, dict[str, Entry]], tensor: StoredTensor) -> None:
        count = math.prod(tensor.shape[:-1])
        self.k = tensor.shape[-1]
        self._arrays = {
            role: (directory / array.file, entry.dtype, entry.begin, (entry.end - entry.begin) // count)
            for role, array in tensor.arrays.items()
            for entry in (headers[array.file][array.key],)
        }
        self.bytes_a_row = sum(each for *_, each in self._arrays.values())

    def read(self, first: int, count: int) -> dict[str, Tensor]:
        """Rows `first` to `first + count` of every array, by role."""
        import torch

        dtypes = {"U8": torch.uint8, "I8": torch.int8, "BF16": torch.bfloat16, "F16": torch.float16}
        tensors: dict[str, Tensor] = {}
        for role, (path, dtype, begin, each) in self._arrays.items():
            raw = np.fromfile(path, np.uint8, count * each, offset=begin + first * each)
            if raw.size != count * each:
                raise OSError(
                    errno.EIO, f"ended {count * each - raw.size} bytes before its array {role} does", path
                )
            tensors[role] = torch.from_numpy(raw).view(dtypes[dtype]).view(count, -1)
        return tensors
