"""Where tests run: all of a file in one process, as what they share would otherwise be built several times."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a line for each process that has come here."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    file = folder / "processes.txt"
    with file.open("a") as text:
        text.write(f"{os.getpid()}\n")
    return file


@pytest.mark.parametrize("test", range(8))
def test_a_file_is_run_by_one_process(processes: Path, test: int) -> None:
    assert processes.read_text().split() == [str(os.getpid())]
