"""Make and lock the directory that a run writes to, so that no two runs write to one.

The lock is flock(2) on the directory; it ends with the process that holds it. Some file systems (Lustre, CIFS) have
no locks. There every run makes a directory of its own; what a killed run leaves there is not found again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from pathlib import Path

from q6k_convert.errors import IOFailedError

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def own(directory: Path, final: Path) -> tuple[Path, int]:
    """Create a directory, or take over what a killed run left, and lock it.

    Args:
        directory: its path; where the file system has no locks, `-` and eight random digits are put behind it.
        final: the run's output, for messages.

    Returns:
        The path, and the descriptor that holds the lock.

    Raises:
        IOFailedError: another run has the directory, or something else has its name.
    """
    try:
        directory.mkdir()
        created = True
    except FileExistsError:
        created = False
    try:
        fd, locked = _try(directory, final)
    except OSError:
        if created:
            directory.rmdir()
        raise
    if locked:
        return directory, fd
    os.close(fd)
    if created:
        directory.rmdir()
    single = directory.with_name(f"{directory.name}-{secrets.token_hex(4)}")
    single.mkdir()
    return single, _try(single, final)[0]


def lock(directory: Path, final: Path) -> int:
    """Lock a directory where the file system can, and return the descriptor that holds the lock.

    Raises:
        IOFailedError: another run has locked it, or it is no directory.
    """
    return _try(directory, final)[0]


def _try(directory: Path, final: Path) -> tuple[int, bool]:
    """Open and lock a directory; return the descriptor, and whether the file system has locks."""
    if directory.is_symlink() or not directory.is_dir():
        raise IOFailedError(f"{directory} is in the way: it should be a directory", "Move it away.")
    fd, locked = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), True
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locked = False
        # It may have been renamed or removed between opening and locking.
        if not os.path.samestat(os.fstat(fd), directory.stat()):
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(fd)
        raise IOFailedError(
            f"another run is writing to {final}", "Wait until it has ended, or give another directory."
        ) from error
    except OSError as error:
        os.close(fd)
        error.filename = str(directory)
        raise
    return fd, locked
