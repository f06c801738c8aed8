"""Putting a bundle in place on file systems of any kind: mounts, overlays, without locks, without fsync."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bundle_helpers import Listing, below, checked_manifest, failed, invoke, listing, tmpfs, two_tensors
from placed import meanwhile, other_bundle
from q6k_convert.convert import locking
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.errors import IOFailedError

Patch = pytest.MonkeyPatch


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    return memory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return two_tensors().write(tmp_path / "model.gguf")


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
