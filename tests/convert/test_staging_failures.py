"""Runs that fail at any step, in a small process: a fork of one that has torch takes twice as long."""

from __future__ import annotations

from inside import run_inside


def test_a_run_that_fails_leaves_nothing_half_made() -> None:
    run_inside("convert/failures_inside.py", may_skip=True)  # where a file system cannot be mounted
