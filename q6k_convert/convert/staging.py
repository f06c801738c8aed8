"""Write a directory that appears complete or not at all.

The bundle is written to `.NAME.q6k-partial` beside `NAME` and renamed to `NAME` once it is on disk.
A run locks the partial directory, so a second run on the same output is refused. The next run removes
what a killed run left behind. Nothing is overwritten in place, and only files of a bundle are removed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from q6k_convert.errors import IOFailedError
from q6k_convert.text import size
from q6k_kernels.bundle import manifest
from q6k_kernels.bundle.writer import fsync_directory
from q6k_kernels.text import listing

_ELSEWHERE = "Give a new directory as output."
_OUR_NAMES = re.compile(
    r"bundle\.json|metadata\.gguf|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output(output: Path, sources: Sequence[Path], *, force: bool) -> Path:
    """Return the path of the bundle with symlinks resolved, after checking that it may be written there.

    Raises:
        IOFailedError: something is in the way, or the output and an input are the same or nested.
    """
    try:
        final = output.resolve()
    except (RuntimeError, OSError) as error:  # a loop of symlinks; which of the two depends on Python
        raise IOFailedError(f"the output {output} cannot be resolved: {error}", _ELSEWHERE) from error
    for source in sources:
        actual = source.resolve()
        if actual == final or final in actual.parents or actual in final.parents:
            raise IOFailedError(f"the output {output} and the input {source} are the same or nested", _ELSEWHERE)
    if not os.path.lexists(final):
        return final
    if not final.is_dir():
        same = any(final.samefile(source) for source in sources)
        what = "is the input itself" if same else "exists and is not a directory"
        raise IOFailedError(f"the output {output} {what}", _ELSEWHERE)
    entries = sorted(final.iterdir())
    if not entries:
        return final
    inputs = {(s.st_dev, s.st_ino) for s in (source.stat() for source in sources)}
    for entry in entries:
        found = entry.stat() if entry.exists() else entry.lstat()
        if (found.st_dev, found.st_ino) in inputs:
            raise IOFailedError(f"the output {output} holds the input itself, as {entry.name}", _ELSEWHERE)
    try:
        ours = {manifest.NAME, *manifest.read(final).files}
    except manifest.BundleError as error:
        names = listing([entry.name for entry in entries], most=3)
        raise IOFailedError(
            f"the output {output} is not empty and not a whole bundle ({names}): {error}", _ELSEWHERE
        ) from error
    ours = {name for name in ours if _OUR_NAMES.fullmatch(name)}
    foreign = [e.name for e in entries if e.name not in ours or e.is_symlink() or not e.is_file()]
    if foreign:
        raise IOFailedError(
            f"the output {output} holds what is not part of its bundle: {listing(foreign)}",
            "Move those away, or give a new directory as output.",
        )
    if not force:
        raise IOFailedError(
            f"the output {output} is already a bundle", "Use --force to replace it, or give another directory."
        )
    return final


def check_space(final: Path, needed: int) -> None:
    """Check that the file system of `final` has `needed` bytes free.

    Raises:
        IOFailedError: it has not.
    """
    place = next(p for p in (final, *final.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise IOFailedError(
            f"{final}: the bundle takes {size(needed)} ({needed} bytes), but {place} has {size(free)} free",
            "Free some space, or give an output on another disk.",
        )


@contextmanager
def staged(output: Path, sources: Sequence[Path], *, force: bool) -> Iterator[Path]:
    """Yield an empty directory to fill. It becomes `output` when the block ends, and is removed if the block fails.

    Raises:
        IOFailedError: `check_output` refuses the output, or another run is writing to it.
    """
    final = check_output(output, sources, force=force)
    made = [p for p in (final.parent, *final.parent.parents) if not p.exists()]
    partial = final.with_name(f".{final.name}.q6k-partial")
    locks = list[int]()
    try:
        with _uninterrupted():
            final.parent.mkdir(parents=True, exist_ok=True)
            locks.append(_locked(partial, final))
        _recover(final)
        # The run that held the lock until now may have finished this output.
        check_output(output, sources, force=force)
        _clear(partial)
        yield partial
        with _uninterrupted():
            _put(partial, final)
    except BaseException:
        with _uninterrupted():
            if locks and partial.exists():
                _clear(partial)
                partial.rmdir()
            for parent in made:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()
        raise
    finally:
        for lock in locks:
            os.close(lock)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay SIGINT, SIGTERM and SIGHUP until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread only
        return
    waiting = list[int]()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
    if waiting and callable(handler := handlers[signal.Signals(waiting[0])]):
        handler(waiting[0], None)


def _locked(partial: Path, final: Path) -> int:
    """Create and lock the partial directory, and return the descriptor that holds the lock."""
    try:
        partial.mkdir()
        created = True
    except FileExistsError:
        created = False
    try:
        return _lock(partial, final)
    except OSError:
        if created:
            partial.rmdir()
        raise


def _lock(directory: Path, final: Path) -> int:
    if directory.is_symlink() or not directory.is_dir():
        raise IOFailedError(f"{directory} is in the way: it should be a directory", "Move it away.")
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    return fd


def _recover(final: Path) -> None:
    """Restore or remove the old bundle of a run that was killed between the two renames of `_exchange`."""
    aside = _aside(final)
    if not os.path.lexists(aside):
        return
    lock = _lock(aside, final)
    try:
        if final.exists():
            _clear(aside)
            aside.rmdir()
        else:
            aside.rename(final)
    finally:
        os.close(lock)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.q6k-replaced")


def _clear(directory: Path) -> None:
    """Remove a bundle's files from a directory.

    Raises:
        IOFailedError: the directory holds anything else; then nothing is removed.
    """
    entries = list(directory.iterdir())
    foreign = [e.name for e in entries if not _OUR_NAMES.fullmatch(e.name) or e.is_dir()]
    if foreign:
        raise IOFailedError(
            f"{directory} holds what no conversion wrote: {listing(foreign)}", "Remove that directory by hand."
        )
    # The manifest goes first: without it, nobody takes the rest for a bundle.
    for entry in sorted(entries, key=lambda e: e.name != manifest.NAME):
        entry.unlink()


def _put(partial: Path, final: Path) -> None:
    """Rename the complete bundle into place, then remove the old one."""
    if not final.exists() or not any(final.iterdir()):
        partial.rename(final)
        fsync_directory(final.parent)
        return
    # The old bundle gets the partial directory's name, which another run would try to lock.
    lock = _lock(final, final)
    try:
        old = _exchange(partial, final)
        fsync_directory(final.parent)
        _clear(old)
        old.rmdir()
    finally:
        os.close(lock)


def _exchange(partial: Path, final: Path) -> Path:
    """Exchange the new bundle with the old one, in one step where the file system supports it.

    Returns:
        The path of the old bundle.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        paths = os.fsencode(partial), os.fsencode(final)
        if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return partial
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(final))
    aside = _aside(final)
    final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        aside.rename(final)
        raise
    return aside
