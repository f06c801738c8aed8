#!/usr/bin/env python3
"""Compile kernels for all architectures and print their resources; exit with 1 if one fails or spills.

    python scripts/kernels/compile_kernels.py [--all] [--arch 80 ...] [--jobs N] [--json FILE]

By default few of the variants, such that each file is compiled for the oldest architecture and for Hopper with
every value of every macro and every weight type, and each kernel once for the others; with --all every variant that
some size of a product may load.

Needs no GPU and no CUDA toolkit: the compiler is NVRTC, as at run time. Compiled kernels go to the kernel cache,
so that a later `q6k-convert build-ops` compiles none of them again. Figures come from the assembler: registers,
spilled bytes, stack (local arrays and calls), static shared memory. Beside them is the largest dynamic shared
memory of a launch, empty where no launch of a common size chooses the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from q6k_kernels.cpp import cubins, units
from q6k_kernels.errors import CompilerMissingError, GpuTooOldError
from q6k_kernels.jit import compiler


def architecture(text: str) -> int:
    """Parse a compute capability from the command line, 90 for 9.0."""
    try:
        arch = int(text)
        compiler.architecture(divmod(arch, 10))
    except (ValueError, GpuTooOldError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a compute capability of 80 or later, as 90 for 9.0, found {text!r}"
        ) from error
    return arch


def main(arguments: list[str] | None = None) -> int:
    """Parse the options, compile and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch",
        type=architecture,
        nargs="+",
        default=(),
        metavar="XY",
        help="compute capabilities, 90 for 9.0; by default all",
    )
    parser.add_argument("--all", action="store_true", help="every variant that a launch may load")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(arguments)
    started, every = time.monotonic(), units.plan(args.arch)
    wanted = every if args.all else units.cover(every)
    try:
        by = f"NVRTC {'.'.join(map(str, compiler.version()))}, {compiler.library_path()}"
        print(by, flush=True)
        built = list(cubins.compile_units(wanted, args.jobs, lambda line: print(line, flush=True)))
    except CompilerMissingError as missing:
        print(f"error: {missing.cause}\ntry: {missing.remedy}", file=sys.stderr)
        return 1
    rows = [row for unit in built for row in unit.rows]
    errors = [error for unit in built for error in unit.errors]
    print(*cubins.table(rows), sep="\n")
    for log in dict.fromkeys(unit.log for unit in built if unit.errors):
        print(log, file=sys.stderr)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if args.json:
        document = {"compiler": by, "kernels": rows, "errors": errors}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    seconds = time.monotonic() - started
    print(f"{len(rows)} kernels in {len(built)} units, {seconds:.0f} s; {len(errors)} errors")
    if not built:
        print("error: there was nothing to compile", file=sys.stderr)
    return int(bool(errors) or not built)


if __name__ == "__main__":
    sys.exit(main())
