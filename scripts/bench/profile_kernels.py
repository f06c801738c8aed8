"""Show which kernels take a GPU's time and how long it idles between them, by torch's profiler.

A kernel may begin while the one before it ends, and wait for it. So the table shows the time of each kernel and
the time that it adds: from the end of all earlier kernels to its own end. Added times and gaps sum up to the
whole time.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
MOST_LINES = 25
NAME_WIDTH = 70


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, or of a copy; times in microseconds."""

    name: str
    start: float
    end: float


def profiled(work: Callable[[], object], name: str, steps: int) -> Row:
    """Profile work on a GPU.

    Args:
        work: function to run once, after everything was compiled and recorded.
        name: name of the work.
        steps: number of tokens that it reads or generates.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    return {"name": name, "steps": steps, **shares(kernels_of(trace))}


def kernels_of(trace: Row) -> list[Kernel]:
    """Return the kernels that ran on the GPU, by start, without copies from and to the host, which run beside them.

    Args:
        trace: trace that `export_chrome_trace` wrote.

    Raises:
        ValueError: nothing ran on a GPU.
    """
    kernels = list[Kernel]()
    for event in trace["traceEvents"]:
        if event.get("ph") != "X" or event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        if not re.search("HtoD|DtoH", event["name"]):
            start = float(event["ts"])
            kernels.append(Kernel(event["name"], start, start + float(event["dur"])))
    if not kernels:
        raise ValueError("the profiler saw no kernel: expected those of a GPU; is CUPTI in use by another program?")
    return sorted(kernels, key=lambda kernel: kernel.start)


def shares(kernels: list[Kernel]) -> Row:
    """Return totals, and a row for each kernel's name, ordered by added time; times in microseconds.

    Args:
        kernels: kernels by start, at least one.
    """
    rows, gaps = dict[str, Row](), list[float]()
    begin = until = kernels[0].start
    for kernel in kernels:
        row = rows.setdefault(
            kernel.name, {"name": kernel.name, "count": 0, "us": 0.0, "added_us": 0.0, "gap_us": 0.0}
        )
        gap = max(0.0, kernel.start - until)
        if gap:
            gaps.append(gap)
        row["count"] += 1
        row["us"] += kernel.end - kernel.start
        row["gap_us"] += gap
        row["added_us"] += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    span = until - begin
    for row in rows.values():
        row["share"] = row["added_us"] / span
    return {
        "span_us": span,
        "busy_us": span - sum(gaps),
        "gaps_us": sum(gaps),
        "gaps": len(gaps),
        "median_gap_us": statistics.median(gaps) if gaps else 0.0,
        "longest_gap_us": max(gaps, default=0.0),
        "launches": len(kernels),
        "kernels": sorted(rows.values(), key=lambda row: -row["added_us"]),
    }


def table(profile: Row) -> str:
    """Return the profile as a text table, with times per step."""
    steps = profile["steps"]
    parts = [
        f"\nprofile of {profile['name']}: {profile['span_us'] / steps:.1f} us a token, "
        f"{profile['launches'] / steps:.1f} launches; idle {profile['gaps_us'] / profile['span_us']:.1%}, "
        f"{profile['gaps'] / steps:.1f} gaps, in the median {profile['median_gap_us']:.2f} us, "
        f"the longest {profile['longest_gap_us']:.1f} us",
        f"{'share':>7}{'us added':>10}{'us':>10}{'gap before':>12}{'launches':>10}  kernel",
    ]
    for row in profile["kernels"][:MOST_LINES]:
        us, added, gap, count = (row[key] / steps for key in ("us", "added_us", "gap_us", "count"))
        parts.append(
            f"{row['share']:>7.1%}{added:>10.2f}{us:>10.2f}{gap:>12.2f}{count:>10.2f}  {_short(row['name'])}"
        )
    if len(profile["kernels"]) > MOST_LINES:
        rest = sum(row["share"] for row in profile["kernels"][MOST_LINES:])
        parts.append(f"{rest:>7.1%}  {len(profile['kernels']) - MOST_LINES} more")
    return "\n".join(parts)


def _short(name: str) -> str:
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::", "", name)
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 3] + "..."
