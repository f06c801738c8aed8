"""Writing a bundle's directory: shards in any order, then metadata, and the manifest last.

    out/
      model.safetensors            or model-00001-of-0000N.safetensors and their index
      metadata.gguf                the source's key-value pairs, no tensors
      bundle.json                  the manifest; without it a directory is no bundle

Array data arrives as pieces at positions, from any number of threads (`write`), and is hashed in
order by one (`hash`). The caller writes a bundle under a temporary name and renames the directory
once `finish` has made it durable.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.bundle.manifest import Manifest, SourceFile, StoredArray, StoredFile, StoredTensor
from q6k_kernels.bundle.naming import naming
from q6k_kernels.bundle.shards import INDEX_NAME, ArraySpec, Shard, index_json

WRITEBACK_BYTES = 32 << 20
"""Bytes written after which the disk begins to store them, while more are being made."""
WAITING = 8
"""The most whole shards that wait for the disk, open: it may be slow, and a process may hold few files open."""


class BundleWriter:
    """Writer of one bundle into an existing, empty directory.

    Args:
        directory: the directory; its files are created, never opened if they exist.
        shards: the layout, from `plan_shards`.

    Raises (every method): OSError, with the file's name.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard]) -> None:
        self.directory = directory
        self._shards = {array.key: shard for shard in shards for array in shard.arrays}
        self._hashes = {key: xxhash.xxh3_128() for key in self._shards}
        self._missing = {shard.name: sum(a.nbytes for a in shard.arrays) for shard in shards}
        self._files: dict[str, StoredFile] = {}
        self._open = dict[str, int]()
        self._lock = threading.Lock()
        # One thread keeps the disk busy with what is written while more is being made.
        self._disk = ThreadPoolExecutor(1, "writeback")
        self._syncs = list[Future[None]]()
        self._unsynced = 0
        try:
            for shard in shards:
                if not self._missing[shard.name]:
                    self._descriptor(shard)
                    self._sync(shard.name, close=True)
            if len(shards) > 1:
                self.add_file(INDEX_NAME, [index_json(shards)])
        except BaseException:
            self.close()
            raise

    def write(self, key: str, at: int, data: memoryview) -> None:
        """Write `data` at byte `at` of an array. Any thread may call it, in any order."""
        shard = self._shards[key]
        _pwrite(shard.name, self._descriptor(shard), data, shard.offsets[key] + at)

    def hash(self, key: str, data: memoryview) -> None:
        """Add the next bytes of an array, already written, to its checksum. In order, from one thread."""
        name = self._shards[key].name
        self._hashes[key].update(data)
        self._missing[name] -= len(data)
        self._unsynced += len(data)
        if self._missing[name] == 0:
            self._syncs.append(self._disk.submit(self._sync, name, close=True))
            if len(self._syncs) > WAITING:
                self._syncs[-1 - WAITING].result()
        elif self._unsynced >= WRITEBACK_BYTES and all(sync.done() for sync in self._syncs):
            self._unsynced = 0
            self._syncs.append(self._disk.submit(self._sync, name, close=False))

    def add_file(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write a whole file beside the shards."""
        fd, hasher, size = self._create(name), xxhash.xxh3_128(), 0
        for piece in pieces:
            _pwrite(name, fd, piece, size)
            hasher.update(piece)
            size += len(piece)
        self._sync(name, close=True)
        self._files[name] = StoredFile(size, size, hasher.hexdigest())

    def stored_array(self, spec: ArraySpec) -> StoredArray:
        """Return the manifest's entry of an array, all of which has been hashed."""
        return StoredArray(
            key=spec.key,
            dtype=spec.dtype,
            shape=list(spec.shape),
            file=self._shards[spec.key].name,
            checksum=self._hashes[spec.key].hexdigest(),
        )

    def finish(
        self,
        *,
        producer: str,
        options: dict[str, Any],
        architecture: str,
        sources: list[SourceFile],
        tied: dict[str, str],
        tensors: list[StoredTensor],
    ) -> Manifest:
        """Make everything durable, then write the manifest and make it durable, too."""
        for sync in self._syncs:
            sync.result()
        if any(self._missing.values()):
            raise RuntimeError("finish was called before every array was written and hashed")
        files = dict(sorted(self._files.items()))
        manifest = Manifest(producer, options, architecture, sources, files, tied, tensors)
        fsync_directory(self.directory)
        _pwrite(manifests.NAME, self._create(manifests.NAME), manifests.serialize(manifest), 0)
        self._sync(manifests.NAME, close=True)
        fsync_directory(self.directory)
        self.close()
        return manifest

    def close(self) -> None:
        """Close the files, complete or not. It is for the caller to remove the directory."""
        self._disk.shutdown(cancel_futures=True)
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def _create(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._open[name] = os.open(self.directory / name, flags, 0o666)
        return self._open[name]

    def _descriptor(self, shard: Shard) -> int:
        """Return the shard's descriptor, created at its first use, so that few are open at a time."""
        with self._lock:
            if shard.name not in self._open:
                fd = self._create(shard.name)
                with naming(shard.name):
                    os.ftruncate(fd, shard.size)
                _pwrite(shard.name, fd, shard.header, 0)
                self._files[shard.name] = StoredFile(
                    shard.size, len(shard.header), manifests.checksum(shard.header)
                )
            return self._open[shard.name]

    def _sync(self, name: str, *, close: bool) -> None:
        with naming(name):
            if close:
                os.fsync(self._open[name])
                os.close(self._open.pop(name))
            else:
                os.fdatasync(self._open[name])


def _pwrite(name: str, fd: int, data: bytes | memoryview, at: int) -> None:
    view, done = memoryview(data), 0
    with naming(name):
        while done < len(view):
            done += os.pwrite(fd, view[done:], at + done)


def fsync_directory(directory: Path) -> None:
    """Make the directory's entries durable, where the file system can do that for a directory."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(str(directory)):
            os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)
