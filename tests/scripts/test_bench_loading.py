"""What bench_loading.py measures, on a tiny model; what cannot be loaded is a row that says why."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import bench_loading
from tiny_models import Tiny


def test_a_bundle_is_measured_and_a_failure_is_a_row(tmp_path: Path) -> None:
    bundle, _ = Tiny("llama", "llama").bundle(tmp_path)
    row = bench_loading.measure("bundle", bundle, [1, 2, 3], 4, 1)
    assert len(row["answer"]) == 4
    assert min(row[key] for key in ("load_seconds", "tokens_per_cpu_second", "peak_bytes")) > 0
    named = {"model": "tiny", "loader": "bundle"}
    assert bench_loading.line(named | row).startswith("tiny ")
    failed = bench_loading.in_a_process("bundle", tmp_path / "none", [1], argparse.Namespace(tokens=4, threads=1))
    assert "none" in failed["problem"]
    assert failed["problem"] in bench_loading.line(named | failed)
