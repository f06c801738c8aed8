"""The modules that must load without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import q6k_kernels

HOME = Path(q6k_kernels.__file__).parent
MODULES = ["formats.ggml", "formats.blocks", "formats.planes"]
MODULES += [f"{room}.{path.stem}" for room in ("gguf", "bundle") for path in sorted((HOME / room).glob("[!_]*.py"))]


def test_every_module_is_looked_at() -> None:
    assert {"gguf.file", "gguf.model", "bundle.manifest", "bundle.metadata"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_it_loads_where_torch_cannot_be_imported(module: str) -> None:
    program = f"import sys; sys.modules['torch'] = None; import q6k_kernels.{module}"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
