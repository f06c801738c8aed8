"""Compare a stored tensor with its source, piece by piece: recompute its arrays, and measure how exact they are.

The recomputation shares no code with the conversion's fast path: blocks go through `blocks.decode` and
`planes.pack`, both plain numpy. Errors are relative to the weights that the GGUF defines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from q6k_kernels.bundle.manifest import StoredTensor
from q6k_kernels.bundle.naming import naming
from q6k_kernels.bundle.structure import Entry, Finding
from q6k_kernels.formats import planes
from q6k_kernels.formats.blocks import decode, not_finite
from q6k_kernels.formats.types import row_of, weight_type
from q6k_kernels.gguf.file import GGUFFile
from q6k_kernels.gguf.tensors import TensorRecord

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]

PIECE_WEIGHTS = 1 << 21
"""Weights compared at a time, a multiple of every block size. With fewer, threads spend their time waiting for each
other's turn in Python; with more, arrays leave the processor's cache."""
RANGE_PIECES = 8
"""Pieces of a range, so that several threads compare one large tensor."""
_KEPT_BYTES = 31 << 20


@dataclass
class Exactness:
    """Comparison of stored weights with GGUF's.

    Attributes:
        equal: whether the stored arrays equal those recomputed from the source, bit for bit.
        signal: sum of the squares of GGUF's weights; 0 where the weight type keeps them exactly and `equal` holds.
        noise: sum of the squares of the differences of the stored weights from them. Weights that are NaN or
            infinite in the GGUF count in neither.
        max_scale_error: largest relative error of a stored scale or min; None where there are none.
        nonfinite: number of scales of the source's blocks that are NaN or infinite.
    """

    equal: bool = True
    signal: float = 0.0
    noise: float = 0.0
    max_scale_error: float | None = None
    nonfinite: int = 0

    @property
    def exact(self) -> bool:
        """Whether every weight equals GGUF's."""
        return self.equal and self.noise == 0

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio, 10 log10(signal / noise), in dB; None if one of the two is zero or not finite."""
        if not (self.signal > 0 and self.noise > 0 and math.isfinite(self.signal + self.noise)):
            return None
        return 10 * math.log10(self.signal / self.noise)

    def add(self, other: Exactness) -> None:
        """Add the figures of another part of the model."""
        self.equal &= other.equal
        self.signal += other.signal
        self.noise += other.noise
        self.nonfinite += other.nonfinite
        if other.max_scale_error is not None:
            self.max_scale_error = max(self.max_scale_error or 0.0, other.max_scale_error)


@dataclass
class Compared:
    """Result of comparing a range of blocks.

    Attributes:
        exactness: its figures.
        findings: the first difference of each array, by role.
        nonfinite_at: the first block with a scale that is NaN or infinite, the scale's byte in the block, its name.
    """

    exactness: Exactness
    findings: dict[str, Finding]
    nonfinite_at: tuple[int, int, str] | None = None

    def add(self, other: Compared) -> None:
        """Add the result of the next range of the same tensor."""
        self.exactness.add(other.exactness)
        self.findings = other.findings | self.findings
        self.nonfinite_at = self.nonfinite_at or other.nonfinite_at


class Comparison:
    """Comparison of one stored tensor with its source."""

    def __init__(
        self,
        directory: Path,
        shards: Mapping[str, Mapping[str, Entry]],
        tensor: StoredTensor,
        part: GGUFFile,
        record: TensorRecord,
    ) -> None:
        self.directory, self.shards, self.tensor = directory, shards, tensor
        self.part, self.record = part, record
        self.block_weights, self.block_bytes = record.block
        self.blocks = record.nbytes // self.block_bytes
        self.row = weight_type(tensor.format) if tensor.format is not None else None
        # The weight type that keeps GGUF's own numbers: of most types the only one.
        self.exact = row_of(record.type.name, "exact") if self.row is not None else None

    @property
    def ranges(self) -> range:
        """The first blocks of the tensor's ranges; an empty tensor has one, which is empty."""
        return range(0, max(self.blocks, 1), RANGE_PIECES * PIECE_WEIGHTS // self.block_weights)

    def run(self, first: int, progress: Callable[[int], None]) -> Compared:
        """Compare the range from block `first` on; `progress` is called with the number of source bytes done."""
        end = min(first + self.ranges.step, self.blocks)
        compared = self._run(first, end, measured=self.row is not self.exact)
        progress((end - first) * self.block_bytes)
        return compared

    def measured(self) -> Compared:
        """Compare the whole tensor, and measure also the pieces that equal GGUF's."""
        return self._run(0, self.blocks, measured=True)

    def not_finite(self, compared: Compared) -> Finding:
        """Return the finding of scales that are NaN or infinite, which the result has."""
        assert compared.nonfinite_at is not None  # noqa: S101 -- for the type checker
        block, at, number = compared.nonfinite_at
        row, column = divmod(block, (self.record.shape or (1,))[-1] // self.block_weights)
        byte = self.record.offset + block * self.block_bytes + at
        problem = (
            f"{compared.exactness.nonfinite} of its scales are NaN or infinite, the first {number} of block "
            f"{block} (row {row}, block {column} of it) at byte {byte}"
        )
        return Finding(problem, self.part.path.name, self.tensor.name)

    def _run(self, first: int, end: int, *, measured: bool) -> Compared:
        with ExitStack() as stack:
            names = {array.file for array in self.tensor.arrays.values()}
            files = {name: stack.enter_context((self.directory / name).open("rb", buffering=0)) for name in names}
            work = _Range(self, files, measured=measured)
            step = PIECE_WEIGHTS // self.block_weights
            buffer = memoryview(bytearray(min(step, end - first) * self.block_bytes))
            for at in range(first, end, step):
                raw = buffer[: min(step, end - at) * self.block_bytes]
                self.part.read_into(raw, self.record.offset + at * self.block_bytes)
                work.compare(np.frombuffer(raw, dtype=np.uint8), at)
        return work.result


class _Range:
    """Comparison of a range of a tensor's blocks."""

    def __init__(self, whole: Comparison, files: Mapping[str, FileIO], *, measured: bool) -> None:
        self.whole, self.files, self.measured = whole, files, measured
        self.result = Compared(Exactness(), {})

    def compare(self, raw: Bytes, first: int) -> None:
        """Compare a piece: its blocks, of which `first` is the number of the first."""
        whole, exactness = self.whole, self.result.exactness
        for number, bad in not_finite(raw.reshape(-1, whole.block_bytes), whole.record.type.name):
            exactness.nonfinite += len(bad)
            if len(bad):
                mine = first + int(bad[0]), number.at, number.name
                self.result.nonfinite_at = min(self.result.nonfinite_at or mine, mine)
        with np.errstate(all="ignore"):
            if whole.row is not None:
                self._compare_packed(raw, first)
            elif whole.tensor.storage == "dequantized":
                truth = _dequantized(raw, whole.record)
                expected = planes.round_to_bf16(truth)
                stored = self._stored("data", expected, first)
                self._measure(truth, planes.bf16_to_float(stored))
            else:
                self._stored("data", raw, first)

    def _compare_packed(self, raw: Bytes, first: int) -> None:
        row, exact, exactness = self.whole.row, self.whole.exact, self.result.exactness
        assert row is not None and exact is not None  # noqa: S101, PT018 -- for the type checker
        codes, truth = decode(raw, exact)
        scales = truth if row is exact else planes.round_scales(truth, exact)
        expected = [*planes.pack(codes, row), *(scales[array.role] for array in row.scales)]
        stored = {role: self._stored(role, each, first) for role, each in zip(row.roles, expected, strict=True)}
        same = all(each is stored[role] for role, each in zip(row.roles, expected, strict=True))
        if same and row is exact:
            exactness.max_scale_error = exactness.max_scale_error or 0.0
            if self.measured:
                weights = planes.dequantize(codes, truth, exact)
                self._measure(weights, weights)
            return
        true, found = planes.group_values(truth, exact), planes.group_values(stored, row)
        pairs = zip(found, true, strict=True)
        worst = max(_relative_error(a, b) for a, b in pairs if a is not None and b is not None)
        exactness.max_scale_error = max(exactness.max_scale_error or 0.0, worst)
        if same:
            # The weights of a group share a scale, and so its error; a type that rounds scales has no mins.
            squares = _squares(planes.code_values(codes, row))
            exactness.signal += _weighted(true[0], squares)
            exactness.noise += _weighted(found[0] - true[0], squares)
        else:
            code_planes = [stored[array.role] for array in row.arrays if array not in row.scales]
            stored_codes = planes.unpack([plane.view(np.uint8) for plane in code_planes], row)
            self._measure(planes.dequantize(codes, truth, exact), planes.dequantize(stored_codes, stored, row))

    def _measure(self, truth: Floats, stored: Floats) -> None:
        kept = np.isfinite(truth)
        true = truth[kept].astype(np.float64)
        self.result.exactness.signal += float(np.square(true).sum())
        self.result.exactness.noise += float(np.square(stored[kept] - true).sum())

    def _stored(self, role: str, expected: npt.NDArray[Any], first: int) -> npt.NDArray[Any]:
        """Return the stored part of an array that belongs to blocks from `first` on.

        Returns:
            `expected` itself if the two are equal to the bit; otherwise their difference becomes a finding.
        """
        whole = self.whole
        array = whole.tensor.arrays[role]
        entry = whole.shards[array.file][array.key]
        wanted = expected.view(np.uint8)
        at = (entry.end - entry.begin) // whole.blocks * first
        found = np.empty(wanted.size, np.uint8)
        file = self.files[array.file]
        file.seek(entry.begin + at)
        with naming(whole.directory / array.file):
            count = file.readinto(found.data)
        if count != found.size:
            raise OSError(0, "became shorter while it was being read", array.file)
        if np.array_equal(found, wanted):
            return expected
        self.result.exactness.equal = False
        where = int(np.flatnonzero(found != wanted)[0])
        problem = (
            f"differs from the source at byte {at + where} of the array: expected "
            f"{wanted[where]:#04x}, found {found[where]:#04x}"
        )
        self.result.findings.setdefault(role, Finding(problem, array.file, whole.tensor.name, array.key))
        return found.view(expected.dtype)


def keep_freed_memory() -> None:
    """Let the C library keep the memory of temporary arrays, instead of returning it and faulting it in again.

    The GNU C library does so for sizes up to that of the largest array freed so far, and at most 32 MB.
    """
    np.empty(_KEPT_BYTES, np.uint8)


def _relative_error(stored: Floats, true: Floats) -> float:
    """Return the largest relative error of the values, of which NaNs do not count."""
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = stored - true
        errors /= true
    return float(np.fmax.reduce(np.abs(errors, out=errors), initial=0.0))


def _squares(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint64]:
    """Return the sums (K/16) of the squares of 16 codes of at most 6 bits, each at most 16384."""
    # Four squares of 16 bits are a 64-bit word; a product with this factor adds them up in its upper 16 bits.
    words: npt.NDArray[np.uint64] = np.square(codes, dtype=np.int16).view("<u8")
    words = words[0::2] + words[1::2]
    words = words[0::2] + words[1::2]
    words *= 0x0001000100010001
    words >>= 48
    return words


def _weighted(values: Floats, weights: npt.NDArray[np.uint64]) -> float:
    """Return the sum of the squares of the finite values, times their weights."""
    squares = np.square(values, dtype=np.float64)
    if not math.isfinite(total := float(squares @ weights.astype(np.float64))):
        kept = np.isfinite(squares)
        total = float(squares[kept] @ weights[kept].astype(np.float64))
    return total


def _dequantized(raw: Bytes, record: TensorRecord) -> Floats:
    import gguf

    weights = gguf.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType[record.type.name])
    return np.ascontiguousarray(weights, dtype=np.float32).reshape(-1)
