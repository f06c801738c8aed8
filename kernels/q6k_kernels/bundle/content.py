"""The check of a bundle's content: checksums of all files and arrays, and scales that are finite and in range.

Every byte is read once, in pieces, several arrays at a time. Memory use does not depend on the bundle's size.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from q6k_kernels.bundle.manifest import Manifest, StoredArray, StoredTensor
from q6k_kernels.bundle.naming import naming
from q6k_kernels.bundle.shards import DTYPE_BYTES
from q6k_kernels.bundle.structure import Entry, Finding, read_header
from q6k_kernels.formats.types import weight_type

PIECE_BYTES = 1 << 20
"""Bytes read at a time: few enough to be hashed while they are in the core's own cache."""
# The bits of infinity by dtype; those of a NaN are larger. Scales of dtype U8 without steps are E8M0 numbers, of
# which 255 is NaN.
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "U8": 0xFF}


_NOWHERE = np.empty(0, np.intp)


@dataclass
class ContentReport:
    """Results of the check: findings, and the number of stored scales that are NaN or infinite, by tensor."""

    findings: list[Finding] = field(default_factory=list)
    nonfinite: Counter[str] = field(default_factory=Counter)


def content_bytes(manifest: Manifest) -> int:
    """Return the number of bytes that `check_content` reads."""
    return sum(file.size for file in manifest.files.values())


def check_content(
    directory: Path, manifest: Manifest, *, jobs: int, progress: Callable[[int], None]
) -> ContentReport:
    """Check every checksum of the manifest, and scales: six-bit ones are at most 63, others are finite.

    A bundle that was made to keep scales that are not finite may have them.

    Args:
        directory: a bundle whose structure is sound.
        manifest: its manifest.
        jobs: arrays read at the same time.
        progress: called with the number of bytes newly done, from any thread but from one at a time.

    Raises:
        OSError: a file cannot be read.
    """
    report = ContentReport()
    shards = {name: read_header(directory / name) for name in manifest.files if name.endswith(".safetensors")}
    work: list[Callable[[], ContentReport]] = []
    reader = _Reader(directory, progress)
    for name, file in manifest.files.items():
        work.append(lambda name=name, file=file: reader.check_file(name, file.checked_bytes, file.checksum))  # type: ignore[misc]
    allowed = bool(manifest.options.get("allow_nonfinite"))
    # The longest first, so that no long one runs alone at the end.
    for tensor, role, array in sorted(_arrays(manifest), key=lambda item: -_length(shards, item[2])):
        entry = shards[array.file][array.key]
        infinity = _infinity(tensor, role)
        work.append(
            lambda t=tensor, r=role, e=entry, i=infinity: reader.check_array(t, r, e, i, allowed=allowed)  # type: ignore[misc]
        )
    with ThreadPoolExecutor(jobs, "verify") as pool:
        try:
            for found in pool.map(lambda item: item(), work):
                report.findings += found.findings
                report.nonfinite += found.nonfinite
        except BaseException:
            reader.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            pool.shutdown()
            reader.close()
    return report


def _infinity(tensor: StoredTensor, role: str) -> int | None:
    """Return the bits of infinity in an array of floating-point scales; None for other arrays."""
    if tensor.format is None:
        return None
    row = weight_type(tensor.format)
    dtype = next((array.dtype for array in row.scales if array.role == role), None)
    return None if dtype is None or (dtype == "U8" and row.stepped) else _INFINITY.get(dtype)


def _limit(tensor: StoredTensor, role: str) -> int | None:
    """Return the largest element of an array of six-bit scales, on which kernels rely; None for other arrays."""
    if tensor.format is None:
        return None
    row = weight_type(tensor.format)
    six = row.stepped and any(array.role == role and array.dtype == "U8" for array in row.scales)
    return 63 if six else None


def _arrays(manifest: Manifest) -> Iterator[tuple[StoredTensor, str, StoredArray]]:
    for tensor in manifest.tensors:
        for role, array in tensor.arrays.items():
            yield tensor, role, array


def _length(shards: dict[str, dict[str, Entry]], array: StoredArray) -> int:
    entry = shards[array.file][array.key]
    return entry.end - entry.begin


class _Reader:
    """Reader of ranges of the bundle's files, with one buffer for each thread."""

    def __init__(self, directory: Path, progress: Callable[[int], None]) -> None:
        self.directory = directory
        self.stop = threading.Event()
        self._progress = progress
        self._lock = threading.Lock()
        self._local = threading.local()
        self._files = list[FileIO]()

    def close(self) -> None:
        """Close the files that are still open."""
        for file in self._files:
            file.close()

    def check_file(self, name: str, length: int, checksum: str) -> ContentReport:
        """Check the first `length` bytes of a file by their checksum: all of it, or a shard's header."""
        hasher = xxhash.xxh3_128()
        for piece in self._pieces(name, 0, length):
            hasher.update(piece)
        if hasher.hexdigest() == checksum:
            return ContentReport()
        problem = f"checksum of its first {length} bytes is {hasher.hexdigest()}, expected {checksum}"
        return ContentReport([Finding(problem, name)])

    def check_array(
        self, tensor: StoredTensor, role: str, entry: Entry, infinity: int | None, *, allowed: bool
    ) -> ContentReport:
        """Check an array's checksum, six-bit scales and, given infinity's bits, that all is finite or `allowed`."""
        report, array = ContentReport(), tensor.arrays[role]
        hasher, at, first, limit, large = xxhash.xxh3_128(), 0, None, _limit(tensor, role), None
        for piece in self._pieces(array.file, entry.begin, entry.end):
            hasher.update(piece)
            if infinity is not None and len(bad := _not_finite(piece, infinity)):
                report.nonfinite[tensor.name] += len(bad)
                first = at + int(bad[0]) if first is None else first
            if limit is not None and large is None and (most := int(np.frombuffer(piece, np.uint8).max())) > limit:
                large = most
            at += len(piece) // DTYPE_BYTES[array.dtype]
        if hasher.hexdigest() != array.checksum:
            problem = f"checksum is {hasher.hexdigest()}, expected {array.checksum}"
            report.findings.append(Finding(problem, array.file, tensor.name, array.key))
        if large is not None:
            problem = f"holds {large}: scales of {tensor.format} have six bits, at most {limit}"
            report.findings.append(Finding(problem, array.file, tensor.name, array.key))
        if first is not None and not allowed:
            row, column = divmod(first, array.shape[-1])
            place = f"row {row}, column {column}"
            if len(array.shape) == 3:
                place = f"matrix {row // array.shape[1]}, row {row % array.shape[1]}, column {column}"
            problem = f"{report.nonfinite[tensor.name]} of its numbers are NaN or infinite, the first at {place}"
            report.findings.append(Finding(problem, array.file, tensor.name, array.key))
        return report

    def _pieces(self, name: str, begin: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes of a range piece by piece, each in the thread's one buffer."""
        mine = self._local
        if not hasattr(mine, "buffer"):
            mine.buffer, mine.name, mine.file = memoryview(bytearray(PIECE_BYTES)), None, None
        if mine.name != name:
            if mine.file is not None:
                mine.file.close()
            mine.file, mine.name = (self.directory / name).open("rb", buffering=0), name
            self._files.append(mine.file)
        fd = mine.file.fileno()
        for at in range(begin, end, PIECE_BYTES):
            if self.stop.is_set():
                return
            piece: memoryview = mine.buffer[: min(PIECE_BYTES, end - at)]
            done = 0
            while done < len(piece):
                with naming(self.directory / name):
                    count = os.preadv(fd, [piece[done:]], at + done)
                if count == 0:
                    raise OSError(0, f"ended at byte {at + done} while it was being read", name)
                done += count
            yield piece
            with self._lock:
                self._progress(len(piece))


def _not_finite(piece: memoryview, infinity: int) -> npt.NDArray[np.intp]:
    """Return the indices of infinite or NaN values: as integers these are the largest of a sign."""
    if infinity == _INFINITY["U8"]:
        exponents = np.frombuffer(piece, np.uint8)
        return _NOWHERE if exponents.max() < infinity else np.flatnonzero(exponents == infinity)
    values = np.frombuffer(piece, np.uint16)
    if values.view(np.int16).max() < infinity and values.max() < infinity | 0x8000:
        return _NOWHERE
    return np.flatnonzero((values & np.uint16(infinity)) == infinity)
