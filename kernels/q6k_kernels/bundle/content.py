"""The check of a bundle's content: checksums of all files and arrays, and scales that are finite.

Every byte is read once, in pieces, several arrays at a time. Memory use does not depend on the bundle's size.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import numpy as np
import xxhash

from q6k_kernels.bundle.manifest import Manifest, StoredArray, StoredTensor
from q6k_kernels.bundle.structure import Entry, Finding, read_header

PIECE_BYTES = 1 << 20
"""Bytes read at a time: few enough to be hashed while they are in the core's own cache."""
# The bits of infinity by dtype; those of a NaN are larger.
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00}


def content_bytes(manifest: Manifest) -> int:
    """Return the number of bytes that `check_content` reads."""
    return sum(file.size for file in manifest.files.values())


def check_content(
    directory: Path, manifest: Manifest, *, jobs: int, progress: Callable[[int], None]
) -> list[Finding]:
    """Check every checksum of the manifest, and that scales are finite unless the bundle was made to keep others.

    Args:
        directory: a bundle whose structure is sound.
        manifest: its manifest.
        jobs: arrays read at the same time.
        progress: called with the number of bytes newly done, from any thread but from one at a time.

    Returns:
        What is wrong; nothing for a sound bundle.

    Raises:
        OSError: a file cannot be read.
    """
    shards = {name: read_header(directory / name) for name in manifest.files if name.endswith(".safetensors")}
    work: list[Callable[[], list[Finding]]] = []
    reader = _Reader(directory, progress)
    for name, file in manifest.files.items():
        work.append(lambda name=name, file=file: reader.check_file(name, file.checked_bytes, file.checksum))  # type: ignore[misc]
    finite = not manifest.options.get("allow_nonfinite")
    # The longest first, so that no long one runs alone at the end.
    for tensor, role, array in sorted(_arrays(manifest), key=lambda item: -_length(shards, item[2])):
        entry = shards[array.file][array.key]
        checked = finite and tensor.storage == "planar" and role in ("scale", "steps")
        work.append(
            lambda t=tensor, a=array, e=entry, c=checked: reader.check_array(t, a, e, finite=c)  # type: ignore[misc]
        )
    with ThreadPoolExecutor(jobs, "verify") as pool:
        try:
            return [finding for found in pool.map(lambda item: item(), work) for finding in found]
        except BaseException:
            reader.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            pool.shutdown()
            reader.close()


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

    def check_file(self, name: str, length: int, checksum: str) -> list[Finding]:
        """Check the first `length` bytes of a file by their checksum: all of it, or a shard's header."""
        hasher = xxhash.xxh3_128()
        for piece in self._pieces(name, 0, length):
            hasher.update(piece)
        if hasher.hexdigest() == checksum:
            return []
        return [Finding(f"checksum of its first {length} bytes is {hasher.hexdigest()}, expected {checksum}", name)]

    def check_array(self, tensor: StoredTensor, array: StoredArray, entry: Entry, *, finite: bool) -> list[Finding]:
        """Check an array's checksum and, with `finite`, that its values are finite."""
        hasher, at, bad = xxhash.xxh3_128(), 0, None
        for piece in self._pieces(array.file, entry.begin, entry.end):
            hasher.update(piece)
            if finite and bad is None and array.dtype in _INFINITY:
                where = _first_not_finite(piece, _INFINITY[array.dtype])
                bad = None if where is None else at + where
            at += len(piece) // 2
        findings = list[Finding]()
        if hasher.hexdigest() != array.checksum:
            problem = f"checksum is {hasher.hexdigest()}, expected {array.checksum}"
            findings.append(Finding(problem, array.file, tensor.name, array.key))
        if bad is not None:
            row, column = divmod(bad, array.shape[-1])
            problem = f"the scale at row {row}, column {column} is NaN or infinite"
            findings.append(Finding(problem, array.file, tensor.name, array.key))
        return findings

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
                if (count := os.preadv(fd, [piece[done:]], at + done)) == 0:
                    raise OSError(0, f"ended at byte {at + done} while it was being read", name)
                done += count
            yield piece
            with self._lock:
                self._progress(len(piece))


def _first_not_finite(piece: memoryview, infinity: int) -> int | None:
    """Return the index of the first infinite or NaN value, or None: as integers these are the largest of a sign."""
    values = np.frombuffer(piece, np.uint16)
    if values.view(np.int16).max() < infinity and values.max() < infinity | 0x8000:
        return None
    return int(np.nonzero((values & np.uint16(infinity)) == infinity)[0][0])
