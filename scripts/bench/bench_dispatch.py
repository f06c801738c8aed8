#!/usr/bin/env python3
"""Measure the CPU time of a call, by Python's operations and by the C++ library's; print a table, write JSON.

    python scripts/bench/bench_dispatch.py LIBRARY [--format NAME] [--rounds 30] [--json FILE]

The layer is small, so that the GPU keeps up. Bursts of calls fit the launch queue and are timed without waiting
for the GPU; between bursts the GPU is waited for. Figures are medians over bursts, in microseconds per call: first
Python's operations, then the library's in the same process. `torch.nn.functional.linear` in bf16 is the comparison.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import kernel_timing as timing
from q6k_kernels.formats.types import DEFAULT, WEIGHT_TYPES
from q6k_kernels.ops import library as ops_library

BURST = 200
"""Calls in a burst; a stream queues about a thousand launches before it makes callers wait."""
N, K = 1024, 1024
Call = Callable[[], object]


def calls(format: str) -> dict[str, Call]:
    """Return the calls to time, by name."""
    source = torch.Generator("cuda").manual_seed(0)
    tiles = timing.random_weight(N, K, format).tiles
    x = {m: torch.randn(m, K, device="cuda", generator=source).bfloat16() for m in (1, 8, 64)}
    bias, at = torch.zeros(N, device="cuda"), torch.arange(8, device="cuda")
    dense = torch.randn(N, K, device="cuda", generator=source).bfloat16()
    operations = torch.ops.q6k
    return {
        "linear, M = 1": lambda: operations.linear.default(x[1], tiles, None, N, format, "auto"),
        "linear, M = 1, with bias": lambda: operations.linear.default(x[1], tiles, bias, N, format, "auto"),
        "linear, M = 8": lambda: operations.linear.default(x[8], tiles, None, N, format, "auto"),
        "linear, M = 64": lambda: operations.linear.default(x[64], tiles, None, N, format, "auto"),
        "embedding, 8 rows": lambda: operations.embedding.default(at, tiles, N, K, format, torch.bfloat16),
        "torch, M = 1": lambda: torch.nn.functional.linear(x[1], dense),
    }


def microseconds(call: Call, rounds: int) -> dict[str, float]:
    """Return the CPU time of a call in microseconds: median and quartiles over bursts."""
    found = []
    for _ in range(rounds + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BURST):
            call()
        found.append((time.perf_counter() - start) / BURST * 1e6)
    torch.cuda.synchronize()
    low, median, high = statistics.quantiles(found[3:], n=4)  # the first bursts warm up
    return {"median": median, "low": low, "high": high}


def measure(rounds: int, format: str) -> dict[str, dict[str, float]]:
    """Return the time of every call."""
    with torch.inference_mode():
        return {name: microseconds(call, rounds) for name, call in calls(format).items()}


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("microseconds a call")
    for name in ("Python", "library", "times"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        python, library = row["python"]["median"], row["library"]["median"]
        table.add_row(name, f"{python:.2f}", f"{library:.2f}", f"{python / library:.1f}")
    Console(highlight=False).print(table)


def main(arguments: list[str] | None = None) -> int:
    """Parse the options, measure, print and write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, metavar="LIBRARY", help="libq6k_ops.so")
    parser.add_argument("--rounds", type=int, default=30, help="bursts of each call")
    parser.add_argument("--format", choices=WEIGHT_TYPES, default=DEFAULT, metavar="NAME", help="weight type")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(arguments)
    if args.rounds < 2:
        parser.error("argument --rounds: at least 2")
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU", file=sys.stderr)
        return 1
    import q6k_kernels.ops.schema  # noqa: F401  registers Python's

    python = measure(args.rounds, args.format)
    about = ops_library.load(args.library)
    library = measure(args.rounds, args.format)
    rows = {name: {"python": python[name], "library": library[name]} for name in python}
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{machine}, {N}x{K} {args.format}, library by NVRTC {about.nvrtc}")
    show(rows)
    if args.json:
        facts = {
            "gpu": torch.cuda.get_device_name(),
            "torch": str(torch.__version__),
            "n": N,
            "k": K,
            "format": args.format,
        }
        document = {**facts, "rounds": args.rounds, "burst": BURST, "microseconds": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
