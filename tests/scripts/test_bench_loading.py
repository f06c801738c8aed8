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
    Tiny("llama", "llama").bundle(tmp_path)
    bench_loading.converted(tmp_path / "model.gguf", tmp_path / "again")
    answers = list[list[int]]()
    for loader in (bench_loading.OURS, bench_loading.PRETRAINED):
        row = bench_loading.measure(loader, tmp_path / "again", [1, 2, 3], 4, 1)
        answers.append(row["answer"])
        assert min(row[key] for key in ("load_seconds", "tokens_per_cpu_second", "peak_bytes")) > 0
        assert bench_loading.line({"model": "tiny", "loader": loader} | row, "cpu").startswith("tiny ")
    assert answers[0] == answers[1]
    assert len(answers[0]) == 4
    args = argparse.Namespace(device="cpu", tokens=4, threads=1)
    failed = bench_loading.in_a_process("bundle", tmp_path / "none", [1], args)
    assert "none" in failed["problem"]
    assert failed["problem"] in bench_loading.line({"model": "tiny", "loader": "bundle"} | failed, "cpu")


def test_on_a_gpu_from_pretrained_is_judged_by_what_load_model_takes() -> None:
    ours = {"model": "m", "loader": "bundle", "seconds": 2.0, "peak_bytes": 100, "host_peak_bytes": 50}
    more = {"loader": "from_pretrained", "seconds": 2.2, "peak_bytes": 102, "first_seconds": 3.0, "held_bytes": 9}
    row = ours | more
    bench_loading.judge(ours, ours)
    bench_loading.judge(row, ours)
    assert "targets" not in ours
    assert [each["met"] for each in row["targets"]] == [True, False, True]
    assert "1.02 of peak_bytes 1.01 x load_model's MISSED" in bench_loading.line(row, "cuda")
