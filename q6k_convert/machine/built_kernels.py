"""What the kernels of a C++ library take that was built: as data, and as lines for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def rows(generated: Path) -> list[Row]:
    """A row for each kernel that was compiled.

    Args:
        generated: the folder that `q6k_kernels.cpp.generate` wrote to, its cubins compiled.

    Returns:
        `arch`, `file`, `defines`, `kernel`; what `q6k_kernels.jit.compiler.Resources` has; and
        `dynamic_shared_bytes`, the largest dynamic shared memory that launches ask for, None where no launch of a
        common size chooses the kernel.
    """
    found = []
    for name, unit in json.loads((generated / "units.json").read_text(encoding="utf-8")).items():
        taken = json.loads((generated / "cubins" / f"{name}.cubin.json").read_text(encoding="utf-8"))
        known = {key: unit[key] for key in ("arch", "file", "defines")}
        dynamic = unit["dynamic_shared_bytes"]
        found += [
            {**known, "kernel": kernel, **taken[kernel], "dynamic_shared_bytes": dynamic.get(kernel)}
            for kernel in sorted(taken)
        ]
    return found


def table(kernels: Sequence[Row]) -> list[str]:
    """Lines for people, a heading first."""
    lines = [f"{'arch':>4}  {'kernel':16} registers  spills  stack  shared  dynamic  macros"]
    for row in kernels:
        macros = " ".join(f"{name.removeprefix('Q6K_')}={value}" for name, value in row["defines"].items())
        dynamic = "" if row["dynamic_shared_bytes"] is None else row["dynamic_shared_bytes"]
        lines.append(
            f"{row['arch']:>4}  {row['kernel']:16} {row['registers']:>9}  {row['spill_bytes']:>6}  "
            f"{row['stack_bytes']:>5}  {row['shared_bytes']:>6}  {dynamic:>7}  {macros}"
        )
    return lines
