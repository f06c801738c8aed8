"""Compiles one unit of the library: what CMake runs, once for each.

    python -m q6k_kernels.cpp.compile_unit NVCC UNITS.json NAME CUBIN

Writes the cubin, and beside it CUBIN.json with what its kernels take. A kernel that spills is an error: it would be
slow, and where it is meant to hold its sums in registers, far too slow.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from q6k_kernels.cpp.units import compile_with_nvcc
from q6k_kernels.errors import CudaError
from q6k_kernels.jit import compiler


def main(nvcc: str, units: str, name: str, cubin: str) -> int:
    """The exit code."""
    unit = json.loads(Path(units).read_text(encoding="utf-8"))[name]
    try:
        compiled = compile_with_nvcc(nvcc, compiler.source_text(unit["file"]), name, tuple(unit["options"]))
    except CudaError as error:
        print(f"error: {error.cause}\n{getattr(error, 'log', '')}", file=sys.stderr)
        return 1
    taken = compiler.resources(compiled.log)
    wrong = [f"{kernel} spills {each.spill_bytes} bytes" for kernel, each in taken.items() if each.spill_bytes]
    wrong += [f"it has no kernel {kernel}" for kernel in unit["kernels"] if kernel not in taken]
    wrong += [] if compiled.cubin else ["nvcc wrote no code"]
    if wrong:
        print(f"error: {name}: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    rows = {kernel: vars(each) for kernel, each in taken.items()}
    Path(f"{cubin}.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")
    Path(cubin).write_bytes(compiled.cubin)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
