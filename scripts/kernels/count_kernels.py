#!/usr/bin/env python3
"""Read hardware counters of the kernels with Nsight Compute; print a table, and write JSON.

    python scripts/kernels/count_kernels.py [--formats NAME...] [--json FILE]

Needs `ncu` on PATH and a GPU whose counters it may read. Each case runs alone, with its weight not in the cache and
unlocked clocks, so a short kernel takes longer than in a CUDA graph. Percentages are of the peak: DRAM and L2 over
the kernel's whole time, issue slots and tensor pipe while multiprocessors are active. Waits are the average number
of warps that wait for a reason at each issued instruction; the two largest are shown.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from q6k_kernels.formats.types import DEFAULT, WEIGHT_TYPES

Row = dict[str, Any]
SQUARE, SMALLEST, TALL, LONG = (4096, 4096), (1024, 4096), (21504, 5376), (5376, 21504)
WIDE = (14336, 4096), (4096, 14336)
Case = tuple[int, tuple[int, int], str]


def cases(formats: Sequence[str]) -> list[Case]:
    """Return M, (N, K) and weight type of the cases that are furthest from their targets."""
    few = [(1, shape) for shape in (SQUARE, SMALLEST, LONG, TALL)]
    few += [(2, WIDE[1]), *((8, shape) for shape in (SQUARE, *WIDE, LONG, TALL))]
    many = [(m, TALL) for m in (16, 32, 64)] + [(512, SQUARE), (2048, LONG), (2048, WIDE[0])]
    return [(m, shape, format) for m, shape in (*few, *many) for format in formats]


COLUMNS = (
    ("us", "gpu__time_duration.sum", "{:.1f}"),
    ("DRAM %", "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "{:.0f}"),
    ("L2 %", "lts__throughput.avg.pct_of_peak_sustained_elapsed", "{:.0f}"),
    ("issue %", "smsp__issue_active.avg.pct_of_peak_sustained_active", "{:.0f}"),
    ("tensor %", "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active", "{:.0f}"),
    ("warps", "sm__warps_active.avg.per_cycle_active", "{:.1f}"),
)
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
"""Microseconds of each unit of time, by the names that versions of ncu use."""
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
MORE = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "ComputeWorkloadAnalysis", "Occupancy")
"""Sections of ncu to collect."""


def run_cases(formats: Sequence[str]) -> None:
    """Launch each case once; ncu profiles this."""
    # The scripts of bench/ are beside this folder.
    sys.path.append(str(Path(__file__).parents[1] / "bench"))
    from kernel_timing import random_weight
    from q6k_kernels.weights.weight import linear

    for m, (n, k), format in cases(formats):
        weight = random_weight(n, k, format)
        x = torch.randn(m, k, device="cuda").bfloat16()
        linear(x, weight)
        torch.cuda.synchronize()


def counted(report: str, asked: Sequence[Case]) -> list[Row]:
    """Return the rows of ncu's CSV, one for each case.

    Args:
        report: output of `ncu --csv --page raw`.
        asked: the cases, in the order they ran.

    Raises:
        ValueError: the number of products is not that of the cases, or a duration has an unknown unit.
    """
    lines = report.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found = [row for row in csv.DictReader(lines[first:]) if row["ID"].isdigit()]
    products = [row for row in found if "quantize" not in row["Kernel Name"]]
    if len(products) != len(asked):
        raise ValueError(f"expected counters of {len(asked)} products, found {len(products)}:\n{report[-2000:]}")
    units = dict(next(iter(csv.DictReader(lines[first:]))))
    return [_row(case, row, units) for case, row in zip(asked, products, strict=True)]


def _row(case: Case, found: Row, units: Row) -> Row:
    m, (n, k), format = case
    row: Row = {"m": m, "n": n, "k": k, "format": format, "kernel": found["Kernel Name"]}
    for title, metric, _ in COLUMNS:
        row[title] = _number(found.get(metric))
    if row["us"] is not None:
        unit = units[COLUMNS[0][1]]
        if unit not in MICROSECONDS:
            raise ValueError(f"expected durations in one of {', '.join(MICROSECONDS)}, found {unit!r}")
        row["us"] *= MICROSECONDS[unit]
    stalls = {
        match[1]: value
        for name, text in found.items()
        if (match := STALL.fullmatch(name or "")) and (value := _number(text)) is not None
    }
    longest = sorted(stalls.items(), key=lambda item: -item[1])
    row["waits"] = {name: value for name, value in longest if name != "selected"}
    return row


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    titles = ["M", "N x K", "format", *(title for title, _, _ in COLUMNS), "waits"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        figures = ["-" if row[title] is None else form.format(row[title]) for title, _, form in COLUMNS]
        waits = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in [*row["waits"].items()][:2])
        lines.append(
            "| " + " | ".join([str(row["m"]), f"{row['n']}x{row['k']}", row["format"], *figures, waits]) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the cases under ncu, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=WEIGHT_TYPES, default=[DEFAULT], metavar="NAME")
    parser.add_argument("--json", type=Path, default=Path("count-kernels.json"), metavar="FILE")
    parser.add_argument("--cases", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cases:
        run_cases(args.formats)
        return
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        sys.exit("count_kernels: needs a CUDA GPU, and Nsight Compute's ncu on PATH")
    sections = [each for section in MORE for each in ("--section", section)]
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", *sections]
    command += ["--metrics", ",".join(metric for _, metric, _ in COLUMNS)]
    command += ["--kernel-name", "regex:q6k_(decode|quantize|gemm)", sys.executable, __file__, "--cases"]
    command += ["--formats", *args.formats]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"count_kernels: ncu ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    rows = counted(done.stdout, cases(args.formats))
    print(f"{torch.cuda.get_device_name()}\n\n{table(rows)}")
    args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
