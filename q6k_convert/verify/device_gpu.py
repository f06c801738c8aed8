"""One packed matrix on a GPU: packed, multiplied, gathered and expanded there, and held against fp64.

Planes go to the GPU as the bundle has them. From there on there are two ways: the operations under test, on
tiles packed by one of them; and plain torch in fp64 on the planes, which shares nothing with them. `accuracy`
says how far the two may be apart. At most one matrix is on the GPU at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from q6k_convert.verify.device_runs import SEED, DeviceRun, Rows
from q6k_kernels.formats.ggml import GROUP, SUPER_BLOCK
from q6k_kernels.formats.planes import OFFSET
from q6k_kernels.ops import accuracy, reference, schema

Formula = Literal["int8", "bf16"]
SIZES: tuple[tuple[int, Formula], ...] = ((1, "int8"), (16, "bf16"), (512, "bf16"))
"""Rows of activations and how they are treated: a decoding step, a short prefill, a longer one."""
CHECKED_ROWS = 16
"""Of more rows of activations as many are compared, evenly spread: each meets every weight."""
READ_WEIGHTS = 1 << 25
"""Read from the disk and copied to the GPU at a time, 29 MB."""
EXACT_WEIGHTS = 1 << 24
"""Unpacked to fp64 at a time; about 40 bytes each, 700 MB."""
CALLS = 3
"""Timed together, after one that compiles what is not compiled yet."""
SPOT_ROWS = 64
"""Rows that are gathered, and as many at the end of the matrix expanded, and compared to the bit."""


@dataclass(frozen=True)
class Planes:
    """The arrays of a matrix (N, K), on a device."""

    ql: Tensor
    qh: Tensor
    scale: Tensor
    steps: Tensor | None = None

    def rows(self, which: slice | Tensor) -> Planes:
        """Some of its rows."""
        return Planes(
            self.ql[which], self.qh[which], self.scale[which], None if self.steps is None else self.steps[which]
        )

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """In the order in which operations take them."""
        return self.ql, self.qh, self.scale, self.steps


def run_matrix(
    rows: Rows, at: int, n: int, progress: Callable[[int], None], device: str = "cuda"
) -> tuple[list[DeviceRun], list[str]]:
    """The `n` rows of a tensor from row `at` on.

    Args:
        rows: reads them.
        at: the first.
        n: how many, one matrix.
        progress: told the bytes that are done, as they are done.
        device: where; on the CPU nothing is timed.

    Returns:
        A run for each of `SIZES`, and what is wrong with single rows, if anything.

    Raises:
        CudaError: a kernel cannot be compiled or launched.
        OSError: the rows cannot be read.
        torch.OutOfMemoryError: the matrix, or the fp64 that it is held against, does not fit in the GPU's memory.
    """
    planes = _read(rows, at, n, device)
    tiles = schema.pack(*planes.all())
    activations = _activations(rows.k, tiles.device)  # of tiles: "cuda" alone is no certain GPU
    outputs = [_run(tiles, n, activations[:m], formula) for m, formula in SIZES]
    tallies = [_Tally() for _ in SIZES]
    step = max(1, EXACT_WEIGHTS // rows.k)
    for first in range(0, n, step):
        count = min(step, n - first)
        q, s = _codes_and_scales(planes.rows(slice(first, first + count)))
        for (m, formula), (y, _), tally in zip(SIZES, outputs, tallies, strict=True):
            tally.compare(y[:, first : first + count], activations[:m], q, s, formula, first)
        progress(count * rows.bytes_a_row)
    runs = [
        DeviceRun(
            m,
            formula,
            tally.worst,
            tally.worst <= 1,
            seconds or 0.0,
            tiles.nbytes / seconds / 1e9 if seconds else None,
            tally.first_bad,
        )
        for (m, formula), (_, seconds), tally in zip(SIZES, outputs, tallies, strict=True)
    ]
    return runs, _wrong_rows(planes, tiles, n)


def _read(rows: Rows, at: int, n: int, device: str) -> Planes:
    arrays: dict[str, Tensor] = {}
    step = max(1, READ_WEIGHTS // rows.k)
    for first in range(0, n, step):
        part = rows.read(at + first, min(step, n - first))
        for role, piece in part.items():
            if role not in arrays:
                arrays[role] = torch.empty(n, piece.shape[1], dtype=piece.dtype, device=device)
            arrays[role][first : first + len(piece)] = piece.to(device)
    return Planes(**arrays)


@lru_cache(maxsize=1)
def _activations(k: int, device: torch.device) -> Tensor:
    """bf16, standard normal, the same on every device."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(max(m for m, _ in SIZES), k, generator=generator).bfloat16().to(device)


def _run(tiles: Tensor, n: int, x: Tensor, formula: Formula) -> tuple[Tensor, float | None]:
    """The rows of y that are compared, and the seconds of a call, made from Python, one after the other."""
    with torch.no_grad():
        y = schema.linear(x, tiles, None, n, formula)
        seconds = _seconds(lambda: schema.linear(x, tiles, None, n, formula)) if tiles.is_cuda else None
    return y[_checked(len(x))], seconds


def _checked(m: int) -> list[int]:
    """The rows of y that are compared: both ends and those between."""
    if m <= CHECKED_ROWS:
        return list(range(m))
    return [round(i * (m - 1) / (CHECKED_ROWS - 1)) for i in range(CHECKED_ROWS)]


def _seconds(call: Callable[[], Tensor]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / CALLS


def _codes_and_scales(planes: Planes) -> tuple[Tensor, Tensor]:
    """Weights -32..31 (N, K) and scales (N, K/16), float64, from the text of the format (see `planar`)."""
    n = len(planes.ql)
    low = torch.stack((planes.ql & 15, planes.ql >> 4), dim=-1).view(n, -1)
    chunks = planes.qh.reshape(n, -1, 2, 4)  # (chunk, parity, w)
    pairs = torch.stack([chunks >> 2 * position & 3 for position in range(4)], dim=-1)
    high = pairs.permute(0, 1, 3, 4, 2).reshape(n, -1)
    s = planes.scale.double()
    if planes.steps is not None:
        s = s * planes.steps.double().repeat_interleave(SUPER_BLOCK // GROUP, 1)
    return (low | high << 4).double() - OFFSET, s


def _exact(x: Tensor, q: Tensor, s: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    """What `accuracy.linear_fp64` says, where the tensors are."""
    groups = s.shape[1]
    if formula == "bf16":
        weights = (q.view(len(q), groups, GROUP) * s.unsqueeze(-1)).view(q.shape)
        weights = weights.float().to(x.dtype).double()
        return x.double() @ weights.T, x.double().abs() @ weights.abs().T
    a, d_a = reference.quantize_activations(x)
    inner = a.double().view(len(x), groups, GROUP).transpose(0, 1) @ q.view(len(q), groups, GROUP).permute(1, 2, 0)
    terms = inner * s.T.unsqueeze(1) * d_a.double().repeat_interleave(2, 1).T.unsqueeze(-1)
    return terms.sum(0), terms.abs().sum(0)


def _roundings(k: int, formula: Formula) -> int | None:
    """Of the unluckiest term: "int8" adds K/16 products of integer sums, in any order. For "bf16", the default."""
    return k // GROUP + 8 if formula == "int8" else None


class _Tally:
    """What the chunks of one size come to."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.first_bad: str | None = None

    def compare(self, y: Tensor, x: Tensor, q: Tensor, s: Tensor, formula: Formula, first: int) -> None:
        """Some columns of the outputs `y` of the checked rows of x; `first` is the number of the first."""
        checked, k = _checked(len(x)), x.shape[1]
        exact, magnitude = (part.cpu().numpy() for part in _exact(x[checked], q, s, formula))
        allowed = accuracy.tolerance(exact, magnitude, k, y.dtype, _roundings(k, formula))
        errors = accuracy.error_in_tolerances(y, exact, allowed)
        self.worst = max(self.worst, float(errors.max()))
        if self.first_bad is None and (errors > 1).any():
            row, column = map(int, np.argwhere(errors > 1)[0])
            self.first_bad = (
                f"y[{checked[row]}, {first + column}] is {float(y[row, column]):.6g}, "
                f"expected {exact[row, column]:.6g} within {allowed[row, column]:.2g}"
            )


def _wrong_rows(planes: Planes, tiles: Tensor, n: int) -> list[str]:
    """Rows gathered, and some at the end expanded, that are not what plain torch makes of the planes."""
    spread = torch.linspace(0, n - 1, min(n, SPOT_ROWS), dtype=torch.float64).round().long().to(tiles.device)
    start = max(0, n - SPOT_ROWS) // reference.TILE_ROWS * reference.TILE_ROWS
    gathered = schema.embedding(spread, tiles, n, torch.float32)
    expanded = schema.dequantize(tiles[start // reference.TILE_ROWS :], n - start, torch.bfloat16)
    cases = (
        ("gathered", gathered, planes.rows(spread), spread.tolist()),
        ("dequantised", expanded, planes.rows(slice(start, n)), list(range(start, n))),
    )
    problems = []
    for what, found, part, numbers in cases:
        right = reference.dequantize(*part.all(), dtype=found.dtype)
        wrong = ((found != right) & ~(found.isnan() & right.isnan())).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            problems.append(
                f"row {numbers[row]} {what}: weight {column} is {float(found[row, column]):.6g}, "
                f"expected {float(right[row, column]):.6g}"
            )
    return problems
