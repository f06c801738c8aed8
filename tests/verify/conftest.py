"""Bundles to verify, of a model with a tensor of most sorts."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguf_builder import small_model
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    small_model().write(tmp_path / "model.gguf")
    return convert(tmp_path / "model.gguf", tmp_path / "out").output


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    small_model().write(tmp_path / "model.gguf")
    return convert(tmp_path / "model.gguf", tmp_path / "out", Options(max_shard_size=3000)).output
