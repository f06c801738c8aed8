"""A folder in memory, for tests that run hundreds of conversions; the folder of outputs, and what a bundle is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bundle_helpers import Listing, listing
from q6k_convert.convert.pipeline import convert


@pytest.fixture
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a folder in memory where it can be: hundreds of runs, each waiting for a disk to sync, take minutes."""
    place = Path("/dev/shm")
    if not os.access(place, os.W_OK):
        yield tmp_path_factory.mktemp("memory")
        return
    with TemporaryDirectory(dir=place) as directory:
        yield Path(directory)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The directory that outputs lie in; tests compare all of it before and after."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def new(model: Path, tmp_path: Path) -> Listing:
    """What a conversion of `model` looks like."""
    convert(model, tmp_path / "new")
    return listing(tmp_path / "new")
