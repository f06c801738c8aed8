"""Read bundles without the product's reader, and run conversions in processes that are stopped midway."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
import rich.console
import typer
import xxhash
from typer.testing import CliRunner, Result

from gguf_builder import F32, Builder, Tensor, key_value, weight
from q6k_convert.cli import contents, main, terminal
from q6k_convert.convert import locking, placing, staging

# Imports that the command does late, and when it prints an error; done here once for all forked processes.
LATE = (contents, terminal, rich.console)
# The module: the package has a function of the same name.
convert_module = import_module("q6k_convert.convert.pipeline")

Listing = dict[str, bytes | str | None]


def listing(directory: Path) -> Listing:
    """Return everything below a directory: content of files, target of symlinks, None for directories."""
    found: Listing = {}
    for base, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(base, name)
            key = str(path.relative_to(directory))
            found[key] = str(path.readlink()) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    return found


def below(name: str, content: Listing) -> Listing:
    """Return the listing of a directory as part of the listing of its parent."""
    return {name: None} | {f"{name}/{key}": value for key, value in content.items()}


def xxh3(data: bytes | memoryview) -> str:
    """Return the XXH3-128 of data as bundles write it."""
    return xxhash.xxh3_128_hexdigest(data)


def shard_arrays(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes by key of a safetensors file, written from the format's text."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = memoryview(raw)[8 + length :]
    return {key: (h["dtype"], h["shape"], bytes(data[slice(*h["data_offsets"])])) for key, h in header.items()}


def checked_manifest(directory: Path) -> dict[str, Any]:
    """Return `bundle.json` after checking every checksum and every file of the directory."""
    raw = (directory / "bundle.json").read_bytes()
    manifest: dict[str, Any] = json.loads(raw)
    bare = {key: value for key, value in manifest.items() if key != "manifest_checksum"}
    assert xxh3(json.dumps(bare, indent=1, ensure_ascii=False).encode()) == manifest["manifest_checksum"]
    assert {p.name for p in directory.iterdir()} == {"bundle.json", *manifest["files"]}
    for name, file in manifest["files"].items():
        content = (directory / name).read_bytes()
        assert len(content) == file["size"], name
        assert xxh3(content[: file["checked_bytes"]]) == file["checksum"], name
    shards = {name: shard_arrays(directory / name) for name in manifest["files"] if name.endswith(".safetensors")}
    stored = [array for tensor in manifest["tensors"] for array in tensor["arrays"].values()]
    assert sorted(a["key"] for a in stored) == sorted(key for arrays in shards.values() for key in arrays)
    for array in stored:
        dtype, shape, data = shards[array["file"]][array["key"]]
        assert (dtype, shape, xxh3(data)) == (array["dtype"], array["shape"], array["checksum"]), array["key"]
    return manifest


def two_tensors(rows: int = 2, seed: int = 0) -> Builder:
    """Return a model that converts in a few system calls."""
    return Builder(
        [weight("a.weight", (rows, 512), seed=seed), weight("norm.weight", (8,), F32, seed=seed)],
        [key_value("general.architecture", "llama"), key_value("general.name", f"seed {seed}")],
    )


def broken_late() -> Builder:
    """Return a model whose last block cannot be converted, when everything else has been written."""
    builder = two_tensors(seed=5)
    blocks = bytearray(weight("z.weight", (1, 512)).data)
    blocks[-2:] = b"\x00\x7e"
    builder.tensors.append(Tensor("z.weight", (1, 512), 14, bytes(blocks)))
    return builder


STRUCK = "struck here"
"""Text that a process prints at the step where `strike` sends the signal."""
BROKEN_LATE = "scale d that is NaN or infinite"


def run_cli(*args: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run `q6k-convert ARGS` as its own process."""
    command = [sys.executable, "-m", "q6k_convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


@dataclass(frozen=True)
class Child:
    """A forked process, and the file that has its stdout and stderr."""

    pid: int
    log: Path

    def wait(self) -> tuple[int, str]:
        """Wait for the end, and return the exit code (negative: the signal that killed it) and the output."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code, self.log.read_text()


def fork(action: Callable[[], object], log: Path, *, covered: bool = False) -> Child:
    """Run `action` in a fork of this process, which starts at once and may be patched freely.

    What it covers is only written down if asked for, as that takes longer than most actions.
    """
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 99
    if not covered:
        sys.settrace(None)
    try:
        # As in the foreground of a shell, however these tests were started.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        action()
        code = 0
    except typer.Exit as stopped:
        code = stopped.exit_code
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        if covered and "coverage" in sys.modules and (measuring := sys.modules["coverage"].Coverage.current()):
            measuring.stop()
            measuring.save()
        sys.stdout.flush()
        os._exit(code)


def fork_cli(*args: str | Path, log: Path, patch: Callable[[], object] = lambda: None) -> Child:
    """Run `q6k-convert ARGS` in a forked process, after patching it."""

    def action() -> NoReturn:
        patch()
        main.app([str(arg) for arg in args], prog_name="q6k-convert")
        raise AssertionError("the command returned instead of exiting")

    return fork(action, log)


class Gate:
    """A gate that stops a forked process at a place until the test opens it."""

    def __init__(self) -> None:
        self._reached, self._go = os.pipe(), os.pipe()
        self._stopped = False

    def stop_here(self) -> None:
        """Report the arrival and wait, only the first time; called in the child."""
        if not self._stopped:
            self._stopped = True
            os.write(self._reached[1], b"!")
            # With this copy closed, the pipe ends when the test fails, so the child never waits forever.
            os.close(self._go[1])
            if not os.read(self._go[0], 1):
                os._exit(97)

    def is_reached(self) -> bool:
        """Wait until the child has arrived or ended, and return whether it has arrived; called in the test."""
        # With the test's own copy closed, the pipe ends when the child does.
        os.close(self._reached[1])
        return os.read(self._reached[0], 1) == b"!"

    def wait_until_reached(self) -> None:
        """Wait until the child has arrived; called in the test."""
        assert self.is_reached(), "the process ended before the place it was to stop at"

    def open(self) -> None:
        """Let the child continue; called in the test."""
        os.write(self._go[1], b"!")


def before(module: object, name: str, action: Callable[[], object]) -> Callable[[], None]:
    """Return a patch that runs `action` before every call of `module.name`."""

    def patch() -> None:
        real = getattr(module, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            action()
            return real(*args, **more)

        setattr(module, name, wrapped)

    return patch


def strike(at: int, number: signal.Signals, *, lines: bool) -> Callable[[], None]:
    """Return a patch that sends the process a signal at its `at`-th step.

    A step is the time just before or after a call that changes the disk, so every state of the disk is seen. With
    `lines` each line of the staging and of the conversion is a step, too, because variables change between
    lines; but no line that was reached in the same way since the disk last changed, as in the rounds of a loop.
    A process that is killed leaves only what is on the disk.
    """
    files = {locking.__file__, placing.__file__, staging.__file__, convert_module.run.__code__.co_filename}
    steps, seen = count(), set[tuple[tuple[str, int], ...]]()

    def step() -> None:
        if next(steps) == at:
            print(STRUCK)
            os.kill(os.getpid(), number)

    def way(frame: FrameType | None) -> Iterator[tuple[str, int]]:
        while frame is not None and frame.f_code.co_filename in files:
            yield frame.f_code.co_filename, frame.f_lineno
            frame = frame.f_back

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and (here := tuple(way(frame))) not in seen:
            seen.add(here)
            step()
        return trace

    def around(name: str) -> None:
        real = getattr(os, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            step()
            result = real(*args, **more)
            seen.clear()
            step()
            return result

        setattr(os, name, wrapped)

    def patch() -> None:
        for name in ("open", "pwrite", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"):
            around(name)
        if lines:
            # Not before: tracing the set-up of the command line is slow and changes no file.
            before(convert_module, "run", lambda: sys.settrace(trace))()

    return patch


@contextmanager
def tmpfs(directory: Path, options: str) -> Iterator[Path]:
    """Mount a small file system at `directory`; skip the test where mounting is not allowed."""
    directory.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def invoke(*args: str | Path) -> Result:
    """Run the command inside this process, where it can be patched."""
    return CliRunner().invoke(main.app, [str(arg) for arg in args])


def run_here(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `q6k-convert ARGS` inside this process, which takes a tenth of the time; return what `run_cli` does."""
    result = invoke(*args)
    return subprocess.CompletedProcess(args, result.exit_code, result.stdout, result.stderr)


def failed(result: Result, code: int, cause: str, remedy: str) -> None:
    """Assert that the result has this exit code and these words, each on its line, and no traceback."""
    lines = result.stderr.splitlines()
    assert result.exit_code == code, result.output
    assert any(line.startswith("error: ") and cause in line for line in lines), result.stderr
    assert any(line.startswith("try: ") and remedy in line for line in lines), result.stderr
    assert "Traceback" not in result.output
