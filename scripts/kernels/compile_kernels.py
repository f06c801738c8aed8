#!/usr/bin/env python3
"""Do all kernels compile for all architectures, without spilling? Prints what each takes; 1 if not.

    python scripts/kernels/compile_kernels.py [--arch 80 ...] [--jobs N] [--json FILE]

Needs no GPU and no CUDA toolkit: the compiler is NVRTC, as at run time. What compiles goes to the cache of kernels,
so that `q6k-convert build-ops` after this compiles none of them again. Figures are the assembler's: registers,
spilled bytes, stack (local arrays and calls), static shared memory; and the largest dynamic shared memory that
launches ask for, empty where no launch of a common size chooses the kernel.
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
    parser.add_argument("--arch", type=architecture, nargs="+", default=(), metavar="XY", help="80, 90, …; all")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args(arguments)
    started, wanted = time.monotonic(), units.plan(args.arch)
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
