"""The picture of whole models beside llama.cpp: drawn from reports alone, always the same, and small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import bench_model_plot as plot


def test_the_picture_beside_the_reports_is_the_one_they_give(tmp_path: Path) -> None:
    """After a new report: `python scripts/bench/bench_model_plot.py`."""
    plot.main(["--plot", str(tmp_path / "drawn.svg")])
    drawn = (tmp_path / "drawn.svg").read_bytes()
    assert drawn == (plot.RESULTS / "bench_model.svg").read_bytes()
    assert len(drawn) < 12_000
    report = json.loads((plot.RESULTS / "bench_model.json").read_text(encoding="utf-8"))
    (rate,) = (row["tokens_per_s"] for row in report["rows"] if row.get("label") == "decode @2043")
    words = [each.text for each in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert f"{rate:,.0f} ({rate / 201.3:.1f}×)" in words
    assert {"201", "85.5", "8,545", "llama.cpp was not measured", *(words for words, _ in plot.MODELS.values())} < {
        *words
    }


def test_what_was_not_measured_is_said_and_other_reports_are_refused(tmp_path: Path) -> None:
    plot.main(["--results", str(tmp_path), "--plot", str(tmp_path / "drawn.svg")])
    assert (tmp_path / "drawn.svg").read_text(encoding="utf-8").count("q6k_kernels was not measured") == 8
    shutil.copy(plot.RESULTS / "bench_model.json", tmp_path / "bench_model_gemma-27b_q6_k.json")
    with pytest.raises(SystemExit, match="expected a report of .*gemma-27b.*, found one of .*llama-8b"):
        plot.main(["--results", str(tmp_path), "--plot", str(tmp_path / "drawn.svg")])
