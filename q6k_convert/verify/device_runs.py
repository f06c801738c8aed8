"""Multiply one packed matrix on a device and compare with `accuracy`, the fp64 statement of the formulas.

On the CPU the reference multiplies some rows at a time, so memory does not grow with the tensor. On a GPU the
operations under test use tiles that one of them packs, while `accuracy` uses the planes of the bundle. Gathered
and dequantised rows are compared as well. At most one matrix is on the GPU at a time.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from q6k_kernels.bundle.manifest import StoredTensor
from q6k_kernels.bundle.structure import Entry
from q6k_kernels.cuda.dispatch import INT8_ROUNDINGS, rounds_scales
from q6k_kernels.formats.checks import PLANE_DTYPES
from q6k_kernels.formats.types import TILE_ROWS, WeightType, weight_type
from q6k_kernels.ops import accuracy, reference
from q6k_kernels.weights.weight import PackedWeight, embedding, linear

Formula = Literal["int8", "bf16"]
Progress = Callable[[int], None]

SEED = 0
"""Seed of the activations: bf16, standard normal, the same for all tensors of one K on every device."""
SIZES: dict[str, tuple[tuple[int, Formula], ...]] = {
    "cpu": ((1, "int8"), (16, "bf16")),
    "cuda": ((1, "int8"), (16, "bf16"), (512, "bf16")),
}
"""Rows of activations and their formula: a decoding step, a short prefill, a longer one."""
CHECKED_ROWS = 16
"""Most rows of activations to compare, evenly spread; each row meets every weight."""
READ_WEIGHTS = 1 << 25
"""Weights read from the disk and copied to the GPU at a time, about 29 MB."""
EXACT_WEIGHTS = {"cpu": 1 << 21, "cuda": 1 << 24}
"""Weights unpacked to fp64 at a time; about 40 bytes each, so 100 MB and 700 MB."""
CALLS = 3
"""Calls timed together, after a first call that compiles missing kernels."""
SPOT_ROWS = 64
"""Rows to gather, and rows at the end of the matrix to dequantise, that are compared to the bit."""


class Rows:
    """Reader of the rows of a planar tensor; the matrices of a stack lie below each other."""

    def __init__(self, directory: Path, headers: dict[str, dict[str, Entry]], tensor: StoredTensor) -> None:
        count = math.prod(tensor.shape[:-1])
        self.k = tensor.shape[-1]
        self.type = weight_type(cast("str", tensor.format))  # never None: the structure was checked
        self._arrays = {
            role: (directory / array.file, entry.dtype, entry.begin, (entry.end - entry.begin) // count)
            for role in self.type.roles
            for array in (tensor.arrays[role],)
            for entry in (headers[array.file][array.key],)
        }
        self.bytes_a_row = sum(each for *_, each in self._arrays.values())

    def read(self, first: int, count: int) -> list[Tensor]:
        """Return rows `first` to `first + count` of every array, in the order of the weight type."""
        tensors = []
        for role, (path, dtype, begin, each) in self._arrays.items():
            raw = np.fromfile(path, np.uint8, count * each, offset=begin + first * each)
            if raw.size != count * each:
                raise OSError(
                    errno.EIO, f"ended {count * each - raw.size} bytes before its array {role} does", path
                )
            tensors.append(torch.from_numpy(raw).view(PLANE_DTYPES[dtype]).view(count, -1))
        return tensors

    def read_to(self, device: str, first: int, count: int) -> list[Tensor]:
        """Return the same rows on a device, copied there piece by piece."""
        planes: list[Tensor] = []
        step = max(1, READ_WEIGHTS // self.k)
        for at in range(0, count, step):
            pieces = self.read(first + at, min(step, count - at))
            if not planes:
                planes = [torch.empty(count, each.shape[1], dtype=each.dtype, device=device) for each in pieces]
            for plane, piece in zip(planes, pieces, strict=True):
                plane[at : at + len(piece)] = piece.to(device)
        return planes


@lru_cache(maxsize=1)
def activations_of(k: int, m: int, device: torch.device) -> Tensor:
    """Return standard normal activations, bf16 (m, k)."""
    return torch.randn(m, k, generator=torch.Generator().manual_seed(SEED)).bfloat16().to(device)


def checked_rows(m: int) -> list[int]:
    """Return the numbers of the rows of y to compare: the first, the last, and some evenly between."""
    if m <= CHECKED_ROWS:
        return list(range(m))
    return [round(i * (m - 1) / (CHECKED_ROWS - 1)) for i in range(CHECKED_ROWS)]


class Tally:
    """Activations of one of `SIZES`, and the result over the parts of a matrix so far.

    Attributes:
        m, formula: number of rows of activations, and their formula.
        worst: largest error so far, in tolerances; up to 1 is right.
        first_bad: first wrong output: its coordinates, its value and the expected one.
        seconds: time of multiplying without reading and checking; on a GPU the time of one call from Python.
        gb_per_s: packed bytes read in that time, in 10**9 bytes per second; None on the CPU.
    """

    def __init__(self, x: Tensor, m: int, formula: Formula) -> None:
        self.x, self.m, self.formula = x[:m], m, formula
        self.checked = checked_rows(m)
        self.x_checked = self.x[self.checked]
        self.worst, self.seconds = 0.0, 0.0
        self.gb_per_s: float | None = None
        self.first_bad: str | None = None

    def compare(self, y: Tensor, weight: accuracy.Weight, first: int, roundings: int | None = None) -> None:
        """Compare some columns of y in the checked rows; `first` is the number of the first column."""
        rounded = self.formula == "bf16" and rounds_scales(self.x)
        exact = accuracy.linear(self.x_checked, weight, activations=self.formula, scales_rounded=rounded)
        if self.formula == "int8" and self.x.is_cuda:
            roundings = exact.terms + INT8_ROUNDINGS
        result = accuracy.compare(y, exact, roundings)
        self.worst = max(self.worst, result.worst)
        if self.first_bad is None and result.first is not None:
            (row, column), found, expected, allowed = result.first
            self.first_bad = (
                f"y[{self.checked[row]}, {first + column}] is {found:.6g}, "
                f"expected {expected:.6g} within {allowed:.2g}"
            )


def _tallies(k: int, kind: str, device: torch.device) -> list[Tally]:
    x = activations_of(k, max(m for m, _ in SIZES[kind]), device)
    return [Tally(x, m, formula) for m, formula in SIZES[kind]]


def run_on_cpu(rows: Rows, at: int, n: int, progress: Progress) -> tuple[list[Tally], list[str]]:
    """Run the reference on the `n` rows of a tensor from row `at` on.

    Args:
        rows: reader of the tensor.
        at: number of the first row.
        n: number of rows of one matrix.
        progress: called with the number of packed bytes newly done.

    Returns:
        The result for each of `SIZES`, and an empty list: on the CPU no single rows are checked.

    Raises:
        OSError: the rows cannot be read.
    """
    tallies = _tallies(rows.k, "cpu", torch.device("cpu"))
    step = max(1, EXACT_WEIGHTS["cpu"] // rows.k)
    for first in range(0, n, step):
        count = min(step, n - first)
        planes = rows.read(at + first, count)
        weight = accuracy.of_planes(planes, rows.type)
        for tally in tallies:
            started = time.perf_counter()
            y = reference.linear(tally.x, planes, rows.type, activations=tally.formula)
            tally.seconds += time.perf_counter() - started
            tally.compare(y, weight, first, reference.roundings(rows.k, rows.type, tally.formula))
        progress(count * rows.bytes_a_row)
    return tallies, []


def run_on_gpu(
    rows: Rows, at: int, n: int, progress: Progress, device: str = "cuda"
) -> tuple[list[Tally], list[str]]:
    """Run the kernels on the `n` rows of a tensor from row `at` on.

    Args:
        rows: reader of the tensor.
        at: number of the first row.
        n: number of rows of one matrix.
        progress: called with the number of packed bytes newly done.
        device: device to run on; on the CPU nothing is timed.

    Returns:
        The result for each of `SIZES`, and the problems of gathered or dequantised rows.

    Raises:
        CudaError: a kernel cannot be compiled or launched.
        OSError: the rows cannot be read.
        torch.OutOfMemoryError: the matrix or its fp64 weights do not fit in the GPU's memory.
    """
    planes = rows.read_to(device, at, n)
    weight = PackedWeight.from_planes(planes, rows.type.name)
    tallies = _tallies(rows.k, "cuda", weight.device)  # the weight's device: "cuda" alone names no GPU
    outputs = [_multiply(weight, tally) for tally in tallies]
    step = max(1, EXACT_WEIGHTS["cuda"] // rows.k)
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        exact = _rows_of(planes, rows.type, part)
        for y, tally in zip(outputs, tallies, strict=True):
            tally.compare(y[:, part], exact, first)
        progress((part.stop - first) * rows.bytes_a_row)
    return tallies, _wrong_rows(planes, weight)


def _multiply(weight: PackedWeight, tally: Tally) -> Tensor:
    """Return the rows of y to compare; on a GPU also time consecutive calls from Python."""
    with torch.no_grad():
        y = linear(tally.x, weight, activations=tally.formula)
        if weight.tiles.is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(CALLS):
                linear(tally.x, weight, activations=tally.formula)
            end.record()
            end.synchronize()
            tally.seconds = float(begin.elapsed_time(end)) / 1e3 / CALLS
            tally.gb_per_s = weight.nbytes / tally.seconds / 1e9
    return y[tally.checked]


def _rows_of(planes: list[Tensor], row: WeightType, which: slice | Tensor) -> accuracy.Weight:
    return accuracy.of_planes([plane[which] for plane in planes], row)


def _wrong_rows(planes: list[Tensor], weight: PackedWeight) -> list[str]:
    """Return the gathered and dequantised rows that differ from `accuracy`, as messages."""
    n = weight.n
    spread = torch.linspace(0, n - 1, min(n, SPOT_ROWS), dtype=torch.float64).round().long().to(weight.device)
    start = max(0, n - SPOT_ROWS) // TILE_ROWS * TILE_ROWS
    end = torch.arange(start, n, device=weight.device)
    gathered = embedding(spread, weight, torch.float32)
    expanded = weight.rows(start, n).dequantize(torch.bfloat16)
    problems = []
    for what, found, numbers in (("gathered", gathered, spread), ("dequantised", expanded, end)):
        right = accuracy.dequantize(_rows_of(planes, weight.row, numbers), found.dtype)
        wrong = ((found != right) & ~(found.isnan() & right.isnan())).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            problems.append(
                f"row {int(numbers[row])} {what}: weight {column} is {float(found[row, column]):.6g}, "
                f"expected {float(right[row, column]):.6g}"
            )
    return problems
