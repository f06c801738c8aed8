"""Define and print the rows of bench_kernels.py and their targets. A row is a dict of figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from q6k_kernels.formats.types import weight_type

Row = dict[str, Any]
Shape = tuple[int, int]

HEAD = (262144, 5376)
SMALL = (1024, 4096)
FFN = ((21504, 5376), (5376, 21504))
BATCHED = ((4096, 4096), (14336, 4096), (4096, 14336), *FFN)
SHAPES: tuple[Shape, ...] = (SMALL, *BATCHED, HEAD)
"""Shapes (N, K) of Llama 3 8B and Gemma 3 27B."""
DECODE = (1, 2, 3, 4, 5, 6, 7, 8)
MIDDLE = (16, 32, 64)
PREFILL = (128, 256, 512, 1024, 2048, 4096)
PHASES: dict[str, tuple[int, ...]] = {"decode": DECODE, "middle": MIDDLE, "prefill": PREFILL}
"""Rows of activations, in the order they are timed. Products with many rows come last: they leave the GPU hot and
its clock low for longer than the next row takes."""
QUICK_SHAPES: tuple[Shape, ...] = ((4096, 4096), *FFN)
QUICK_MS = (1, 2, 4, 8, 16, 64, 128, 1024)
PEERS = ("ET PR", "ET main", "Humming")


@dataclass(frozen=True)
class Target:
    """Target of rows: their `figure` shall be at most or at least `bound`.

    `ms` and `shapes` select linears; for other operations they are None.
    """

    figure: str
    sense: Literal["<=", ">="]
    bound: float
    words: str
    ms: tuple[int, ...] | None = None
    shapes: tuple[Shape, ...] | None = None

    def applies(self, row: Row) -> bool:
        """Check whether the target is for this row; it is not if the row lacks the figure."""
        if self.figure not in row and "failed" not in row:
            return False
        if self.ms is None or self.shapes is None:
            return "m" not in row
        return row.get("m") in self.ms and (row["n"], row["k"]) in self.shapes

    def met(self, row: Row) -> bool:
        """Check whether the row reaches the target; a row that failed does not."""
        value = row.get(self.figure)
        if "failed" in row or value is None:
            return False
        return bool(value <= self.bound if self.sense == "<=" else value >= self.bound)


class Bounds(NamedTuple):
    """What is asked of a weight type: shares of the read bandwidth with M = 1, of FFN and HEAD; times of M = 1 with
    M up to 8; times as fast as cuBLAS with M = 16, 32 and 64.
    """

    ffn: float
    head: float
    few: float
    middle: tuple[float, float, float]


SIX_BITS = Bounds(0.85, 0.90, 1.20, (2.0, 1.7, 1.3))
BOUNDS = {
    "q6_k": SIX_BITS,
    "q6_k_exact": SIX_BITS,
    "q4_k": Bounds(0.82, 0.92, 1.25, (2.2, 1.8, 1.5)),
    "q5_k": Bounds(0.84, 0.92, 1.25, (2.0, 1.7, 1.45)),
    "q8_0": Bounds(0.88, 0.94, 1.25, (1.6, 1.4, 1.2)),
}
"""Bounds by weight type. Of the others, 0.9 of the shares of that which is nearest in bits."""
FORMATS = tuple(BOUNDS)
"""Weight types that are measured unless others are asked for."""


@cache
def targets(format: str) -> tuple[Target, ...]:
    """Return the targets of a weight type."""
    bits = weight_type(format).bits_per_weight
    nearest = min(BOUNDS, key=lambda name: (name != format, abs(weight_type(name).bits_per_weight - bits)))
    bounds, part = BOUNDS[nearest], 1.0 if nearest == format else 0.9
    found = [
        Target("read_share", ">=", share * part, f"{share * part:.0%} of read", (1,), shapes)
        for share, shapes in ((bounds.ffn, FFN), (bounds.head, (HEAD,)))
    ]
    found.append(Target("times_m1", "<=", bounds.few, f"{bounds.few:.2f}x M=1", DECODE[1:], SHAPES))
    if nearest == format:
        found += [
            Target("times_cublas", ">=", times, f"{times}x cuBLAS", (m,), BATCHED)
            for m, times in zip(MIDDLE, bounds.middle, strict=True)
        ]
    if bounds is SIX_BITS and nearest == format:
        found.append(Target("us", "<=", 5.0, "5.0 us", (1,), ((4096, 4096),)))
        found.append(Target("us", "<=", 3.5, "3.5 us", (1,), (SMALL,)))
    found.append(Target("times_cublas", ">=", 0.95, "0.95x cuBLAS", PREFILL, BATCHED))
    found.append(Target("scratch_mb", "<=", 64.0, "64 MB scratch", PREFILL, BATCHED))
    found.append(Target("copy_share", ">=", 0.70, "70% of copy"))
    return tuple(found)


COLUMNS = (
    ("M", "m", "{}", 5),
    ("us", "us", "{:.2f}", 8),
    ("int8", "int8_us", "{:.2f}", 8),
    ("bf16", "bf16_us", "{:.2f}", 8),
    ("GB/s", "gb_per_s", "{}", 6),
    ("read", "read_share", "{:.0%}", 5),
    ("TFLOP/s", "tflops", "{:.1f}", 8),
    ("/M=1", "times_m1", "{:.2f}", 6),
    ("cuBLAS", "cublas_us", "{:.1f}", 8),
    ("x", "times_cublas", "{:.2f}", 6),
    ("deq+", "dequantize_cublas_us", "{:.1f}", 8),
    ("MB", "scratch_mb", "{:.1f}", 6),
)
HEADING = "".join(f"{title:>{width}}" for title, _, _, width in COLUMNS) + "".join(f"{p:>8}" for p in PEERS)
LEGEND = """\
us: the first mode asked for, int8 and bf16: forced; read: share of the read bandwidth; /M=1: times its own M=1;
x: times as fast as cuBLAS; deq+: dequantising, then cuBLAS; MB: scratch memory; then peers' us"""


def plan(
    phase: str, *, quick: bool, only: re.Pattern[str], formats: Sequence[str]
) -> Iterator[tuple[Shape, dict[str, list[Row]]]]:
    """Yield the shapes of a phase, each with the rows to time by weight type, without figures."""
    for shape in QUICK_SHAPES if quick else SHAPES:
        if phase != "decode" and shape not in BATCHED:
            continue
        tables: dict[str, list[Row]] = {}
        for each in formats:
            rows: list[Row] = [{"n": shape[0], "k": shape[1], "m": m, "format": each} for m in PHASES[phase]]
            rows = [row for row in rows if (not quick or row["m"] in QUICK_MS) and only.search(label(row))]
            if rows:
                tables[each] = rows
        if tables:
            yield shape, tables


def judge(row: Row) -> None:
    """Add to a row the targets that apply to it, and whether each is met."""
    row["targets"] = [{"target": t.words, "met": t.met(row)} for t in targets(row["format"]) if t.applies(row)]


def label(row: Row) -> str:
    """Return the label that --only matches: `21504x5376 M=1 q4_k`, `experts 128x704x2816 M=8 q4_k`."""
    what = f"M={row['m']}" if "m" in row else ""
    shape = "x".join(str(row[key]) for key in ("count", "n", "k") if key in row)
    return " ".join(filter(None, (row.get("operation"), shape, what, row["format"])))


def verdict(row: Row) -> str:
    """Return a row's targets as text, and why it failed if it did."""
    words = [f"{t['target']} {'met' if t['met'] else 'MISSED'}" for t in row["targets"]]
    return ", ".join(words) + (f"  FAILED {row['failed']}" if "failed" in row else "")


def line(row: Row) -> str:
    """Return a row of the table of linears."""
    cells = [f"{'' if row.get(key) is None else form.format(row[key]):>{width}}" for _, key, form, width in COLUMNS]
    cells += [f"{row['peers'].get(peer, ''):>8}" for peer in PEERS]
    return f"{''.join(cells)}  {verdict(row)}".rstrip()


def operation_line(row: Row) -> str:
    """Return a row of the table of other operations."""
    figures = "" if "failed" in row else f"{row['us']} us, {row['gb_per_s']} GB/s, {row['copy_share']:.0%} of copy"
    return f"  {label(row)}: {figures}  {verdict(row)}"


def summary(report: Row) -> str:
    """Return how many targets are met, and every row that misses one or failed."""
    rows = [*report["linear"], *report["operations"], *report["experts"]]
    judged = [target for row in rows for target in row["targets"]]
    parts = [f"\n{sum(t['met'] for t in judged)} of {len(judged)} targets met; {report['seconds']:.0f} s"]
    for row in rows:
        missed = [target["target"] for target in row["targets"] if not target["met"]]
        if missed or "failed" in row:
            words = f"target {', '.join(missed)}" if missed else "no target"
            parts.append(f"  {label(row)}: {row.get('failed') or _reached(row)} ({words})")
    return "\n".join(parts)


def _reached(row: Row) -> str:
    forms = {
        "us": "{} us",
        "read_share": "{:.0%} of read",
        "times_m1": "{} times its M=1",
        "times_cublas": "{} x cuBLAS",
        "times_dense": "{} x dense",
        "scratch_mb": "{} MB",
        "copy_share": "{:.0%} of copy",
    }
    return ", ".join(form.format(row[key]) for key, form in forms.items() if row.get(key) is not None)
