"""bench_kernels.py: which targets its rows meet, its picture, and a whole run on tiny shapes that needs no GPU."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import bench_kernels
import bench_kernels_experts as experts
import bench_kernels_rows as rows_of
import kernel_timing
from q6k_kernels.formats.types import WEIGHT_TYPES
from q6k_kernels.weights.weight import PackedWeight

RESULTS = Path(__file__).parents[2] / "kernels" / "results"


@pytest.mark.parametrize(
    ("figures", "verdicts"),
    [
        ({"n": 21504, "k": 5376, "m": 1, "read_share": 0.85}, {"85% of read": True}),
        ({"n": 5376, "k": 21504, "m": 1, "read_share": 0.84}, {"85% of read": False}),
        ({"n": 1024, "k": 4096, "m": 5, "us": 3.6}, {}),  # its M = 1 was not run
        ({"n": 4096, "k": 4096, "m": 512, "times_cublas": 0.95, "scratch_mb": 64.1},
         {"0.95x cuBLAS": True, "64 MB scratch": False}),
        ({"n": 4096, "k": 4096, "m": 64, "times_cublas": 9.0, "failed": "it"}, {"1.3x cuBLAS": False}),
        ({"operation": "gather", "n": 1, "k": 256, "copy_share": 0.69}, {"70% of copy": False}),
    ],
)  # fmt: skip
def test_targets(figures: dict[str, Any], verdicts: dict[str, bool]) -> None:
    figures["format"] = "q6_k"
    rows_of.judge(figures)
    assert {t["target"]: t["met"] for t in figures["targets"]} == verdicts


@pytest.mark.parametrize(
    ("m", "figures", "verdicts"),
    [(1, {"read_share": 0.7}, [True]), (1, {"failed": "it"}, [False]), (8, {"read_share": 0.1}, []),
     (512, {"dense_us": 79.0, "times_dense": 0.79}, [False])],
)  # fmt: skip
def test_targets_of_experts(m: int, figures: dict[str, Any], verdicts: list[bool]) -> None:
    (row,) = experts.rows(re.compile(f"^experts 128x704x2816 M={m} "))
    row |= figures
    experts.judge(row)
    assert [target["met"] for target in row["targets"]] == verdicts
    assert "128x704x2816" in experts.line(row)


def test_the_picture_beside_the_report_is_the_one_it_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, report = tmp_path / "drawn.svg", RESULTS / "bench_kernels.json"
    monkeypatch.setattr(sys, "argv", ["", "--plot-only", str(report), "--plot", str(drawn)])
    bench_kernels.main()
    assert _words(drawn) == _words(RESULTS / "bench_kernels.svg")
    assert {f"{n} × {k}" for n, k in rows_of.SHAPES} < set(_words(drawn))


def _words(svg: Path) -> list[str]:
    """Return the text of a picture: where it stands differs a little between versions of matplotlib."""
    return sorted(each.text or "" for each in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    with pytest.raises(SystemExit, match="torch sees no CUDA GPU"):
        bench_kernels.main()


def cpu_weight(n: int, k: int, format: str) -> PackedWeight:
    planes = kernel_timing.random_planes(n, k, WEIGHT_TYPES[format], torch.Generator().manual_seed(0))
    return PackedWeight.from_planes(planes, format)


@pytest.mark.parametrize("format", WEIGHT_TYPES)
def test_random_weights_have_a_models_size_and_their_dense_weights(format: str) -> None:
    weight = cpu_weight(32, 512, format)
    dense = kernel_timing.dense(weight).float()
    assert torch.equal(dense, weight.dequantize(torch.bfloat16).float())
    assert 1e-3 < float(dense.std()) < 0.2
    assert abs(float(dense.mean())) < float(dense.std()) / 8


def test_other_types_need_a_part_of_the_share_of_the_nearest() -> None:
    assert rows_of.targets("q4_0")[0].bound == pytest.approx(0.9 * 0.82)
    assert rows_of.targets("q5_0")[0].bound == pytest.approx(0.9 * 0.84)
    assert rows_of.targets("q8_0")[1].words == "94% of read"


SMALL = ((32, 256), (16, 512))
ALL = {"quick": False, "only": re.compile(""), "modes": ["auto", "int8", "bf16"], "formats": ["q6_k", "q4_k"]}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A whole run on two small shapes, without a GPU: what it times is in `log`; cuBLAS takes 4 us, the rest 2."""
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
        "random_weight": cpu_weight,
        "dense": lambda weight: weight.dequantize(torch.bfloat16),
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
    monkeypatch.setattr(bench_kernels.Bench, "_experts", lambda self: log.append("experts"))
    monkeypatch.setattr(rows_of, "SHAPES", SMALL)
    monkeypatch.setattr(rows_of, "BATCHED", SMALL[1:])
    for module in (rows_of, bench_kernels):
        monkeypatch.setattr(module, "PHASES", {"decode": (1, 2), "middle": (16,), "prefill": (128, 130)})
    run = bench_kernels.Bench(**ALL, to=tmp_path / "run.json")
    run.log = log
    with torch.no_grad():
        yield run


def test_a_run_reports_every_row(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run()
    bench.save()
    report = json.loads((tmp_path / "run.json").read_text())
    phases = [((32, 16), (1, 2)), ((16,), (16,)), ((16,), (128, 130))]
    order = [(n, format, m) for ns, ms in phases for n in ns for format in ("q6_k", "q4_k") for m in ms]
    assert [(r["n"], r["format"], r["m"]) for r in report["linear"]] == order
    for r in report["linear"]:
        assert (r["us"], r["auto_us"], r["bf16_us"], r["cublas_us"], r["times_cublas"]) == (2, 2, 2, 4, 2)
        assert ("times_m1" in r, "int8_us" in r) == (r["m"] > 1, r["m"] <= 64)
        assert ("dequantize_cublas_us" in r) == (r["m"] > 8 and r["format"] == "q6_k")
        assert 0 <= r["error"] < 0.02
    assert report["ceilings"] == {"read_gb_per_s": 4000, "copy_gb_per_s": 3900, "matmul_8192_tflops": 700}
    assert sum(line.endswith(" MB") and "x" in line for line in capsys.readouterr().out.splitlines()) == 8
    # A hot GPU keeps its clock low: what computes most is timed last.
    first = [bench.log.index(each) for each in ("read", "linear auto 1 settled", "operations", "experts", "matmul")]
    assert first == sorted(first)
    assert bench.log.index("operations") < bench.log.index("linear auto 16 settled")


def test_a_wrong_output_fails_its_rows_and_no_others(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_timing.dense
    monkeypatch.setattr(
        kernel_timing, "dense", lambda weight: right(weight) * (1.1 if weight.shape[0] == 32 else 1)
    )
    bench.run()
    for r in bench.report["linear"]:
        assert ("failed" in r) == ("us" not in r) == (r["n"] == 32)
        assert "relative L2 error" in r.get("failed", "relative L2 error")
    missed = rows_of.summary(bench.report).splitlines()
    assert sum("relative L2 error" in line for line in missed) == 4
