"""Putting a bundle in place: what appeared or changed there meanwhile is kept, on whatever file system it is."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bundle_helpers import (
    Listing,
    below,
    checked_manifest,
    convert_module,
    failed,
    invoke,
    listing,
    tmpfs,
    two_tensors,
)
from q6k_convert.convert import locking, placing
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.errors import IOFailedError

Change = Callable[[Path], object]
Patch = pytest.MonkeyPatch


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    return memory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return two_tensors().write(tmp_path / "model.gguf")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The directory that outputs lie in; tests compare all of it before and after."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def new(model: Path, tmp_path: Path) -> Listing:
    convert(model, tmp_path / "new")
    return listing(tmp_path / "new")


def other_bundle(out: Path) -> None:
    made = out.parent.parent / "made"
    convert(two_tensors(rows=3, seed=9).write(made.with_name("old.gguf")), made, Options(max_shard_size=600))
    out.parent.mkdir(exist_ok=True)
    made.rename(out)


def meanwhile(monkeypatch: Patch, change: Callable[[], object]) -> None:
    """Let something happen when the output has been checked and the work has begun."""
    real = convert_module.stream

    def stream(*args: Any) -> Any:
        change()
        return real(*args)

    monkeypatch.setattr(convert_module, "stream", stream)


# Data of others


def _theirs(out: Path) -> None:
    """A directory of another program, whose files are named as those of bundles are."""
    out.mkdir(exist_ok=True)
    for name in ("model.safetensors", "bundle.json", "metadata.gguf"):
        (out / name).write_text("mine")


def _linked(out: Path) -> None:
    _theirs(out.with_name("elsewhere"))
    out.symlink_to("elsewhere")


APPEARS: dict[str, Change] = {
    "a directory": _theirs,
    "a file": lambda out: out.write_text("mine"),
    "a link to a directory": _linked,
    "a dangling link": lambda out: out.symlink_to("nowhere"),
    "a bundle": other_bundle,
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", APPEARS)
def test_what_appears_at_the_output_is_kept(
    what: str, force: bool, model: Path, home: Path, monkeypatch: Patch
) -> None:
    appeared = list[Listing]()

    def appear() -> None:
        monkeypatch.undo()
        APPEARS[what](home / "out")
        appeared.append({name: content for name, content in listing(home).items() if ".q6k-partial" not in name})

    meanwhile(monkeypatch, appear)
    with pytest.raises(
        IOFailedError, match="put there, or changed, while the bundle was made; it is left as it is"
    ):
        convert(model, home / "out", force=force)
    assert [listing(home)] == appeared


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_an_empty_directory_that_is_filled_meanwhile_is_kept(
    force: bool, inside: bool, model: Path, home: Path, monkeypatch: Patch
) -> None:
    if inside:
        monkeypatch.setattr(placing, "is_fixed", Path.is_dir)
    (home / "out").mkdir()
    meanwhile(monkeypatch, lambda: _theirs(home / "out"))
    with pytest.raises(IOFailedError, match="put there, or changed, while the bundle was made"):
        convert(model, home / "out", force=force)
    assert set(listing(home / "out").values()) == {b"mine"}
    assert [path.name for path in home.iterdir()] == ["out"]


def test_an_empty_directory_that_appears_is_used(model: Path, home: Path, new: Listing, monkeypatch: Patch) -> None:
    meanwhile(monkeypatch, (home / "out").mkdir)
    convert(model, home / "out")
    assert listing(home) == below("out", new)


def _overwritten(out: Path) -> None:
    (out / "metadata.gguf").write_text("mine")


def _touched(out: Path) -> None:
    os.utime(out / "metadata.gguf", (1, 1))


def _exchanged(out: Path) -> None:
    out.rename(out.with_name("moved"))
    _theirs(out)


def _moved_and_linked(out: Path) -> None:
    out.rename(out.with_name("moved"))
    out.symlink_to("moved")


CHANGES: dict[str, Change] = {
    "a file is added": lambda out: (out / "notes.txt").write_text("mine"),
    "a directory is added": lambda out: (out / "sub").mkdir(),
    "a shard is added": lambda out: (out / "model.safetensors").write_text("mine"),
    "a file is removed": lambda out: (out / "metadata.gguf").unlink(),
    "a file is overwritten": _overwritten,
    "a file is touched": _touched,
    "a file becomes a link": lambda out: (
        (out / "metadata.gguf").rename(out.with_name("m")),
        (out / "metadata.gguf").symlink_to("../m"),
    ),
    "the directory is another": _exchanged,
    "the directory is moved and linked": _moved_and_linked,
}
WAYS: dict[str, dict[str, Callable[..., object]]] = {
    "exchange": {},
    "two renames": {"_renameat2": lambda *_: False},
    "inside": {"is_fixed": Path.is_dir},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("late", [False, True], ids=["while it works", "after the last check"])
def test_a_bundle_that_changes_meanwhile_is_not_replaced(
    what: str, way: str, late: bool, model: Path, home: Path, monkeypatch: Patch
) -> None:
    if way == "inside" and (late or what in ("the directory is another", "the directory is moved and linked")):
        pytest.skip("a mount point is not moved, and right after the check files are removed by their names")
    other_bundle(home / "out")
    for name, patch in WAYS[way].items():
        monkeypatch.setattr(placing, name, patch)
    changed = list[Listing]()

    def change() -> None:
        CHANGES[what](home / "out")
        changed.append({name: content for name, content in listing(home).items() if ".q6k-partial" not in name})

    if late:
        lock = placing.lock
        monkeypatch.setattr(placing, "lock", lambda *paths: (lock(*paths), change())[0])
    else:
        meanwhile(monkeypatch, change)
    with pytest.raises(IOFailedError, match="it is left as it is"):
        convert(model, home / "out", force=True)
    assert [listing(home)] == changed


def test_what_is_put_into_the_old_bundle_at_last_is_kept_and_named(
    model: Path, home: Path, new: Listing, monkeypatch: Patch
) -> None:
    other_bundle(home / "out")
    real = placing._exchange

    def exchange(partial: Path, *more: Any) -> Path:
        old = real(partial, *more)
        (old / "model-00007-of-00007.safetensors").write_text("mine")
        return old

    monkeypatch.setattr(placing, "_exchange", exchange)
    with pytest.raises(IOFailedError, match="kept in .*model-00007-of-00007.safetensors") as caught:
        convert(model, home / "out", force=True)
    assert "Move it out" in caught.value.remedy
    kept = below(".out.q6k-partial", {"model-00007-of-00007.safetensors": b"mine"})
    assert listing(home) == below("out", new) | kept


def test_what_a_killed_exchange_left_is_not_removed_beyond_its_manifest(model: Path, home: Path) -> None:
    other_bundle(home / ".out.q6k-partial")
    (home / ".out.q6k-partial" / "model.safetensors").write_text("mine")
    before = listing(home)
    with pytest.raises(IOFailedError, match="holds what no conversion wrote: model.safetensors"):
        convert(model, home / "out")
    assert listing(home) == before


# Directories that cannot be renamed


@contextmanager
def bound(directory: Path) -> Iterator[None]:
    """Mount a directory of the same file system in this place; skip the test where that is not allowed."""
    source = directory.parent.with_name("bound")
    source.mkdir()
    command = ["mount", "--bind", str(source), str(directory)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("kind", ["tmpfs", "bind mount", "a parent that is not writable"])
def test_an_output_that_cannot_be_renamed_is_filled(
    kind: str, model: Path, home: Path, new: Listing, monkeypatch: Patch
) -> None:
    out = home / "with a space"
    out.mkdir()
    mount = {"tmpfs": lambda: tmpfs(out, "size=1m"), "bind mount": lambda: bound(out)}
    access = os.access
    if kind not in mount:
        monkeypatch.setattr(os, "access", lambda path, mode: path != home and access(path, mode))
    with mount[kind]() if kind in mount else monkeypatch.context():
        seen = []
        meanwhile(monkeypatch, lambda: seen.append([path.name for path in (*out.iterdir(), *home.iterdir())]))
        convert(model, out)
        assert seen == [[".q6k-partial", out.name]]
        assert listing(out) == new
        failed(invoke(model, out), 4, "is already a bundle", "Use --force")
        old = two_tensors(rows=3, seed=9).write(home.parent / "old.gguf")
        convert(old, out, Options(max_shard_size=600), force=True)
        assert {path.name for path in out.iterdir()} == {"bundle.json", *checked_manifest(out)["files"]}
        convert(model, out, force=True)
        assert listing(out) == new
        broken = home.parent / "broken.gguf"
        broken.write_bytes(model.read_bytes()[:-1])
        assert invoke(broken, out, "--force").exit_code == 3
        assert listing(out) == new
        for path in out.iterdir():
            path.unlink()
        (out / "lost+found").mkdir()
        failed(
            invoke(model, out),
            4,
            "is not empty and not a whole bundle",
            f"Give a new directory in it: {out}/bundle",
        )
        convert(model, out / "bundle")
        assert listing(out / "bundle") == new


def test_space_is_asked_for_where_the_bytes_go(model: Path, home: Path) -> None:
    with tmpfs(home / "out", "size=4k"):
        failed(invoke(model, home / "out"), 4, f"{home / 'out'} has 4.10 kB free", "Free some space")
        assert list((home / "out").iterdir()) == []


@contextmanager
def overlay(tmp_path: Path) -> Iterator[Path]:
    """Mount an overlay with a bundle in its lower layer; skip the test where that is not allowed."""
    for name in ("lower", "disk"):
        (tmp_path / name).mkdir()
    with tmpfs(tmp_path / "disk", "size=8m") as disk:
        for name in ("upper", "work", "merged"):
            (disk / name).mkdir()
        other_bundle(tmp_path / "lower" / "out")
        (tmp_path / "lower" / "empty").mkdir()
        layers = f"lowerdir={tmp_path / 'lower'},upperdir={disk / 'upper'},workdir={disk / 'work'}"
        command = ["mount", "-t", "overlay", "-o", layers, "overlay", str(disk / "merged")]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"mounting an overlay is not permitted here: {mounted.stderr.strip()}")
        try:
            yield disk / "merged"
        finally:
            subprocess.run(["umount", str(disk / "merged")], check=True)


def test_a_bundle_in_the_lower_layer_of_an_overlay_is_replaced(model: Path, tmp_path: Path, new: Listing) -> None:
    with overlay(tmp_path) as merged:
        with pytest.raises(OSError, match="cross-device"):
            (merged / "out").rename(merged / "moved")
        for name in ("out", "empty"):
            convert(model, merged / name, force=True)
            assert listing(merged / name) == new
        assert sorted(path.name for path in merged.iterdir()) == ["empty", "out"]


def test_a_file_that_appears_while_files_are_moved_is_kept_and_the_next_run_ends_the_work(
    model: Path, home: Path, new: Listing, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(placing, "is_fixed", Path.is_dir)
    (home / "out").mkdir()
    monkeypatch.setattr(placing, "_check_same", lambda *_: (home / "out" / "model.safetensors").write_text("mine"))
    with pytest.raises(IOFailedError, match="out/model.safetensors appeared while the bundle was put there"):
        convert(model, home / "out")
    assert (home / "out" / "model.safetensors").read_text() == "mine"
    (home / "out" / "model.safetensors").rename(home / "theirs")
    # The work is ended before the new run looks at what is there.
    failed(invoke(model, home / "out"), 4, "is already a bundle", "Use --force")
    assert listing(home) == below("out", new) | {"theirs": b"mine"}


# File systems without locks, and without fsync of directories


def refuse_locks(monkeypatch: Patch, code: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_will_do(
    code: int, model: Path, home: Path, new: Listing, monkeypatch: Patch
) -> None:
    refuse_locks(monkeypatch, code)
    other_bundle(home / "a" / "out")
    convert(model, home / "a" / "out", force=True)
    assert listing(home / "a") == below("out", new)
    assert [path.name for path in (home / "a").iterdir()] == ["out"]


def test_a_lock_that_fails_otherwise_is_an_error_that_leaves_nothing(
    model: Path, home: Path, monkeypatch: Patch
) -> None:
    refuse_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        convert(model, home / "a" / "out")
    assert listing(home) == {}


@pytest.mark.parametrize("force", [False, True])
def test_of_two_runs_without_locks_the_first_to_end_wins(
    force: bool, model: Path, home: Path, monkeypatch: Patch
) -> None:
    refuse_locks(monkeypatch, errno.ENOSYS)

    def second() -> None:
        monkeypatch.undo()
        refuse_locks(monkeypatch, errno.ENOSYS)
        convert(two_tensors(seed=9).write(home.parent / "old.gguf"), home / "out")

    meanwhile(monkeypatch, second)
    with pytest.raises(IOFailedError, match="it is left as it is"):
        convert(model, home / "out", force=force)
    assert checked_manifest(home / "out")["sources"][0]["name"] == "old.gguf"
    assert [path.name for path in home.iterdir()] == ["out"]


def test_without_locks_a_directory_of_that_name_is_left_alone(home: Path, monkeypatch: Patch) -> None:
    refuse_locks(monkeypatch, errno.ENOSYS)
    (home / "x").mkdir()
    for _ in range(2):
        path, descriptor = locking.own(home / "x", home / "out")
        os.close(descriptor)
        assert path.name.startswith("x-")
    assert len(list(home.iterdir())) == 3


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_directories_that_refuse_fsync_will_do(
    code: int, model: Path, home: Path, new: Listing, monkeypatch: Patch
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    convert(model, home / "out")
    assert listing(home) == below("out", new)
