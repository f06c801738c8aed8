"""A folder of sources, a cache of one test's own, and the compilations that really happen."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel_sources import COMMON, KERNEL
from q6k_kernels.jit import compiler, cubin_cache


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "common.cuh").write_text(COMMON)
    (folder / "k.cuh").write_text(KERNEL)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cubin_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The options of every compilation that really happens."""
    calls, compile_cubin = list[tuple[str, ...]](), compiler.compile_cubin

    def counted(source: str, name: str, arguments: tuple[str, ...]) -> compiler.Compiled:
        calls.append(arguments)
        return compile_cubin(source, name, arguments)

    monkeypatch.setattr(compiler, "compile_cubin", counted)
    return calls
