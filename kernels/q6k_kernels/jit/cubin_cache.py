"""Compiled kernels on disk, so that only the first run of a version on a machine compiles.

A directory of files named by the SHA-256 of all that determines a cubin: the format below, the compiler, its
options (architecture and macros included) and the source. An entry is

    16 bytes   "q6k cubin 2", a line feed, zeros
    32 bytes   SHA-256 of the rest
     4 bytes   length of the log, little-endian
    the compiler's log, UTF-8
    the cubin

written under another name and renamed, so that processes never see half of one. An entry that breaks this format
is not loaded: it is compiled and written again. So is one that others may have written: the directory is made for
this user alone, and an entry has to be a file that only this user or root can write. A cache that cannot be used
costs time and a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from q6k_kernels.jit.compiler import Compiled

VARIABLE = "Q6K_KERNELS_CACHE"
"""Environment variable that names the directory."""
MAGIC = b"q6k cubin 2\n".ljust(16, b"\0")
SUFFIX = ".cubin"
_HEADER_BYTES = len(MAGIC) + hashlib.sha256().digest_size


class CacheWarning(UserWarning):
    """The cache of compiled kernels cannot be used, or had a damaged entry."""


@dataclass(frozen=True)
class Contents:
    """Number of entries in a cache directory, and their size in bytes."""

    entries: int
    bytes: int


def directory() -> Path:
    """Return `$Q6K_KERNELS_CACHE`, or q6k-kernels in `$XDG_CACHE_HOME` or ~/.cache; it need not exist."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "q6k-kernels"


def key(*parts: str) -> str:
    """Name the entry made from `parts`: compiler, options, source."""
    digest = hashlib.sha256(MAGIC)
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def fetch(name: str, make: Callable[[], Compiled]) -> Compiled:
    """Return the entry of that name; if there is none or it is damaged, store and return `make()`."""
    try:
        path = directory() / f"{name}{SUFFIX}"
        entry = _read(path)
    except FileNotFoundError:
        pass
    except _UntrustedError as error:
        _warn(f"has an entry that is not used, {path.name}: {error}")
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        _warn(f"cannot be read: {error}")
    else:
        payload = entry[_HEADER_BYTES:]
        if entry[:_HEADER_BYTES] == _header(payload):
            end = 4 + int.from_bytes(payload[:4], "little")
            return Compiled(payload[end:], payload[4:end].decode())
        _warn(f"has a damaged entry, {path.name}, which is made again")
    made = make()
    log = made.log.encode()
    payload = len(log).to_bytes(4, "little") + log + made.cubin
    try:
        _write(directory(), f"{name}{SUFFIX}", _header(payload) + payload)
    except (OSError, RuntimeError) as error:
        _warn(f"cannot be written: {error}")
    return made


def contents() -> Contents:
    """Count the entries; a directory that does not exist has none. Raises OSError if it cannot be read."""
    sizes = []
    for path in directory().glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            sizes.append(path.stat().st_size)
    return Contents(len(sizes), sum(sizes))


def probe() -> None:
    """Write a file to the cache and remove it. Raises OSError if that fails."""
    folder = directory()
    make_private(folder)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(MAGIC)


class _UntrustedError(Exception):
    """An entry is no file, or not of this user."""


def _read(path: Path) -> bytes:
    """Read an entry that only this user or root can have written; a pipe in its place does not block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(os.fstat(descriptor))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _check(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _UntrustedError("expected a regular file")
    if status.st_uid not in (0, os.geteuid()):
        raise _UntrustedError(f"expected a file of this user or root, found one of user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _UntrustedError(f"expected a file that only its owner can write, found mode {status.st_mode:o}")


def make_private(folder: Path) -> None:
    """Make a directory for this user alone; one that exists keeps its mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _header(payload: bytes) -> bytes:
    return MAGIC + hashlib.sha256(payload).digest()


def _write(folder: Path, name: str, entry: bytes) -> None:
    make_private(folder)
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(entry)
        Path(temporary).replace(folder / name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _warn(problem: str) -> None:
    try:
        where = str(directory())
    except RuntimeError:
        where = "in the home directory"
    warnings.warn(
        f"the cache of compiled kernels, {where}, {problem}; {VARIABLE} names another directory",
        CacheWarning,
        stacklevel=3,
    )
