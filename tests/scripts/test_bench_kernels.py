"""What bench_kernels.py makes of its figures: targets, lines, the picture. The figures themselves need a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

import bench_kernels_rows as rows_of
from bench_kernels_plot import figure

PEERS = json.loads((SCRIPTS / "bench" / "peer_figures.json").read_text())


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


@pytest.mark.parametrize("phase", rows_of.PHASES)
def test_a_phase_has_every_shape_of_its_own_in_both_formats(phase: str) -> None:
    found = dict(rows_of.plan(phase, quick=False, only=re.compile(""), scales=["bf16", "exact"]))
    assert list(found) == list(rows_of.SHAPES if phase == "decode" else rows_of.BATCHED)
    for (n, k), tables in found.items():
        assert list(tables) == ["bf16", "exact"]
        for scales, rows in tables.items():
            assert rows == [{"n": n, "k": k, "m": m, "scales": scales} for m in rows_of.PHASES[phase]]


@pytest.mark.parametrize(
    ("only", "phases"),
    [
        ("", {"decode": 24, "middle": 12, "prefill": 12}),
        ("21504x5376 M=(1|64) e", {"decode": 1, "middle": 1}),
        ("gather", {}),
    ],
)
def test_a_quick_run_has_some_rows_and_only_those_asked_for(only: str, phases: dict[str, int]) -> None:
    count = {}
    for phase in rows_of.PHASES:
        for _, tables in rows_of.plan(phase, quick=True, only=re.compile(only), scales=["bf16", "exact"]):
            assert all(tables.values())
            count[phase] = count.get(phase, 0) + sum(map(len, tables.values()))
    assert count == phases


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


def test_an_interrupted_run_has_a_picture() -> None:
    run = report()
    roofs = figure(run, PEERS).count('class="roof')
    del run["ceilings"]["matmul_8192_tflops"], run["operations"], run["seconds"]
    assert figure(run, PEERS).count('class="roof') == roofs - 2 * len(rows_of.BATCHED)


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
    command = [sys.executable, SCRIPTS / "bench" / "bench_kernels.py"]
    subprocess.run([*command, "--plot-only", tmp_path / "run.json"], check=True)
    assert (tmp_path / "run.svg").read_text() == figure(report(), PEERS)
    if not torch.cuda.is_available():
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert "torch sees no CUDA GPU" in done.stderr


SMALL = ((32, 256), (16, 512))
ALL = {"quick": False, "only": re.compile(""), "modes": ["auto", "int8", "bf16"], "scales": ["bf16", "exact"]}


def tiles_of(n: int, k: int, scales: str) -> Any:
    """On the CPU, all weights alike, but not all codes."""
    torch = pytest.importorskip("torch")
    from q6k_kernels.formats import tiles as prepack

    ql, qh = (torch.full((n, k // by), byte, dtype=torch.uint8) for by, byte in ((2, 0x53), (4, 0x1B)))
    if scales == "exact":
        return prepack.pack(
            ql, qh, torch.full((n, k // 16), 3, dtype=torch.int8), torch.full((n, k // 256), 0.01).half()
        )
    return prepack.pack(ql, qh, torch.full((n, k // 16), 0.03).bfloat16())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A whole run on two small shapes, without a GPU: what it times is in `log`; cuBLAS takes 4 us, the rest 2."""
    torch = pytest.importorskip("torch")
    import bench_kernels
    import kernel_timing

    log: list[str] = []

    def timed(calls: list[partial[Any]], guess_us: float, *, settle: bool) -> float:
        assert guess_us > 0
        one = calls[0]
        what = "cublas" if one.func is bench_kernels.dense_linear else one.func.__name__
        mode = f" {one.args[-1]}" if what == "linear" else ""
        log.append(f"{what}{mode} {len(one.args[0])}{' settled' if settle else ''}")
        return 4.0 if what == "cublas" else 2.0

    def ceiling(name: str, figure: float) -> Callable[[int], float]:
        return lambda _: log.append(name) or figure

    def scratch(call: Callable[[], Any]) -> tuple[int, int]:
        return call().nbytes, 1_000_000

    for name, instead in {
        "random_tiles": tiles_of,
        "dense": lambda tiles, n: torch.ops.q6k.dequantize(tiles, n, torch.bfloat16),
        "rotated": lambda tensor: [tensor, tensor.clone()],
        "scratch_bytes": scratch,
        "time_calls": timed,
        "read_gb_per_s": ceiling("read", 4000.0),
        "copy_gb_per_s": ceiling("copy", 3900.0),
        "matmul_tflops": ceiling("matmul", 700.0),
    }.items():
        monkeypatch.setattr(kernel_timing, name, instead)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench_kernels, "machine", lambda: {"gpu": "none"})
    monkeypatch.setattr(bench_kernels, "_input", lambda m, k: torch.ones(m, k).bfloat16())
    monkeypatch.setattr(bench_kernels.Bench, "_operations", lambda self: log.append("operations"))
    monkeypatch.setattr(rows_of, "SHAPES", SMALL)
    monkeypatch.setattr(rows_of, "BATCHED", SMALL[1:])
    for module in (rows_of, bench_kernels):
        monkeypatch.setattr(module, "PHASES", {"decode": (1, 2), "middle": (16,), "prefill": (128, 130)})
    run = bench_kernels.Bench(**ALL, to=tmp_path / "run.json")
    run.log = log
    with torch.no_grad():
        yield run


def test_nothing_hot_runs_before_what_memory_bounds(bench: Any) -> None:
    """The order of timing: phases outermost, cuBLAS after the operation, a settled clock before each series."""

    def series(ms: tuple[int, ...], *what: str) -> list[str]:
        return [f"{each} {m}{' settled' if m == ms[0] else ''}" for each in what for m in ms]

    auto, int8, forced, expand = "linear auto", "linear int8", "linear bf16", "_dequantize_and_multiply"
    decode = series((1, 2), *(auto, int8, forced) * 2, "cublas")
    middle = series((16,), auto, int8, forced, expand, auto, int8, forced, "cublas")
    prefill = series((128, 130), auto, forced, expand, auto, forced, "cublas")
    bench.run()
    assert bench.log == ["read", "copy", *decode, *decode, "operations", *middle, *prefill, "matmul"]


def test_a_run_reports_every_row_and_prints_a_table_for_each_series(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run()
    linear = bench.report["linear"]
    phases = [("decode", (32, 16), (1, 2)), ("middle", (16,), (16,)), ("prefill", (16,), (128, 130))]
    order = [(phase, n, scales, ms) for phase, ns, ms in phases for n in ns for scales in ("bf16", "exact")]
    assert [(r["n"], r["scales"], r["m"]) for r in linear] == [(n, s, m) for _, n, s, ms in order for m in ms]
    for r in linear:
        assert (r["us"], r["auto_us"], r["bf16_us"], r["cublas_us"], r["times_cublas"]) == (2, 2, 2, 4, 2)
        assert ("times_m1" in r, "int8_us" in r) == (r["m"] > 1, r["m"] <= 64)
        assert ("dequantize_cublas_us" in r) == (r["m"] > 8 and r["scales"] == "bf16")
        assert "failed" not in r
        assert 0 <= r["error"] < 0.02
    ceilings = {"read_gb_per_s": 4000, "copy_gb_per_s": 3900, "matmul_8192_tflops": 700}
    assert bench.report["ceilings"] == ceilings
    titles = [line for line in capsys.readouterr().out.splitlines() if " scales, " in line]
    assert [title.rpartition(",")[0] for title in titles] == [
        f"{phase}: {n}x{dict(SMALL)[n]}, {scales} scales" for phase, n, scales, _ in order
    ]


def test_what_an_interrupted_run_has_measured_is_kept(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kernel_timing

    timed = kernel_timing.time_calls

    def interrupted(*arguments: Any, **more: Any) -> float:
        if "cublas 16 settled" in bench.log:
            raise KeyboardInterrupt
        return timed(*arguments, **more)

    monkeypatch.setattr(kernel_timing, "time_calls", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    kept = [(r["n"], r["m"]) for r in json.loads((tmp_path / "run.json").read_text())["linear"]]
    assert kept == [(32, 1), (32, 2)] * 2 + [(16, 1), (16, 2)] * 2 + [(16, 16)] * 2


def test_a_wrong_output_fails_its_rows_and_no_others(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import kernel_timing

    right = kernel_timing.dense
    monkeypatch.setattr(kernel_timing, "dense", lambda tiles, n: right(tiles, n) * (1.1 if n == 32 else 1))
    bench.run()
    for r in bench.report["linear"]:
        assert ("failed" in r) == ("us" not in r) == (r["n"] == 32)
        assert "relative L2 error" in r.get("failed", "relative L2 error")
