"""What bench_kernels.py makes of its figures: targets, lines, the picture. The figures themselves need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_kernels_rows as rows_of  # noqa: E402
from bench_kernels_plot import figure  # noqa: E402

PEERS = json.loads((SCRIPTS / "peer_figures.json").read_text())


def row(n: int, k: int, m: int, us: float, **more: Any) -> dict[str, Any]:
    """A linear's, as the bench writes it."""
    packed = n * k * 7 / 8
    return {
        "n": n,
        "k": k,
        "m": m,
        "scales": "bf16",
        "us": us,
        "gb_per_s": round(packed / us / 1e3),
        "read_share": packed / us / 1e3 / 4000,
        "tflops": 2 * m * n * k / us / 1e6,
        "cublas_us": 20.0,
        "times_cublas": 20.0 / us,
        "scratch_mb": 1.0,
        "peers": {},
    } | more


def report() -> dict[str, Any]:
    """A whole run's, all targets met."""
    linear = [
        row(n, k, m, n * k * 7 / 8 / 3.9e6, times_m1=1.1, times_cublas=9.0)
        for n, k in rows_of.SHAPES
        for m in (*rows_of.DECODE, *rows_of.MIDDLE, *rows_of.PREFILL)
        if m <= 8 or (n, k) in rows_of.BATCHED
    ]
    operations = [
        {"operation": "pack", "n": 1, "k": 256, "scales": "exact", "us": 1.0, "gb_per_s": 5, "copy_share": 0.8}
    ]
    for each in (*linear, *operations):
        rows_of.judge(each)
    return {
        "machine": {"gpu": PEERS["machine"]["gpu"]},
        "ceilings": {"read_gb_per_s": 4000, "copy_gb_per_s": 3900, "matmul_8192_tflops": 700},
        "linear": linear,
        "operations": operations,
        "seconds": 3.0,
    }


@pytest.mark.parametrize(
    ("measured", "verdicts"),
    [
        (row(21504, 5376, 1, 29.0), {"85% of read": True}),
        (row(5376, 21504, 1, 31.0), {"85% of read": False}),
        (row(262144, 5376, 1, 345.0), {"90% of read": False}),
        (row(4096, 4096, 1, 5.0), {"5.0 us": True}),
        (row(1024, 4096, 1, 3.6), {"3.5 us": False}),
        (row(1024, 4096, 5, 3.6, times_m1=1.2), {"1.20x M=1": True}),
        (row(1024, 4096, 5, 3.6), {}),  # its M = 1 was not run
        (row(4096, 14336, 1, 99.0), {}),
        (row(4096, 4096, 16, 10.0), {"2.0x cuBLAS": True}),
        (row(4096, 4096, 32, 12.0), {"1.7x cuBLAS": False}),
        (row(4096, 4096, 64, 12.0), {"1.3x cuBLAS": True}),
        (row(4096, 4096, 512, 21.0, scratch_mb=64.1), {"0.95x cuBLAS": True, "64 MB scratch": False}),
        (row(4096, 4096, 64, 1.0, failed="it"), {"1.3x cuBLAS": False}),
        ({"operation": "gather", "n": 1, "k": 256, "scales": "bf16", "copy_share": 0.69}, {"70% of copy": False}),
    ],
)
def test_targets(measured: dict[str, Any], verdicts: dict[str, bool]) -> None:
    rows_of.judge(measured)
    assert {t["target"]: t["met"] for t in measured["targets"]} == verdicts


def test_the_summary_names_what_misses() -> None:
    run = report()
    assert rows_of.summary(run).strip() == f"{sum(len(r['targets']) for r in run['linear']) + 1} of " + (
        f"{sum(len(r['targets']) for r in run['linear']) + 1} targets met; 3 s"
    )
    run["linear"] += [row(21504, 5376, 1, 99.0), row(4096, 14336, 3, 9.0, failed="ValueError: no")]
    for each in run["linear"][-2:]:
        rows_of.judge(each)
    lines = rows_of.summary(run).splitlines()
    assert lines[-2].startswith("  21504x5376 M=1 bf16: 99.0 us, ")
    assert lines[-2].endswith("(target 85% of read)")
    assert lines[-1] == "  4096x14336 M=3 bf16: ValueError: no (target 1.20x M=1)"


def test_a_line_has_its_figures_below_the_heading() -> None:
    measured = row(4096, 4096, 16, 10.0, peers={"ET PR": 8.8, "ET main": 7.3}, int8_us=11.25)
    rows_of.judge(measured)
    line = rows_of.line(measured)
    for title, figure_ in (("us", "10.00"), ("int8", "11.25"), ("cuBLAS", "20.0"), ("ET main", "7.3")):
        end = rows_of.HEADING.index(f" {title}") + 1 + len(title)
        assert line[:end].endswith(f" {figure_}"), title
    assert line.endswith("2.0x cuBLAS met")


@pytest.mark.parametrize("gpu", [PEERS["machine"]["gpu"], "Another GPU"])
def test_the_picture_has_every_shape_and_peers_of_the_same_gpu(gpu: str) -> None:
    svg = figure(report() | {"machine": {"gpu": gpu}}, PEERS)
    root = ElementTree.fromstring(svg)
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    for n, k in rows_of.SHAPES:
        assert words.count(f"{n} × {k}") == (2 if (n, k) in rows_of.BATCHED else 1)
    assert ("ExecuTorch main" in words) == (gpu != "Another GPU")
    assert "prefers-color-scheme: dark" in svg
    assert "nan" not in svg


def test_peers_name_their_sources() -> None:
    sources = PEERS["sources"]
    assert {figure_["peer"] for figure_ in (*PEERS["linear"], *PEERS["whole_model"])} <= set(sources)
    assert all(figure_["by"] for figure_ in PEERS["published"])
    assert len({(f["peer"], f["n"], f["k"], f["m"]) for f in PEERS["linear"]}) == len(PEERS["linear"])
    for f in PEERS["linear"]:
        if rate := f.get("gb_per_s"):
            bits = {"ET PR": 7.0, "ET main": 6.5625}[f["peer"]]
            assert rate == pytest.approx(f["n"] * f["k"] * bits / 8 / f["us"] / 1e3, rel=0.01)


def test_the_command_draws_and_refuses(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "run.json").write_text(json.dumps(report()))
    command = [sys.executable, SCRIPTS / "bench_kernels.py"]
    subprocess.run([*command, "--plot-only", tmp_path / "run.json"], check=True)
    assert (tmp_path / "run.svg").read_text() == figure(report(), PEERS)
    if not torch.cuda.is_available():
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert "torch sees no CUDA GPU" in done.stderr
