#!/usr/bin/env python3
"""Measure the kernels; print tables with targets and peers, and write JSON. Needs an NVIDIA GPU.

    python scripts/bench/bench_kernels.py [--formats NAME...|all] [--quick] [--only REGEX]
                                          [--json FILE] [--plot FILE.svg]
    python scripts/bench/bench_kernels.py --plot-only FILE.json [--plot FILE.svg]

1. The machine's bandwidth, by a kernel that only reads and by a copy.
2. `q6k::linear` on the shapes of real models, in several weight types, with the activations that the
   operation chooses ("auto") and with forced ones. Beside it cuBLAS in bf16 on dense weights and, for the first
   type, dequantising before each cuBLAS product. Every output is compared with the dense product: a row fails if
   their relative L2 distance exceeds 0.02.
3. Embedding rows, dequantising and packing, as a share of the copy's bandwidth.
4. `q6k::experts` on the stacks of mixtures, 8 experts a row, beside a dense grouped product in bf16.
5. The machine's rate in a bf16 product of 8192 x 8192 x 8192.

Heavy computation heats the GPU, and its clock stays low for a while. So up to 8 rows of all shapes are timed
first, then step 3, then 16 to 64 rows, then more. In each of these phases cuBLAS follows the operation. Before
the first figure of a series the same calls run for 20 ms.

Times are per call in a CUDA graph: the median of 7 replays on random data, with weights rotated past the L2.
GB/s count packed bytes. Scratch is the memory that a call takes from torch's allocator beside its result,
without cuBLAS's workspace. Peers come from `peer_figures.json`, which says where they were measured.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

import bench_kernels_experts as experts
import bench_kernels_rows as rows_of
import kernel_timing as timing
from bench_kernels_rows import FFN, HEAD, HEADING, PHASES, Row, Shape
from q6k_kernels.formats.types import WEIGHT_TYPES, weight_type
from q6k_kernels.weights.weight import PackedWeight, embedding

Call = Callable[[], Tensor]
INT8_MOST = 64
"""Most rows that forced int8 activations are timed with."""
MOST_ERROR = 0.02
GATHERED, GATHERS = 4096, 8
PEER_FIGURES = Path(__file__).with_name("peer_figures.json")


class Bench:
    """One run: its cases, the ceilings that they are compared with, and the results in `report`."""

    def __init__(
        self, *, quick: bool, only: re.Pattern[str], modes: Sequence[str], formats: Sequence[str], to: Path
    ) -> None:
        self._to = to
        self._quick, self._only, self._modes, self._formats = quick, only, modes, formats
        self._peers = json.loads(PEER_FIGURES.read_text(encoding="utf-8"))["linear"]
        self._kept_bytes = 0
        self.report: Row = {"machine": machine(), "ceilings": {}, "linear": [], "operations": [], "experts": []}

    def run(self) -> None:
        """Run all phases, printing each row when it is measured."""
        started = time.perf_counter()
        print(json.dumps(self.report["machine"]))
        self.report["ceilings"] = bandwidths()
        print(json.dumps(self.report["ceilings"]), f"\n{rows_of.LEGEND}", flush=True)
        for phase in PHASES:
            for shape, tables in rows_of.plan(phase, quick=self._quick, only=self._only, formats=self._formats):
                self._linears(phase, shape, tables)
                self.save()  # an interrupted run keeps its rows
            if phase == "decode":
                self._operations()
                self.save()
        self._experts()
        self.report["ceilings"]["matmul_8192_tflops"] = round(timing.matmul_tflops(8192))
        print(f"\nmatmul_8192_tflops: {self.report['ceilings']['matmul_8192_tflops']}")
        self.report["seconds"] = round(time.perf_counter() - started, 1)

    def save(self) -> None:
        """Write the report."""
        self._to.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def _linears(self, phase: str, shape: Shape, tables: dict[str, list[Row]]) -> None:
        """Measure one shape in one phase, the operation by weight type and mode, then cuBLAS; print the rows."""
        n, k = shape
        for format, rows in tables.items():
            packed = timing.rotated_weights(timing.random_weight(n, k, format))
            weights = timing.dense(packed[0])
            series = [partial(self._mode, mode, packed, weights) for mode in self._modes]
            if phase != "decode" and format == self._formats[0]:
                series.append(partial(self._dequantizing, packed))
            for measure, row in product(series, rows):
                if "failed" not in row:
                    try:
                        measure(row, settle=row is rows[0])
                    except Exception as error:
                        row["failed"] = _failure(error)
            del packed, series, measure
        cublas = self._cublas(weights, sorted({row["m"] for rows in tables.values() for row in rows}))
        del weights
        torch.cuda.empty_cache()
        for format, rows in tables.items():
            megabytes = math.prod(shape) * weight_type(format).bits_per_weight / 8e6
            print(f"\n{phase}: {n}x{k}, {format}, {megabytes:.1f} MB\n{HEADING}")
            for row in rows:
                self._finish(row, cublas[row["m"]])
                print(rows_of.line(row), flush=True)

    def _mode(self, mode: str, packed: list[PackedWeight], weights: Tensor, row: Row, *, settle: bool) -> None:
        """Check and time one M in one mode."""
        n, k, m = row["n"], row["k"], row["m"]
        if mode == "int8" and m > INT8_MOST:
            return
        x = _input(m, k)
        exact = dense_linear(x, weights)  # this call also allocates cuBLAS's workspace, before scratch is counted
        calls = [partial(torch.ops.q6k.linear, x, each.tiles, None, n, each.format, mode) for each in packed]
        scratch, kept = timing.scratch_bytes(calls[0])
        self._kept_bytes += kept
        error = float((calls[-1]().float() - exact.float()).norm() / exact.float().norm())
        if not error <= MOST_ERROR:
            raise ArithmeticError(f"{mode}: relative L2 error {error:.3g}, right is at most {MOST_ERROR}")
        us = _time(calls, m, n, k, settle)
        row[f"{mode}_us"] = round(us, 3)
        if mode == self._modes[0]:
            gb_per_s = packed[0].nbytes / us / 1e3
            row |= {
                "us": round(us, 3),
                "gb_per_s": round(gb_per_s),
                "read_share": round(gb_per_s / self.report["ceilings"]["read_gb_per_s"], 4),
                "tflops": round(2 * m * n * k / us / 1e6, 2),
                # This call also uses the memory that an earlier call took for good.
                "scratch_mb": round((scratch + self._kept_bytes - kept) / 1e6, 2),
                "error": round(error, 5),
            }

    def _dequantizing(self, packed: list[PackedWeight], row: Row, *, settle: bool) -> None:
        """Time one M with dequantising before cuBLAS."""
        n, k, m = row["n"], row["k"], row["m"]
        x = _input(m, k)
        calls = [partial(_dequantize_and_multiply, x, each) for each in packed]
        row["dequantize_cublas_us"] = round(_time(calls, m, n, k, settle), 2)

    def _cublas(self, weights: Tensor, ms: list[int]) -> dict[int, float]:
        """Return the microseconds of the dense product, by M."""
        (n, k), copies, times = weights.shape, timing.rotated(weights), {}
        for m in ms:
            x = _input(m, k)
            times[m] = _time([partial(dense_linear, x, copy) for copy in copies], m, n, k, m == ms[0])
        return times

    def _finish(self, row: Row, cublas_us: float) -> None:
        """Add rows to the report, with the times of peers and of cuBLAS."""
        of = row["n"], row["k"], row["m"]
        row["peers"] = {
            p["peer"]: p["us"]
            for p in self._peers
            if (p["n"], p["k"], p["m"]) == of and row["format"] in p.get("formats", WEIGHT_TYPES)
        }
        row["cublas_us"] = round(cublas_us, 2)
        if "us" in row:
            row["times_cublas"] = round(cublas_us / row["us"], 3)
            first = next((r["us"] for r in self.report["linear"] if _same_weight(r, row) and "us" in r), None)
            if row["m"] > 1 and first:
                row["times_m1"] = round(row["us"] / first, 3)
        rows_of.judge(row)
        self.report["linear"].append(row)

    def _operations(self) -> None:
        print("\nGather, dequantise, pack: bytes read and written")
        for operation, shape in (("gather", HEAD), ("dequantize", FFN[0]), ("pack", FFN[0])):
            for format in self._formats:
                row: Row = {"operation": operation, "n": shape[0], "k": shape[1], "format": format}
                if self._only.search(rows_of.label(row)):
                    self._operation(row, format)
                    rows_of.judge(row)
                    self.report["operations"].append(row)
                    print(rows_of.operation_line(row), flush=True)
                    torch.cuda.empty_cache()

    def _experts(self) -> None:
        print("\nExperts x N x K, 8 of them a row: bytes of the experts that are met")
        for row in experts.rows(self._only):
            try:
                experts.measure(row, self.report["ceilings"]["read_gb_per_s"])
            except Exception as error:
                row["failed"] = _failure(error)
            experts.judge(row)
            self.report["experts"].append(row)
            print(experts.line(row), flush=True)
            torch.cuda.empty_cache()

    def _operation(self, row: Row, format: str) -> None:
        n, k = row["n"], row["k"]
        weight = timing.random_weight(n, k, format)
        if row["operation"] == "gather":
            indices = torch.randint(0, n, (GATHERS, GATHERED), device="cuda", generator=timing.generator())
            calls = [partial(embedding, each, weight, torch.bfloat16) for each in indices]
            right, moved = timing.dense(weight)[indices[0]], GATHERED * (weight.nbytes // n + 2 * k)
        elif row["operation"] == "dequantize":
            calls = [partial(each.dequantize, torch.bfloat16) for each in timing.rotated_weights(weight)]
            right, moved = timing.dense(weight), weight.nbytes + 2 * n * k
        else:
            planes = weight.planes()
            copies = [[plane.clone() for plane in planes] for _ in timing.rotated(weight.tiles)]
            calls = [partial(torch.ops.q6k.pack, each, weight.format) for each in copies]
            right, moved = weight.tiles, 2 * weight.nbytes
        try:
            if not torch.equal(calls[0](), right):
                raise ArithmeticError("the result is not, bit for bit, what plain torch makes of the same tiles")
            us = timing.time_calls(calls, moved / 4.8e6, keep=True, settle=True)
            gb_per_s = moved / us / 1e3
            row |= {"us": round(us, 2), "gb_per_s": round(gb_per_s)}
            row["copy_share"] = round(gb_per_s / self.report["ceilings"]["copy_gb_per_s"], 4)
        except Exception as error:
            row["failed"] = _failure(error)


def machine() -> Row:
    """Describe the machine that the figures were measured on."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "sms": gpu.multi_processor_count,
        "l2_mb": round(gpu.L2_cache_size / 2**20),
        "memory_gb": round(gpu.total_memory / 1e9),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def bandwidths() -> Row:
    """Return the measured bandwidths of reading and of copying on this machine, in GB/s."""
    nbytes = min(timing.READ_BYTES, torch.cuda.mem_get_info()[0] // 4) >> 12 << 12
    figures = {
        "read_gb_per_s": round(timing.read_gb_per_s(nbytes)),
        "copy_gb_per_s": round(timing.copy_gb_per_s(nbytes)),
    }
    torch.cuda.empty_cache()
    return figures


def _input(m: int, k: int) -> Tensor:
    return torch.randn(m, k, device="cuda", generator=timing.generator()).bfloat16()


def _dequantize_and_multiply(x: Tensor, weight: PackedWeight) -> Tensor:
    return dense_linear(x, weight.dequantize(x.dtype))


def _time(calls: Sequence[Call], m: int, n: int, k: int, settle: bool) -> float:
    """Return the microseconds of a linear; the guess assumes 4.8 TB/s of packed bytes or 800 TFLOP/s."""
    return timing.time_calls(calls, max(0.8 * n * k / 4.8e6, 2 * m * n * k / 8e8), settle=settle)


def _same_weight(one: Row, other: Row) -> bool:
    """Check whether `one` is the row with M = 1 of the same weight."""
    return one["m"] == 1 and all(one[key] == other[key] for key in ("n", "k", "format"))


def _failure(error: Exception) -> str:
    # A sticky error of the GPU makes all later figures worthless; this raises it again.
    torch.cuda.synchronize()
    return f"{type(error).__name__}: {error}"


def main() -> None:
    """Parse the options, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="measure three shapes and a few M, for tuning")
    add("--only", type=re.compile, default=re.compile(""), metavar="REGEX",
        help="measure only matching cases: `21504x5376 M=(1|2) q4_k`, `gather`")  # fmt: skip
    add("--modes", nargs="+", choices=("auto", "int8", "bf16"), default=["auto", "int8", "bf16"],
        help="values of `activations`; targets apply to the first (default: all)")  # fmt: skip
    add("--formats", nargs="+", choices=(*WEIGHT_TYPES, "all"), default=rows_of.FORMATS, metavar="NAME",
        help=f"weight types, or all (default: {' '.join(rows_of.FORMATS)})")  # fmt: skip
    add("--json", type=Path, default=Path("bench-kernels.json"), metavar="FILE")
    add("--plot", type=Path, metavar="FILE.svg", help='also draw the figures, with matplotlib (extra "bench")')
    add("--plot-only", type=Path, metavar="FILE.json", help="draw the figures of an earlier run, and stop")
    args = parser.parse_args()
    peers = json.loads(PEER_FIGURES.read_text(encoding="utf-8"))
    if args.plot or args.plot_only:
        # Import before anything is timed: a run of minutes must not fail at its end because matplotlib is missing.
        from bench_kernels_plot import draw
    if args.plot_only:
        report = json.loads(args.plot_only.read_text(encoding="utf-8"))
        draw(report, peers, args.plot or args.plot_only.with_suffix(".svg"))
        return
    if not torch.cuda.is_available():
        sys.exit("bench_kernels: torch sees no CUDA GPU; --plot-only draws the figures of an earlier run")
    formats = [*WEIGHT_TYPES] if "all" in args.formats else args.formats
    bench = Bench(quick=args.quick, only=args.only, modes=args.modes, formats=formats, to=args.json)
    bench.run()
    bench.save()
    if args.plot:
        draw(bench.report, peers, args.plot)
    print(rows_of.summary(bench.report))
    if any(
        "failed" in row for row in (*bench.report["linear"], *bench.report["operations"], *bench.report["experts"])
    ):
        sys.exit(1)


if __name__ == "__main__":
    main()
