#!/usr/bin/env python3
"""Measure the speed and peak memory of verification's content check; print a table and write JSON.

    python scripts/bench/bench_verify.py [--gigabytes 2] [--rounds 5] [--json FILE]

A synthetic bundle of Q6_K only is made. In every round it is read and only checksummed by the same algorithm
(one thread for each range of the file, as many threads as verification uses), and then checked by `verify`'s
content stage in another process. Once it is also compared with its source. The share of the plain rate is
taken in each round; the median is shown. All files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bench_convert import COLUMNS, machine, show, write_model
from q6k_convert.convert.pipeline import convert, default_jobs
from q6k_kernels.bundle.content import PIECE_BYTES


def checksum(path: Path, begin: int, end: int) -> str:
    """Read and hash a range of a file."""
    buffer, hasher = np.empty(PIECE_BYTES, dtype=np.uint8), xxhash.xxh3_128()
    fd = os.open(path, os.O_RDONLY)
    try:
        for at in range(begin, end, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, end - at)].data
            if os.preadv(fd, [piece], at) != len(piece):
                raise OSError(0, "short read", str(path))
            hasher.update(piece)
    finally:
        os.close(fd)
    return hasher.hexdigest()


def plain_rate(path: Path, jobs: int) -> float:
    """Return the bytes per second of reading and hashing a file in one equal range for each thread."""
    size = path.stat().st_size
    cuts = [size * i // jobs for i in range(jobs + 1)]
    start = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda i: checksum(path, cuts[i], cuts[i + 1]), range(jobs)))
    return size / (time.perf_counter() - start)


def verified(bundle: Path, *options: str) -> dict[str, Any]:
    """Run `verify --json`, and return its document and its peak memory in bytes."""
    command = [sys.executable, "-m", "q6k_convert", "verify", str(bundle), "--json", "--quiet", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # noqa: S101 -- for the type checker
        report: dict[str, Any] = json.loads(process.stdout.read())
    if report["status"] != "verified":
        raise SystemExit(f"the bundle does not verify: {report['findings'][:3]}")
    return report


def stage_rate(report: dict[str, Any], name: str) -> float:
    """Return the bytes per second of one stage."""
    stage = next(stage for stage in report["stages"] if stage["stage"] == name)
    return float(stage["bytes"]) / float(stage["seconds"])


def main() -> None:
    """Run all measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the synthetic Q6_K file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to be used")
    parser.add_argument("--json", type=Path, default=Path("bench-verify.json"))
    args = parser.parse_args()
    jobs = default_jobs()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.directory) as name:
        work = Path(name)
        model, bundle = work / "synthetic-q6_k.gguf", work / "out"
        write_model(model, int(args.gigabytes * 1e9), COLUMNS)
        convert(model, bundle)
        shard = bundle / "model.safetensors"
        plain, checked, whole = list[float](), list[float](), list[float]()
        report: dict[str, Any] = {}
        for _ in range(args.rounds + 1):  # the first warms the page cache
            plain.append(max(plain_rate(shard, 1), plain_rate(shard, jobs)))
            start = time.perf_counter()
            report = verified(bundle)
            whole.append(time.perf_counter() - start)
            checked.append(stage_rate(report, "content"))
        source = verified(bundle, "--source", str(model))
        share = statistics.median(a / b for a, b in zip(checked[1:], plain[1:], strict=True))
        rows = [
            {
                "what": "read and checksum, nothing else (GB/s)",
                "figure": round(statistics.median(plain[1:]) / 1e9, 2),
            },
            {"what": "content check (GB/s)", "figure": round(statistics.median(checked[1:]) / 1e9, 2)},
            {"what": "its share of the plain rate", "figure": round(share, 2)},
            {"what": "whole command (s)", "figure": round(statistics.median(whole[1:]), 2)},
            {"what": "its peak memory (MB)", "figure": round(report["peak_memory_bytes"] / 1e6)},
            {"what": "comparison with the source (GB/s)", "figure": round(stage_rate(source, "source") / 2e9, 2)},
            {"what": "its peak memory (MB)", "figure": round(source["peak_memory_bytes"] / 1e6)},
        ]
        show(f"Verification, {shard.stat().st_size:,} bytes, {jobs} threads", rows)
        result = {"machine": machine(work), "jobs": jobs, "bytes": shard.stat().st_size, "rows": rows}
    print(json.dumps(result["machine"]))
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
