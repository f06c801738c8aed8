"""The GPU's tests: not collected where there is none, kernels compiled beforehand.

    pytest tests/gpu -m gpu
    Q6K_OPS_LIBRARY=libq6k_ops.so pytest tests/gpu -m gpu      # the same with the C++ library in Python's place

They need no installation: PYTHONPATH=.:kernels will do. For compute-sanitizer, whose tools are slow, there is
test_gpu_sanitize.py, which says how to run it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MANY_TESTS, NEARLY_ALL = 40, 2000
"""From so many tests on, compiling common kernels, or every kernel, at once saves time, in as many processes as
there are processors: else several workers would compile the same one."""
COMPILE = """
import ast, contextlib, sys
from q6k_kernels.jit import loader
for file, defines in ast.literal_eval(sys.stdin.read()):
    with contextlib.suppress(Exception):
        loader.compiled(file, defines, sys.argv[1])
"""


def _without_gpu() -> str | None:
    try:
        import torch
    except ModuleNotFoundError:
        return "torch is not installed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no CUDA GPU"


REASON = _without_gpu()
collect_ignore_glob = ["*"] if REASON else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says why none of these tests is among those that ran."""
    if REASON:
        terminalreporter.write_line(f"tests/gpu is not collected: {REASON}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spreads the tests that compile whole programs: workers begin with equal parts, one of which had them all."""
    slow = [item for item in items if item.path.stem == "test_gpu_export"]
    if slow:
        others = [item for item in items if item not in slow]
        ends = [len(others) * at // len(slow) for at in range(len(slow) + 1)]
        parts = zip(slow, ends, ends[1:], strict=False)
        items[:] = [item for first, begin, end in parts for item in (first, *others[begin:end])]


@pytest.fixture(scope="session", autouse=True)
def _library() -> None:
    """The operations are those of the C++ library that the environment names."""
    if path := os.environ.get("Q6K_OPS_LIBRARY"):
        from q6k_kernels.ops import library

        library.load(path)


@pytest.fixture(scope="session", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    """Fills the disk cache with kernels, once for all workers; tests compile the others that they need."""
    tests = len([item for item in request.session.items if item.get_closest_marker("gpu")])
    if tests < MANY_TESTS:
        return
    import torch

    from q6k_kernels.cpp import units
    from q6k_kernels.jit import compiler

    capability = torch.cuda.get_device_capability()
    done = Path(tempfile.gettempdir(), f"q6k-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}")
    with done.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.tell():
            return  # another worker has compiled them
        every = units.plan([10 * capability[0] + capability[1]])
        wanted = [unit[1:] for unit in (every if tests >= NEARLY_ALL else units.cover(every))]
        arch, shares = compiler.architecture(capability), os.cpu_count() or 1
        processes = []
        for share in range(min(shares, len(wanted))):
            command = [sys.executable, "-c", COMPILE, arch]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert process.stdin is not None
            process.stdin.write(repr(wanted[share::shares]))
            process.stdin.close()
            processes.append(process)
        for process in processes:
            process.wait()
        file.write("done")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield
