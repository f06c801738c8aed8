"""The way of one tensor from its files to a device: opened, read in slices, copied, packed.

On the CPU, plain arrays are read into their final memory. Planes are read some rows at a time, to be packed while
they are in the cache. To a GPU everything goes in slices through page-locked memory: one is read while another
is copied. Planes are packed on the GPU.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from q6k_kernels.bundle.manifest import BundleError, StoredTensor
from q6k_kernels.bundle.structure import Entry
from q6k_kernels.formats.checks import PLANE_DTYPES
from q6k_kernels.formats.tiles import pack_into, tiles_shape
from q6k_kernels.formats.types import TILE_ROWS, weight_type
from q6k_kernels.ops import schema
from q6k_kernels.weights.weight import PackedWeight

CPU_SLICE_BYTES = 4 << 20
"""Bytes of planes that are read at a time, and packed while they are in the cache."""
GPU_SLICE_BYTES = 32 << 20
"""Bytes copied to a GPU at a time. There are two such slices: one is read while the other is copied."""
HUGE_BYTES = 8 << 20
"""Bytes from which memory on the CPU is requested in huge pages, 2 MB each."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""safetensors dtype -> torch dtype."""

Stamp = tuple[int, int]
"""Size of a file and the time of its last change: one of them differs once the file has been written to."""


def stamp(status: os.stat_result) -> Stamp:
    """Return the size in bytes, and the time of the last change in nanoseconds."""
    return status.st_size, status.st_mtime_ns


def way_to(device: torch.device | str | int) -> Staging | None:
    """Return the staging memory for a device; None for the CPU."""
    target = torch.device(device)
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, found {target}; load to the CPU and move from there")
    return Staging(target) if target.type == "cuda" else None


class Arrays:
    """The arrays of one tensor, their files open."""

    def __init__(
        self,
        directory: Path,
        tensor: StoredTensor,
        entries: dict[str, dict[str, Entry]],
        stamps: dict[str, Stamp],
        stack: ExitStack,
    ) -> None:
        self._name = tensor.name
        files = dict[str, FileIO]()
        for file in sorted({array.file for array in tensor.arrays.values()}):
            files[file] = stack.enter_context(closing(FileIO(directory / file)))
            if (found := stamp(os.fstat(files[file].fileno()))) != stamps[file]:
                size, expected = found[0], stamps[file][0]
                what = f"{size} bytes, expected {expected}" if size != expected else "it was written to"
                raise BundleError(
                    f"{directory / file}, tensor {tensor.name}: the file has changed since the bundle was opened: "
                    f"{what}. Open the bundle again"
                )
        self._places = {
            role: (files[array.file], entries[array.file][array.key]) for role, array in tensor.arrays.items()
        }

    def nbytes(self, role: str) -> int:
        """Return the size of an array in bytes."""
        entry = self._places[role][1]
        return entry.end - entry.begin

    def read(self, role: str, at: int, out: Tensor) -> None:
        """Fill `out`, uint8 on the CPU, from byte `at` of an array."""
        file, entry = self._places[role]
        view, begin, done = memoryview(cast("Any", out.numpy())), entry.begin + at, 0
        while done < len(view):
            try:
                count = os.preadv(file.fileno(), [view[done:]], begin + done)
            except OSError as error:
                error.filename = file.name
                raise
            if count == 0:
                raise BundleError(
                    f"{file.name}, tensor {self._name}, array {role}: expected {len(view)} bytes from byte {begin} "
                    f"on, found the end of the file after {done}"
                )
            done += count


class Staging:
    """Staging memory for a GPU: two page-locked slices, one being filled while the other is copied."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slices = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def next(self, nbytes: int) -> Tensor:
        """Wait for the other slice to be free, and return `nbytes` of it to read into."""
        self._turn ^= 1
        self._copied[self._turn].synchronize()
        if len(self._slices[self._turn]) < nbytes:
            size = max(nbytes, GPU_SLICE_BYTES)
            self._slices[self._turn] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._slices[self._turn][:nbytes]

    def copy(self, out: Tensor) -> None:
        """Begin to copy what was read into the slice of `next` to `out`, uint8 on the GPU."""
        out.copy_(self._slices[self._turn][: out.numel()], non_blocking=True)
        self._copied[self._turn].record(torch.cuda.current_stream(self.device))


class Piece(NamedTuple):
    """A piece of a tensor: a range of its first dimension, and of a matrix a range of columns or None for all."""

    begin: int
    end: int
    columns: tuple[int, int] | None = None


def load_plain(arrays: Arrays, tensor: StoredTensor, piece: Piece | None, staging: Staging | None) -> Tensor:
    """Load a tensor of the stored dtype: floats, bf16 or integers; to the GPU of `staging`, or the CPU if None."""
    begin, end, columns = piece or Piece(0, tensor.shape[0] if tensor.shape else 1)
    result = _empty((end - begin, *tensor.shape[1:]) if tensor.shape else (), _dtype(tensor), staging)
    out = result.view(-1).view(torch.uint8)
    first = begin * (len(out) // max(1, end - begin))
    if staging is None:
        arrays.read("data", first, out)
    else:
        for at in range(0, len(out), GPU_SLICE_BYTES):
            part = out[at : at + GPU_SLICE_BYTES]
            arrays.read("data", first + at, staging.next(len(part)))
            staging.copy(part)
    return result if columns is None else result[:, slice(*columns)].clone()


def load_planar(arrays: Arrays, tensor: StoredTensor, piece: Piece | None, staging: Staging | None) -> PackedWeight:
    """Load a packed weight or stack, or a piece of it; to the GPU of `staging`, or the CPU if None.

    Of columns whole rows are read, as their pieces are short in the file; no more than the piece goes further.
    """
    begin, end, columns = piece or Piece(0, tensor.shape[0])
    *stack, n, k = tensor.shape
    row = weight_type(cast("str", tensor.format))  # the checked structure guarantees one
    stored = [arrays.nbytes(role) // math.prod((*stack, n)) for role in row.roles]
    left, right = columns or (0, k)
    cuts = [slice(width * left // k, width * right // k) for width in stored]
    widths = [cut.stop - cut.start for cut in cuts]
    shape = (end - begin, n, right - left) if stack else (end - begin, right - left)
    tiles = _empty(tiles_shape(shape, row), torch.uint8, staging)
    # If every matrix of a stack begins with a new tile, the stack is one large matrix.
    matrices = 1 if len(shape) == 2 or n % TILE_ROWS == 0 else shape[0]
    rows = math.prod(shape[:-1]) // matrices
    first = begin * n if stack else begin
    most = (CPU_SLICE_BYTES if staging is None else GPU_SLICE_BYTES) // sum(stored)
    step = max(TILE_ROWS, most // TILE_ROWS * TILE_ROWS)
    planes = _empty((min(step, rows) * sum(widths),), torch.uint8, staging)
    whole_rows = torch.empty(min(step, rows) * max(stored) if columns else 0, dtype=torch.uint8)
    for matrix, out in enumerate(tiles.view(matrices, -1, *tiles.shape[-2:])):
        for at in range(0, rows, step):
            count = min(step, rows - at)
            memory = planes if staging is None else staging.next(count * sum(widths))
            row_of_file = first + matrix * rows + at
            parts = _parts(memory, widths, count)
            for role, width, cut, part in zip(row.roles, stored, cuts, parts, strict=True):
                if columns is None:
                    arrays.read(role, row_of_file * width, part)
                else:
                    arrays.read(role, row_of_file * width, whole_rows[: count * width])
                    part.view(count, -1).copy_(whole_rows[: count * width].view(count, width)[:, cut])
            if staging is not None:
                staging.copy(planes[: count * sum(widths)])
            each = [
                part.view(PLANE_DTYPES[array.dtype]).view(count, -1)
                for array, part in zip(row.arrays, _parts(planes, widths, count), strict=True)
            ]
            part = out[at // TILE_ROWS : -(-(at + count) // TILE_ROWS)]
            if staging is None:
                pack_into(part, each, row)
            else:
                part.copy_(schema.pack(each, row.name))
    return PackedWeight(tiles, shape, row.name)


def _dtype(tensor: StoredTensor) -> torch.dtype:
    return DTYPES[tensor.arrays["data"].dtype]


def _empty(shape: Sequence[int], dtype: torch.dtype, staging: Staging | None) -> Tensor:
    """Allocate memory on the GPU, or on the CPU: there in huge pages if it is large.

    The system clears pages when they are first touched, which for many small ones is slower than reading a file.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if staging is not None or nbytes < HUGE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu" if staging is None else staging.device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # it is advice that not every system takes
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


def _parts(memory: Tensor, widths: list[int], count: int) -> list[Tensor]:
    """Return views of memory that hold `count` rows of each plane, one plane after the other."""
    ends = list(accumulate(count * width for width in widths))
    return [memory[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
