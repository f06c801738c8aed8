"""Run a file of tests in a process of its own: one that is small, or that has something else loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def without_coverage() -> dict[str, str]:
    """Return this process's environment, such that coverage leaves out a process that gets it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}


def run_inside(file: str, *options: str, may_skip: bool = False, covered: bool = True, **environment: str) -> None:
    """Run the tests of a file below `tests/` and assert that they pass.

    Args:
        file: path of the file, which has no name that pytest would collect by itself.
        options: more arguments of pytest.
        may_skip: whether tests may be skipped.
        covered: whether coverage counts what they run.
        environment: variables that the process gets besides this one's.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(TESTS / file), *options]
    given = dict(os.environ) if covered else without_coverage()
    done = subprocess.run(command, env=given | environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert may_skip or " skipped" not in done.stdout
