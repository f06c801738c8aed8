"""Which kernels take a GPU's time, and how long it idles between them, by torch's profiler.

A kernel may begin while the one before it ends, and wait for it. So beside the sum of a kernel's times stands what
each adds: from the end of all before it to its own end. What is added and the gaps are, together, all of the time.
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
    """Profiles some work on a GPU.

    Args:
        work: what to run, once, everything compiled and recorded before.
        name: of the work.
        steps: tokens it takes in, or gives.
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
    """What ran on the GPU, by its start; without copies from and to the host, which run beside it.

    Args:
        trace: as `export_chrome_trace` writes it.

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
    """Totals, and a row for each kernel's name, that which adds most first; times in microseconds.

    Args:
        kernels: by their start, one or more.
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
    """It as text, times of a step."""
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
