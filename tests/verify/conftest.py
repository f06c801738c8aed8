"""Bundles to verify, of a model with a tensor of most sorts; a machine with a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguf_builder import small_model
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_kernels.jit import compiler, driver


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    small_model().write(tmp_path / "model.gguf")
    return convert(tmp_path / "model.gguf", tmp_path / "out").output


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    small_model().write(tmp_path / "model.gguf")
    return convert(tmp_path / "model.gguf", tmp_path / "out", Options(max_shard_size=3000)).output


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with all that kernels need, as far as one can ask."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(driver, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    return monkeypatch
