"""Put a complete bundle in its place: replace what was there only if it is still the same, and settle killed runs.

    beside   `.NAME.q6k-partial` is renamed to `NAME`. An old bundle is exchanged with it in one step, or in two
             renames with `.NAME.q6k-replaced` where the file system cannot exchange.
    inside   where `NAME` cannot be renamed, as it is a mount point or its parent is not writable, the new bundle is
             made in `NAME/.q6k-partial`. Its files are moved up one by one, the manifest last.

Files are also moved where a directory turns out not to be renamed, such as one in the lower layer of an overlay. A
run that is killed while it moves leaves a note in the partial directory, from which the next run ends the work:

    .q6k-old      names of the old bundle's files, to be removed before anything is moved
    .q6k-moving   they have been removed
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from q6k_convert.convert.locking import lock
from q6k_convert.errors import IOFailedError
from q6k_kernels.bundle import manifest
from q6k_kernels.bundle.naming import is_bundle_file, may_be_in_bundle
from q6k_kernels.bundle.writer import fsync_directory
from q6k_kernels.text import listing

Contents = dict[str, tuple[int, int]]
"""What lies in a directory: size and time of the last change of each file; (-1, -1) for anything but a file."""

_INSIDE = ".q6k-partial"
_NEW, _OLD, _MOVING = ".q6k-new", ".q6k-old", ".q6k-moving"
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2
_NO_SUCH_RENAME = (errno.ENOSYS, errno.EINVAL)
_CANNOT_RENAME = (errno.EXDEV, errno.EBUSY, errno.EPERM)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def is_fixed(final: Path) -> bool:
    """Check whether a directory cannot be renamed: it is a mount point, or its parent is not writable."""
    return final.is_dir() and (_is_mount(final) or not os.access(final.parent, os.W_OK | os.X_OK))


def partial_of(final: Path) -> Path:
    """Return the path of the directory in which the bundle is made."""
    return final / _INSIDE if is_fixed(final) else final.with_name(f".{final.name}.q6k-partial")


def unfinished(final: Path) -> list[Path]:
    """Return the partial directories of runs that were killed while they moved files out of them."""
    first = partial_of(final)
    return [path for path in sorted(first.parent.glob(f"{glob.escape(first.name)}*")) if is_unfinished(path)]


def is_unfinished(partial: Path) -> bool:
    """Check whether files are being moved out of a partial directory."""
    return any((partial / note).is_file() for note in (_OLD, _MOVING))


def entries(final: Path) -> list[Path]:
    """Return what lies in an output, without the directories in which runs make its bundle."""
    prefix = _INSIDE if is_fixed(final) else None
    inside = [
        p for p in final.iterdir() if prefix and p.name.startswith(prefix) and p.is_dir() and not p.is_symlink()
    ]
    return sorted(set(final.iterdir()) - set(inside))


def contents(final: Path) -> Contents:
    """Return what lies in an output, to be compared later; nothing if it is not there or is no directory."""
    found: Contents = {}
    if final.is_symlink() or not final.is_dir():
        return found
    for path in entries(final):
        status = path.lstat()
        regular = stat.S_ISREG(status.st_mode)
        found[path.name] = (status.st_size, status.st_mtime_ns) if regular else (-1, -1)
    return found


def clear(directory: Path) -> None:
    """Remove a bundle's files, complete or not, from a directory that runs write to.

    Raises:
        IOFailedError: the directory holds anything else; then nothing is removed.
    """
    found = {path.name: path for path in directory.iterdir()}
    listed = set(found)
    with suppress(manifest.BundleError):  # without a whole manifest, names are all there is to go by
        whole = manifest.read(directory)
        listed = {manifest.NAME, *whole.files, *whole.companions}
    ours = {name for name in listed if may_be_in_bundle(name)} | {_NEW}
    if foreign := [name for name, path in found.items() if name not in ours or path.is_dir()]:
        raise IOFailedError(
            f"{directory} holds what no conversion wrote: {listing(foreign)}", "Remove that directory by hand."
        )
    _unlink(directory, list(found))


def put(partial: Path, final: Path, old: Contents) -> None:
    """Put the complete bundle in place.

    Args:
        partial: the directory that has it.
        final: the output: missing, an empty directory, or a bundle to be replaced.
        old: its `contents` when that was checked.

    Raises:
        IOFailedError: the output is no longer the same; then it is left alone.
    """
    try:
        if partial.parent == final:
            raise _FixedError
        if old:
            _replace(partial, final, old)
        else:
            # Of what may be there, rename(2) replaces an empty directory and nothing else.
            with _renaming(final):
                partial.rename(final)
        fsync_directory(final.parent)
    except _FixedError:
        _check_same(final, old)
        _fill(partial, final, old)


def recover(partial: Path, final: Path) -> None:
    """End what runs began that were killed while they put their bundle in place.

    Args:
        partial: the directory of this run, which is kept.
        final: the output.
    """
    for left in unfinished(final):
        _move_up(left, final)
        if left != partial:
            left.rmdir()
    if partial.parent == final or not os.path.lexists(aside := _aside(final)):
        return
    held = lock(aside, final)
    try:
        if final.exists():
            clear(aside)
            aside.rmdir()
        else:
            aside.rename(final)
    finally:
        os.close(held)


class _FixedError(Exception):
    """The output cannot be renamed, or nothing can be renamed over it."""


@contextmanager
def _renaming(final: Path) -> Iterator[None]:
    """Turn errors of a rename that has the output as source or target into what they mean."""
    try:
        yield
    except OSError as error:
        if error.errno in _TAKEN:
            raise _changed(final) from error
        if error.errno in _CANNOT_RENAME and final.is_dir():
            raise _FixedError from error
        raise


def _replace(partial: Path, final: Path, old: Contents) -> None:
    """Exchange the new bundle with the old one, check that this is what was to be replaced, and remove it."""
    _check_same(final, old)
    # The old bundle gets the partial directory's name, which another run would try to lock.
    held = lock(final, final)
    try:
        replaced = _exchange(partial, final, old)
        fsync_directory(final.parent)
        _unlink(replaced, list(old))
        if kept := [path.name for path in replaced.iterdir()]:
            raise IOFailedError(
                f"{final} is the new bundle, but something was put into the old one meanwhile, which is kept in "
                f"{replaced}: {listing(kept)}",
                "Move it out of there, and remove that directory.",
            )
        replaced.rmdir()
    finally:
        os.close(held)


def _exchange(partial: Path, final: Path, old: Contents) -> Path:
    """Exchange the directories, in one step where the file system can, and return the path of the old bundle.

    Raises:
        IOFailedError: what was there is not the `old` contents; then it is there again.
    """
    with _renaming(final):
        exchanged = _renameat2(partial, final, _RENAME_EXCHANGE)
    if exchanged:
        if contents(partial) != old:
            _renameat2(partial, final, _RENAME_EXCHANGE)
            raise _changed(final)
        return partial
    aside = _aside(final)
    with _renaming(final):
        final.rename(aside)
    try:
        if contents(aside) != old:
            raise _changed(final)
        with _renaming(final):
            partial.rename(final)
    except BaseException:
        if not os.path.lexists(final):
            aside.rename(final)
        raise
    return aside


def _fill(partial: Path, final: Path, old: Contents) -> None:
    """Remove the old bundle's files, and move the new ones up, so that the next run can end what is cut short."""
    new = partial / _NEW
    with new.open("w", encoding="utf-8") as file:
        json.dump(list(old), file)
        file.flush()
        os.fsync(file.fileno())
    new.rename(partial / _OLD)
    fsync_directory(partial)
    _move_up(partial, final)
    partial.rmdir()


def _move_up(partial: Path, final: Path) -> None:
    """Do what a note in the partial directory says is left to do, and remove the note."""
    if (partial / _OLD).is_file():
        names = json.loads((partial / _OLD).read_text(encoding="utf-8"))
        _unlink(final, [name for name in names if may_be_in_bundle(name)])
        fsync_directory(final)
        (partial / _OLD).rename(partial / _MOVING)
    found = [path.name for path in partial.iterdir() if is_bundle_file(path.name)]
    for name in sorted(found, key=lambda name: name == manifest.NAME):
        if name == manifest.NAME:
            fsync_directory(final)
        try:
            rename_new(partial / name, final / name)
        except FileExistsError as error:
            raise IOFailedError(
                f"{final / name} appeared while the bundle was put there",
                "Move it away and run the same command again, which ends what this run began.",
            ) from error
    fsync_directory(final)
    (partial / _MOVING).unlink()


def rename_new(old: Path, new: Path) -> None:
    """Rename a file to a name that is not there; raise FileExistsError if it is."""
    if not _renameat2(old, new, _RENAME_NOREPLACE):
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        old.rename(new)


def _unlink(directory: Path, names: list[str]) -> None:
    # The manifest goes first: without it, nobody takes the rest for a bundle.
    for name in sorted(names, key=lambda name: name != manifest.NAME):
        (directory / name).unlink(missing_ok=True)


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Rename with flags; return False where the system or the file system does not know them."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_RENAME:
        return False
    raise OSError(code, os.strerror(code), str(new))


def _check_same(final: Path, old: Contents) -> None:
    if contents(final) != old:
        raise _changed(final)


def _changed(final: Path) -> IOFailedError:
    return IOFailedError(
        f"the output {final}: something was put there, or changed, while the bundle was made; it is left as it is, "
        "and the new bundle is given up",
        "Look at what is there, and convert again to another directory.",
    )


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.q6k-replaced")


def _is_mount(path: Path) -> bool:
    """Check whether something is mounted here."""
    if path.is_mount():
        return True
    try:
        # A directory may be mounted from the same file system, which only this list tells.
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    points = {re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4]) for line in mounts}
    return os.fsencode(path) in points
