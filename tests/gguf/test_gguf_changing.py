"""Files that change while they are read, and what is no file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from gguf_builder import small_model
from q6k_kernels.errors import GgufReadError
from q6k_kernels.gguf.file import GGUFFile


def test_reading_from_a_file_that_shrank_says_so(tmp_path: Path) -> None:
    path = small_model().write(tmp_path / "model.gguf")
    size = path.stat().st_size
    with GGUFFile(path) as file:
        last = file.tensors[-1]
        os.truncate(path, last.offset + 3)
        with pytest.raises(GgufReadError) as caught:
            file.read_into(memoryview(bytearray(last.nbytes)), last.offset)
    assert caught.value.cause == f"{path}: ends at byte {last.offset + 3}, but had {size} bytes when it was opened"
    assert "rewriting" in caught.value.remedy


def test_a_file_that_shrinks_while_it_is_opened_is_an_io_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_model().write(tmp_path / "model.gguf")
    fstat = os.fstat

    def shrinking(fd: int) -> os.stat_result:
        found = fstat(fd)
        os.truncate(path, 100)
        return found

    monkeypatch.setattr(os, "fstat", shrinking)
    with pytest.raises(GgufReadError, match="ends at byte 100, but had"):
        GGUFFile(path)


def test_a_file_written_to_after_opening_is_noticed(tmp_path: Path) -> None:
    path = small_model().write(tmp_path / "model.gguf")
    size = path.stat().st_size
    with GGUFFile(path) as file:
        file.check_unchanged()
        with path.open("ab") as stream:
            stream.write(b"more")
        with pytest.raises(GgufReadError) as caught:
            file.check_unchanged()
    assert caught.value.cause == (
        f"{path} was modified while it was being read ({size} bytes before, {size + 4} now)"
    )


def test_a_file_rewritten_at_the_same_length_is_noticed(tmp_path: Path) -> None:
    path = small_model().write(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        # Set outright: two writes within one tick of the clock would share a time.
        os.utime(path, ns=(file.stat.st_atime_ns, file.stat.st_mtime_ns + 1_000_000))
        with pytest.raises(GgufReadError, match="was modified while it was being read"):
            file.check_unchanged()


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(GgufReadError) as caught:
        GGUFFile(tmp_path)
    assert caught.value.cause == f"{tmp_path} is a directory"


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "fifo.gguf"
    os.mkfifo(path)
    with pytest.raises(GgufReadError) as caught:
        GGUFFile(path)
    assert caught.value.cause == f"{path} is not a regular file"


def test_a_missing_file_is_an_io_failure(tmp_path: Path) -> None:
    path = tmp_path / "absent.gguf"
    with pytest.raises(GgufReadError) as caught:
        GGUFFile(path)
    assert caught.value.cause == f"{path}: No such file or directory"


def test_a_dangling_symlink_is_an_io_failure(tmp_path: Path) -> None:
    path = tmp_path / "link.gguf"
    path.symlink_to("absent")
    with pytest.raises(GgufReadError, match=re.escape(f"{path}: No such file or directory")):
        GGUFFile(path)


def test_an_unreadable_file_is_an_io_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model().write(tmp_path / "model.gguf").chmod(0)
    # Found from here, so that only the file's own permissions stand in the way of another user.
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    path = Path("model.gguf")
    user = os.geteuid()
    try:
        if user == 0:  # root may read everything
            os.seteuid(65534)
        assert path.stat().st_size > 0
        with pytest.raises(GgufReadError) as caught:
            GGUFFile(path)
    finally:
        os.seteuid(user)
    assert caught.value.cause == "model.gguf: Permission denied"
