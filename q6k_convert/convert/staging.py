"""Write a directory that appears complete or not at all.

The bundle is written to a partial directory, and put in its place once it is on disk (see `placing`). A run locks
the partial directory, so a second run on the same output is refused. The next run removes what a killed run left
behind. Only files of a bundle are removed, and only if they are the same as when they were checked.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from q6k_convert.convert import locking, placing
from q6k_convert.errors import IOFailedError
from q6k_convert.text import size
from q6k_kernels.bundle import manifest
from q6k_kernels.bundle.companions import check_companions
from q6k_kernels.bundle.naming import is_bundle_file
from q6k_kernels.text import listing

_ELSEWHERE = "Give a new directory as output."


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
    _check_writable(output, final)
    if not os.path.lexists(final):
        return final
    if not final.is_dir():
        same = any(final.samefile(source) for source in sources)
        what = "is the input itself" if same else "exists and is not a directory"
        raise IOFailedError(f"the output {output} {what}", _ELSEWHERE)
    entries = placing.entries(final)
    if not entries or placing.unfinished(final):
        return final
    elsewhere = f"Give a new directory in it: {output / 'bundle'}" if placing.is_fixed(final) else _ELSEWHERE
    inputs = {(s.st_dev, s.st_ino) for s in (source.stat() for source in sources)}
    for entry in entries:
        found = entry.stat() if entry.exists() else entry.lstat()
        if (found.st_dev, found.st_ino) in inputs:
            raise IOFailedError(f"the output {output} holds the input itself, as {entry.name}", _ELSEWHERE)
    try:
        whole = manifest.read(final)
    except manifest.BundleError as error:
        names = listing([entry.name for entry in entries], most=3)
        raise IOFailedError(
            f"the output {output} is not empty and not a whole bundle ({names}): {error}", elsewhere
        ) from error
    # A file for transformers that was changed since is somebody's own.
    changed = {finding.file for finding in check_companions(final, whole)}
    ours = {name for name in (manifest.NAME, *whole.files) if is_bundle_file(name)}
    ours |= set(whole.companions) - changed
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


def _check_writable(output: Path, final: Path) -> None:
    place = final if placing.is_fixed(final) else next(p for p in final.parents if p.exists())
    if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
        raise IOFailedError(f"the output {output} cannot be written: {place} is not writable", _ELSEWHERE)


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
    owned = list[tuple[Path, int]]()
    try:
        with _uninterrupted():
            final.parent.mkdir(parents=True, exist_ok=True)
            owned.append(locking.own(placing.partial_of(final), final))
        partial = owned[0][0]
        placing.recover(partial, final)
        old = placing.contents(final)
        # The run that held the lock until now may have finished this output.
        check_output(output, sources, force=force)
        placing.clear(partial)
        yield partial
        with _uninterrupted():
            placing.put(partial, final, old)
    except BaseException:
        with _uninterrupted():
            for partial, lock in owned:
                if _is_still(partial, lock) and not placing.is_unfinished(partial):
                    placing.clear(partial)
                    partial.rmdir()
            for parent in made:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()
        raise
    finally:
        for _, lock in owned:
            os.close(lock)


def _is_still(directory: Path, descriptor: int) -> bool:
    """Check whether a path still names the directory that was opened, and not what took its place."""
    return os.path.lexists(directory) and os.path.samestat(os.fstat(descriptor), directory.lstat())


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
