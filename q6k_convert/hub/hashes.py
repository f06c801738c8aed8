"""Check by hash that files in the Hub's cache are those that the Hub lists, whoever put them there.

Hashing takes as long as reading, so a check that passed is remembered. It holds while the file keeps its inode,
size and times; no program can set the last of these, the change time:

    HF_ASSETS_CACHE/q6k-convert/checked/HASH    device, inode, size, modified and changed (ns) of the file checked
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from q6k_convert.errors import IOFailedError
from q6k_convert.hub.names import HubFile

Tell = Callable[[int], None]
Progress = Callable[[int, str], AbstractContextManager[Tell]]

_PIECE = 1 << 20


def check(files: Sequence[HubFile], paths: Sequence[Path], cached: Sequence[bool], progress: Progress) -> None:
    """Compare the hash of each file with the listed one.

    Args:
        files: files as the Hub lists them.
        paths: their paths in the cache.
        cached: whether each was in the cache before this run; a new file with a wrong hash is removed.
        progress: makes a progress display from a total in bytes and a label.

    Raises:
        IOFailedError: a file has another hash, or the cache does not record the hash.
    """
    rows = [row for row in zip(files, paths, cached, strict=True) if not _is_remembered(row[0], row[1])]
    if not rows:
        return
    with progress(sum(file.size for file, _, _ in rows), "checking") as tell:
        for file, path, was_cached in rows:
            _check(file, path, was_cached, tell)


def record(path: Path, text: str) -> None:
    """Write a small file in the place of whatever is there, where that is possible: a cache may be read-only."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text)
        new.replace(path)


def _check(file: HubFile, path: Path, was_cached: bool, tell: Tell) -> None:
    """Compare one file's hash with the listed one, and remember a match."""
    if not file.digest:
        raise IOFailedError(
            f"{path}: the cache does not say its hash, for it holds no links",
            "Run without HF_HUB_OFFLINE, or give the file by this path.",
        )
    if not path.is_file():
        raise IOFailedError(
            f"{path}: expected a regular file", f"The cache is damaged: remove {path.resolve()} and run again."
        )
    stamp = _stamp(path)
    found = _digest(file, path, tell)
    if found == file.digest:
        record(_note(file), stamp)  # without this record the next run checks again
        return
    content = path.resolve()
    if was_cached:
        remedy = f"The cache is damaged: remove {content} and run again."
    else:
        content.unlink()
        remedy = "It was damaged on the way and has been removed: run the same command again."
    raise IOFailedError(f"{path}: it has the hash {found}, expected {file.digest}", remedy)


def _digest(file: HubFile, path: Path, tell: Tell) -> str:
    """Return a file's hash in hex, of the same kind as the listed one."""
    if len(file.digest) == 40:  # git's id of a file: the SHA-1 of its length and its content
        hasher = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        hasher = hashlib.sha256()
    with path.open("rb") as content:
        while piece := content.read(_PIECE):
            hasher.update(piece)
            tell(len(piece))
    return hasher.hexdigest()


def _is_remembered(file: HubFile, path: Path) -> bool:
    """Check whether this file has passed before and is unchanged since."""
    try:
        return bool(file.digest) and _note(file).is_file() and _note(file).read_text() == _stamp(path)
    except OSError:
        return False


def _note(file: HubFile) -> Path:
    """Return the path of the record of a passed check."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE, "q6k-convert", "checked", file.digest)


def _stamp(path: Path) -> str:
    """Return a description of a file that any change to the file changes."""
    status = path.stat()
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
