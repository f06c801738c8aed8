"""Runs that die, are interrupted, meet another run or a broken disk: nothing half-made is ever left.

`test_staging_failures.py` runs these tests in a process of their own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bundle_helpers import (
    STRUCK,
    Gate,
    Listing,
    before,
    below,
    convert_module,
    fork,
    fork_cli,
    listing,
    run_cli,
    strike,
    tmpfs,
    two_tensors,
)
from gguf_builder import Builder, weight
from q6k_convert.cli import main
from q6k_convert.convert import placing, stream
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels.bundle.writer import BundleWriter


def nothing() -> None:
    """A patch that changes nothing."""


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    return memory


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model; buffers are as small, which children would fill with zeros hundreds of times."""
    monkeypatch.setattr(stream, "PIECE_BYTES", 64 * 210)
    return two_tensors().write(tmp_path / "model.gguf")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def old(tmp_path: Path) -> Listing:
    """Another bundle, with other files, that lies in the output's place where a test says so."""
    convert(two_tensors(rows=3, seed=9).write(tmp_path / "old.gguf"), tmp_path / "old", Options(max_shard_size=600))
    return listing(tmp_path / "old")


def place(content: Listing, directory: Path) -> None:
    directory.mkdir()
    for name, data in content.items():
        assert isinstance(data, bytes)
        (directory / name).write_bytes(data)


def without_exchange() -> None:
    """A patch: directories cannot be exchanged in one step."""

    def renameat2(*_: object) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1

    real = ctypes.CDLL
    fake = type("Library", (), {"renameat2": staticmethod(renameat2)})
    ctypes.CDLL = lambda name, **more: fake if name is None else real(name, **more)


def inside() -> None:
    """A patch: outputs are mount points."""
    placing.is_fixed = Path.is_dir


def unmovable() -> None:
    """A patch: as in the lower layer of an overlay, directories can be neither exchanged nor renamed."""

    def renameat2(old: Path, new: Path, flags: int) -> bool:
        if old.is_dir():
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(old, new, flags)

    real = placing._renameat2
    placing._renameat2 = renameat2


# Killed


@pytest.mark.parametrize(
    ("replacing", "patch"),
    [(False, nothing), (True, nothing), (True, without_exchange), (True, inside), (True, unmovable)],
    ids=["new", "replacing", "replacing in two renames", "replacing inside", "replacing by moving"],
)
def test_a_run_killed_at_any_step_leaves_a_whole_bundle_or_none_and_the_next_run_succeeds(
    replacing: bool,
    patch: Callable[[], None],
    model: Path,
    home: Path,
    log: Path,
    old: Listing,
    new: Listing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, outcomes = home / "out", set()
    for at in count():
        if replacing:
            place(old, out)

        def run(at: int = at) -> None:
            patch()
            strike(at, signal.SIGKILL, lines=False)()
            convert(model, out, force=True, jobs=1)

        code, said = fork(run, log).wait()
        assert code in (0, -signal.SIGKILL), said
        found = listing(out) if out.exists() else None
        if found is not None and patch in (inside, unmovable):
            # While files are moved one by one, the directory is no bundle.
            found = {name: content for name, content in found.items() if not name.startswith(".q6k-partial")}
            found = found if "bundle.json" in found else None
        assert found in ([old, new] if replacing and patch is nothing else [None, old, new]), f"step {at}"
        outcomes.add((code, found == old, found == new))
        with monkeypatch.context() as again:
            if patch is inside:
                again.setattr(placing, "is_fixed", Path.is_dir)
            convert(model, out, force=True)
        assert listing(home) == below("out", new), f"step {at}"
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
        if STRUCK not in said:
            break
    # Or else the steps were not where the work is.
    assert at > 30
    assert outcomes >= {(-9, replacing, False), (-9, False, True), (0, False, True)}


# Interrupted


@pytest.mark.parametrize(
    ("number", "stride", "replacing"),
    [(signal.SIGINT, 1, True), (signal.SIGTERM, 3, False)],
    ids=["replacing", "new"],
)
def test_a_run_interrupted_at_any_step_exits_130_and_leaves_nothing_behind(
    number: signal.Signals,
    stride: int,
    replacing: bool,
    model: Path,
    home: Path,
    log: Path,
    old: Listing,
    new: Listing,
) -> None:
    out, codes, wrong = home / "a" / "out", set(), []
    # What the command imports while it runs, children have from here.
    main.convert(str(model), home.with_name("imported"), jobs=1, quiet=True)
    for at in count(0, stride):
        if replacing:
            out.parent.mkdir()
            place(old, out)
        earlier = listing(home)

        def run(at: int = at) -> None:
            strike(at, number, lines=True)()
            # The command without its parser and its tables, which would take most of the time.
            main.convert(str(model), out, force=True, jobs=1, quiet=True)

        code, said = fork(run, log).wait()
        codes.add(code)
        later = listing(home)
        done = {"a": None} | below("a/out", new)
        told = code == 130 and f"error: interrupted ({number.name})\n" in said
        # Past the rename the new bundle is there, whole, and stays.
        if not (later == done if code == 0 else told and later in (earlier, done)):
            wrong.append((at, code, sorted(later.keys() ^ earlier.keys()), said[-200:]))
        for path in sorted(home.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if STRUCK not in said:
            break
    assert not wrong, f"{len(wrong)} steps of {at}, first {wrong[0]}, last {wrong[-1]}"
    assert at > 100
    assert codes == {0, 130}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_outside_in_the_middle_of_the_stream_exits_130_and_leaves_nothing_behind(
    number: signal.Signals, model: Path, home: Path, log: Path
) -> None:
    gate = Gate()
    run = fork_cli(model, home / "out", log=log, patch=before(convert_module, "stream", gate.stop_here))
    gate.wait_until_reached()
    assert ".out.q6k-partial/metadata.gguf" in listing(home)
    os.kill(run.pid, number)
    code, said = run.wait()
    assert code == 130
    assert f"error: interrupted ({number.name})\ntry: Run the same command again.\n" in said
    assert listing(home) == {}


# Two runs on one output


def test_a_second_run_on_the_same_output_is_refused_while_the_first_runs(
    model: Path, home: Path, log: Path, new: Listing
) -> None:
    gate = Gate()
    first = fork_cli(model, home / "out", log=log, patch=before(convert_module, "stream", gate.stop_here))
    gate.wait_until_reached()
    under_way = listing(home)
    for force in ([], ["--force"]):
        second = run_cli(model, home / "out", *force)
        assert second.returncode == 4
        assert f"error: another run is writing to {home / 'out'}\n" in second.stderr
        assert listing(home) == under_way
    gate.open()
    assert first.wait()[0] == 0
    assert listing(home) == below("out", new)


def test_a_run_that_starts_while_another_puts_its_bundle_in_place_harms_neither(
    model: Path, home: Path, tmp_path: Path, old: Listing, new: Listing
) -> None:
    place(old, home / "out")
    renaming = Gate()
    # The first has exchanged the two directories and is about to remove the old bundle.
    first = fork_cli(
        model, home / "out", "--force", log=tmp_path / "1",
        patch=before(placing, "fsync_directory", renaming.stop_here),
    )  # fmt: skip
    renaming.wait_until_reached()
    streaming = Gate()
    second = fork_cli(
        model, home / "out", "--force", log=tmp_path / "2",
        patch=before(BundleWriter, "finish", streaming.stop_here),
    )  # fmt: skip
    refused = not streaming.is_reached()
    renaming.open()
    code, said = first.wait()
    assert code == 0, said
    streaming.open()
    code, said = second.wait()
    assert (code, "another run is writing" in said) == ((4, True) if refused else (0, False)), said
    assert listing(home) == below("out", new)


# Disks that are full, failing or read-only


def failing(name: str, after: int, code: int) -> Callable[..., Any]:
    """`os.NAME` that fails once `after` bytes (pwrite) or calls (others) have gone through."""
    real, done = getattr(os, name), 0

    def wrapped(fd: int, *args: Any) -> Any:
        nonlocal done
        amount = len(args[0]) if name == "pwrite" else 1
        if done + amount > after:
            raise OSError(code, os.strerror(code))
        done += amount
        return real(fd, *args)

    return wrapped


@pytest.mark.parametrize(
    ("name", "after", "code", "file"),
    [
        ("pwrite", 0, errno.ENOSPC, "metadata.gguf"),
        ("pwrite", 200, errno.ENOSPC, "model.safetensors"),
        ("pwrite", 700, errno.ENOSPC, "model.safetensors"),
        ("pwrite", 1500, errno.ENOSPC, "bundle.json"),
        ("ftruncate", 0, errno.EFBIG, "model.safetensors"),
        ("fsync", 0, errno.EIO, "metadata.gguf"),
        ("fsync", 1, errno.EIO, "model.safetensors"),
        ("fsync", 2, errno.EIO, "out"),
        ("fsync", 3, errno.EIO, "bundle.json"),
    ],
)
def test_a_failing_disk_is_exit_4_names_the_file_and_leaves_nothing(
    name: str, after: int, code: int, file: str, model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, name, failing(name, after, code))
    result = CliRunner().invoke(main.app, [str(model), str(home / "a" / "out")])
    assert result.exit_code == 4, result.output
    assert os.strerror(code) in result.stderr
    assert file in result.stderr.split(os.strerror(code))[0]
    assert listing(home) == {}


def test_a_disk_that_fills_up_halfway_is_exit_4_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the check of free space, as if another program had filled the disk after it.
    monkeypatch.setattr(convert_module, "check_space", lambda *_: None)
    big = Builder([weight("a.weight", (8192, 256)), weight("b.weight", (8192, 256))]).write(tmp_path / "big.gguf")
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        result = CliRunner().invoke(main.app, [str(big), str(disk / "a" / "out"), "--max-shard-size", "1B"])
        assert result.exit_code == 4, result.output
        assert "error: model-00001-of-00002.safetensors: No space left on device\n" in result.stderr
        assert "try: Check the disk" in result.stderr
        assert listing(disk) == {}
        monkeypatch.undo()
        small = run_cli(big, disk / "out")
        assert (small.returncode, "MB free" in small.stderr) == (4, True)


def test_a_read_only_target_is_exit_4_with_its_name(model: Path, home: Path) -> None:
    for more in ((), ("--dry-run",)):
        if os.geteuid():
            home.chmod(0o555)
            done = run_cli(model, home / "a" / "out", *more)
        else:
            with tmpfs(home, "ro,size=1m"):
                done = run_cli(model, home / "a" / "out", *more)
        assert done.returncode == 4
        assert f"error: the output {home / 'a' / 'out'} cannot be written: {home} is not writable\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(home) == {}
