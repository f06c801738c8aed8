"""Draw the figures of bench_kernels.py as one SVG, with matplotlib (the extra "bench").

The upper panels show GB/s of packed weights over M = 1..8 rows of activations, one panel a shape. The lower ones
show TFLOP/s over all M on logarithmic scales, under two roofs: the limits that read bandwidth and matrix rate set
for packed weights and for 16-bit weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from bench_kernels_rows import BATCHED, SHAPES, Row, Shape
from q6k_kernels.formats.types import DEFAULT, WEIGHT_TYPES

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 8.5,
    "grid.color": "#d8dee4",
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.8,
    "savefig.facecolor": "white",  # an opaque background, so that it looks the same on dark and light pages
    "svg.fonttype": "none",
    "svg.hashsalt": "bench_kernels",  # without a date the same figures give the same bytes
    "ytick.left": False,
}


class Series(NamedTuple):
    """Style of one kind of measured points; `peer` is its name in `peer_figures.json`."""

    words: str
    color: str
    marker: str
    line: str
    bits: float
    peer: str | None = None


LOOKS = (
    ("#0969da", "o", "-"),
    ("#1a7f64", "s", "--"),
    ("#cf222e", "P", "-"),
    ("#bf8700", "X", "-"),
    ("#57606a", "h", "-"),
)
"""Color, marker and line of our weight types, in turn."""
OURS = {
    row.name: Series(f"q6k, {row.name}", *look, row.bits_per_weight)
    for row, look in zip(WEIGHT_TYPES.values(), itertools.cycle(LOOKS), strict=False)
}
CUBLAS = Series("cuBLAS bf16", "#b35900", "^", "-", 16.0)
PEERS = (
    Series("ExecuTorch PR 20229", "#a40e6b", "D", "", 7.0, "ET PR"),
    Series("ExecuTorch main", "#6639ba", "v", "", 6.5625, "ET main"),
)


def draw(report: Row, peers: Row, target: Path) -> None:
    """Write the picture.

    Args:
        report: report of bench_kernels.py; one of an interrupted run lacks the matrix rate.
        peers: content of `peer_figures.json`; its times are drawn if they were measured on the same GPU.
        target: path of the SVG.
    """
    with mpl.rc_context(STYLE):
        figure(report, peers).savefig(target, metadata={"Date": None})


def figure(report: Row, peers: Row) -> Figure:
    """Return the figure: a panel for each shape, four in a line for few rows of activations, three for all rows."""
    others = peers["linear"] if report["machine"]["gpu"] == peers["machine"]["gpu"] else []
    largest = {shape: max((r["m"] for r in report["linear"] if _is(r, shape)), default=0) for shape in SHAPES}
    few = [shape for shape in SHAPES if largest[shape]]
    many = [shape for shape in BATCHED if largest[shape] > 8]
    heights = [1.75 * math.ceil(len(few) / 4), 2.4 * math.ceil(len(many) / 3)]
    first = report["linear"][0]["format"] if report["linear"] else DEFAULT
    drawn = Figure(figsize=(10, sum(heights) + 0.8), layout="constrained")
    drawn.suptitle(f"Linear layers with packed weights on one {report['machine']['gpu']}")
    parts: Any = drawn.subfigures(2, height_ratios=[max(height, 0.1) for height in heights])
    upper, lower = parts
    for axes, shape in _panels(upper, few, 4, "GB/s of packed weights over M (grey: read bandwidth)"):
        axes.set_xscale("log", base=2)
        axes.axhline(report["ceilings"]["read_gb_per_s"], color="#59636e")
        for series, rows in _measured(report, others, shape):
            if series is not CUBLAS:
                packed = shape[0] * shape[1] * series.bits / 8e3
                _points(axes, series, [(r["m"], packed / r["us"]) for r in rows if r["m"] <= 8])
        axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axes.set_ylim(bottom=0)
    words = "TFLOP/s over M (grey: read bandwidth and matrix rate for packed weights; dotted: for 16 bits a weight)"
    for axes, shape in _panels(lower, many, 3, words):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for bits, style in ((OURS[first].bits, "-"), (CUBLAS.bits, ":")):
            if rate := report["ceilings"].get("matmul_8192_tflops"):
                slope = 2 * 8 / bits * report["ceilings"]["read_gb_per_s"] / 1e3  # TFLOP/s of one row
                axes.plot([1, rate / slope, 4096], [slope, rate, rate], style, color="#59636e")
        for series, rows in _measured(report, others, shape):
            _points(axes, series, [(r["m"], 2 * r["m"] * shape[0] * shape[1] / r["us"] / 1e6) for r in rows])
        axes.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4096"])
        axes.set_ylim(1, 1500)
    handles = {line.get_label(): line for axes in drawn.axes for line in axes.get_lines()}
    shown = [each.words for each in (*OURS.values(), CUBLAS, *PEERS) if each.words in handles]
    drawn.legend([handles[words] for words in shown], shown, loc="outside lower center", ncols=5)
    return drawn


def _panels(part: Any, shapes: list[Shape], columns: int, words: str) -> Iterator[tuple[Any, Shape]]:
    if not shapes:
        return
    part.suptitle(words)
    grid = part.subplots(math.ceil(len(shapes) / columns), columns, sharey=True, squeeze=False).flat
    for axes, shape in zip(grid, shapes, strict=False):
        axes.set_title(f"{shape[0]} × {shape[1]}")
        yield axes, shape
        axes.minorticks_off()
    for axes in grid[len(shapes) :]:
        axes.remove()


def _measured(report: Row, others: list[Row], shape: Shape) -> Iterator[tuple[Series, list[Row]]]:
    """Yield each series that has points of a shape: rows with `m` and `us`."""
    rows = [row for row in report["linear"] if _is(row, shape)]
    dense = {row["m"]: {"m": row["m"], "us": row["cublas_us"]} for row in rows}
    found = [(series, [r for r in others if _is(r, shape) and r["peer"] == series.peer]) for series in PEERS]
    found += [(CUBLAS, list(dense.values()))]
    found += [(OURS[each], [r for r in rows if r["format"] == each and "us" in r]) for each in OURS]
    return ((series, points) for series, points in found if points)


def _points(axes: Any, series: Series, points: list[tuple[float, float]]) -> None:
    x, y = zip(*sorted(points), strict=True) if points else ((), ())
    axes.plot(x, y, color=series.color, marker=series.marker, linestyle=series.line or "none", label=series.words)


def _is(row: Row, shape: Shape) -> bool:
    return (row["n"], row["k"]) == shape
