#!/usr/bin/env python3
"""Do all kernels compile for all architectures, without spilling? Prints what each takes; 1 if not.

    python scripts/kernels/compile_kernels.py [--compiler auto|nvcc|nvrtc] [--arch 80 ...] [--whole 90 ...]
                                               [--json FILE]

Needs no GPU. `auto` is nvcc where it is on PATH, else NVRTC, the compiler that kernels meet at run time. Figures
are the assembler's: registers, spilled bytes, stack (local arrays and calls), static shared memory; and the
largest dynamic shared memory that launches ask for, empty where no launch of a common size chooses the kernel.

`--whole 90` goes with `q6k-convert build-ops`, which compiles the kernels of the operations for all
architectures: all kernels for 9.0, and for the others only those of decoding steps, which its library has not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from q6k_kernels.cpp.units import OF_STEPS, Unit, Variant, compile_with_nvcc, dynamic_shared, plan
from q6k_kernels.errors import CudaError, GpuTooOldError
from q6k_kernels.jit import compiler

Row = dict[str, Any]
CompileUnit = Callable[[str, str, tuple[str, ...]], str]
"""Source, name and options to a log."""
FIGURES = ("registers", "spill_bytes", "stack_bytes", "shared_bytes", "dynamic_shared_bytes")


def with_nvrtc(source: str, file: str, options: tuple[str, ...]) -> str:
    """Compiles as at run time; the compiler's log."""
    return compiler.compile_cubin(source, file, options)[1]


def with_nvcc(nvcc: str, source: str, file: str, options: tuple[str, ...]) -> str:
    """Compiles with a toolkit's nvcc; its log."""
    return compile_with_nvcc(nvcc, source, file, options).log


def measure(
    compile_unit: CompileUnit, dynamic: Mapping[tuple[int, Variant], int], item: tuple[Unit, list[str]]
) -> list[Row]:
    """A row for each kernel of a unit: what it takes, or why it failed."""
    (arch, file, defines), kernels = item
    started, error, log, found = time.perf_counter(), None, "", dict[str, compiler.Resources]()
    target = compiler.architecture(divmod(arch, 10))
    try:
        log = compile_unit(compiler.source_text(file, compiler.SOURCES), file, compiler.options(defines, target))
        found = compiler.resources(log)
    except CudaError as failure:
        error, log = failure.cause, getattr(failure, "log", "")
    seconds = time.perf_counter() - started
    rows = []
    for kernel in kernels:
        row: Row = {"arch": target, "file": file, "kernel": kernel, "defines": dict(defines), "seconds": seconds}
        row["dynamic_shared_bytes"] = dynamic.get((arch, (file, kernel, defines)))
        if kernel in found:
            taken = found[kernel]
            row |= vars(taken) | {"error": f"spills {taken.spill_bytes} bytes" if taken.spill_bytes else None}
        else:
            row |= dict.fromkeys(compiler.Resources.__annotations__)
            row["error"] = error or f"{file} has no kernel {kernel}"
        rows.append(row | {"log": log if error else ""})
    return rows


def show(rows: list[Row], title: str) -> None:
    """Prints the table."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    for name in ("arch", "kernel", "macros"):
        table.add_column(name, overflow="fold")
    for name in ("registers", "spills", "stack", "shared", "dynamic", ""):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for row in rows:
        macros = " ".join(f"{name}={value}" for name, value in row["defines"].items())
        figures = (row[name] for name in FIGURES)
        cells = ("" if figure is None else str(figure) for figure in figures)
        table.add_row(row["arch"], row["kernel"], macros, *cells, row["error"] or "ok")
    wide = 200 if not sys.stdout.isatty() else None
    Console(width=wide, highlight=False, markup=False, emoji=False).print(table)


def architecture(text: str) -> int:
    """A compute capability of the command line."""
    try:
        arch = int(text)
        compiler.architecture(divmod(arch, 10))
    except (ValueError, GpuTooOldError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a compute capability of 80 or later, as 90 for 9.0, found {text!r}"
        ) from error
    return arch


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", choices=("auto", "nvcc", "nvrtc"), default="auto")
    parser.add_argument("--arch", type=architecture, nargs="+", default=(), metavar="XY", help="80, 90, …; all")
    parser.add_argument(
        "--whole",
        type=architecture,
        nargs="+",
        metavar="XY",
        help="all kernels for these alone; for the others those that `q6k-convert build-ops` does not compile",
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc") if args.compiler != "nvrtc" else None
    if args.compiler == "nvcc" and nvcc is None:
        parser.error("--compiler nvcc: there is no nvcc on PATH")
    try:
        by = nvcc or f"NVRTC {'.'.join(map(str, compiler.version()))}, {compiler.library_path()}"
    except CudaError as error:
        print(f"error: {error.cause}\ntry: {error.remedy}", file=sys.stderr)
        return 1
    compile_unit = partial(with_nvcc, nvcc) if nvcc else with_nvrtc
    for arch in args.arch:
        try:  # a kernel's own failure would not say that it is the option that is wrong
            compile_unit("", "probe", compiler.options((), compiler.architecture(divmod(arch, 10))))
        except CudaError as error:
            parser.error(f"argument --arch: {arch} is not one that the compiler knows: {error.cause}")
    planned = plan(args.arch)
    if absent := set(args.whole or ()) - {arch for arch, _, _ in planned}:
        parser.error(f"argument --whole: {min(absent)} is not among the architectures to compile for")
    units = {
        unit: kernels
        for unit, kernels in planned.items()
        if args.whole is None or unit[0] in args.whole or unit[1] in OF_STEPS
    }
    dynamic = dynamic_shared(units)
    started = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for part in pool.map(partial(measure, compile_unit, dynamic), units.items()) for row in part]
    show(rows, by)
    failed = [row for row in rows if row["error"]]
    for log in dict.fromkeys(row["log"] for row in failed if row["log"]):
        print(log, file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps({"compiler": by, "kernels": rows}, indent=1) + "\n", encoding="utf-8")
    seconds = time.perf_counter() - started
    print(f"{len(rows)} kernels in {len(units)} units, {seconds:.0f} s; {len(failed)} failed or spill")
    if left := sum(map(len, planned.values())) - len(rows):
        whole = ", ".join(map(str, dict.fromkeys(args.whole)))
        print(f"{left} kernels for other architectures than {whole} are left to `q6k-convert build-ops`")
    if not rows:
        print("error: there was nothing to compile", file=sys.stderr)
    return int(bool(failed) or not rows)


if __name__ == "__main__":
    sys.exit(main())
