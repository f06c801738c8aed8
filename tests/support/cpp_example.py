"""Build and run the C++ example, and compute the same in Python."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cpp_library import PACKAGE, WARNINGS
from q6k_kernels.jit import cubin_cache

SOURCE = PACKAGE / "cpp" / "example"
NAME = "q6k_generate"
TORCH = Path(torch.__file__).parent
IN_PYTHON = """
import json, sys
from q6k_kernels.ops import library as ops_library
from q6k_kernels.export.program import Program
ops_library.load(sys.argv[1])
program = Program(sys.argv[2])
for ids, count in json.loads(sys.argv[3]):
    program.reset()
    print(*program.generate(count, program.prefill(ids)))
"""


def build_example() -> Path:
    """Return the program, built unless one of the same sources exists."""
    if missing := [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)} not on PATH")
    digest = hashlib.sha256(f"{TORCH} {torch.__version__} {shutil.which('c++')}".encode())
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    kept = cubin_cache.directory() / "tests"
    folder = kept / f"example-{digest.hexdigest()[:16]}"
    if not folder.exists():
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept, ignore_cleanup_errors=True) as made:
            called("cmake", "-S", SOURCE, "-B", made, f"-DPython_EXECUTABLE={sys.executable}", CXXFLAGS=WARNINGS)
            called("cmake", "--build", made, "--parallel", os.cpu_count())
            with contextlib.suppress(OSError):  # another process was faster
                Path(made).rename(folder)
    return folder / NAME


def called(*command: object, **environment: str) -> str:
    """Return what a command prints; it has to succeed."""
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def generated(program: Path, *arguments: object) -> Any:
    # With matrices this small more threads only wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=environment)
