"""Compiles units to cubins: for the library, which embeds them, and for the check that every kernel compiles.

NVRTC works outside of the interpreter's lock, so threads share the work. The cubin cache has what was compiled
before: whichever comes first of the library, the check and a first launch, each kernel is compiled once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from q6k_kernels.cpp.units import Unit, Variant, dynamic_shared, name_of
from q6k_kernels.errors import CompileFailedError, SourceMissingError
from q6k_kernels.jit import compiler, loader

NOTE_SECONDS = 5.0
"""Between two lines of progress."""
Row = dict[str, Any]
"""A kernel: `arch`, `file`, `kernel`, `defines`; what `compiler.Resources` has of it; and `dynamic_shared_bytes`,
the most dynamic shared memory of a block that launches ask for, None where no launch of a common size chooses it.
"""


@dataclass(frozen=True)
class Built:
    """A unit that was compiled, or that could not be.

    Attributes:
        unit: what was compiled.
        cubin: the code; empty if there is none.
        rows: what each of its kernels takes.
        errors: what is wrong with it: it does not compile, a kernel is missing, a kernel spills.
        log: what the compiler said.
    """

    unit: Unit
    cubin: bytes
    rows: list[Row]
    errors: list[str]
    log: str


def compile_units(
    wanted: Mapping[Unit, Sequence[str]], jobs: int, note: Callable[[str], object]
) -> Iterator[Built]:
    """Compile units, and yield them in their order.

    A kernel that spills is an error: it would be slow, and where it is meant to hold its sums in registers, far too
    slow.

    Args:
        wanted: the kernels that each unit must have.
        jobs: units at a time.
        note: told every few seconds how far it is.

    Raises:
        CompilerMissingError: there is no NVRTC, or it does not know an architecture.
    """
    for arch in dict.fromkeys(arch for arch, _, _ in wanted):
        compiler.expect_architecture(_target(arch))
    dynamic = dynamic_shared(wanted)
    started = told = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        each_built = pool.map(lambda unit: _compile(unit, wanted[unit], dynamic), wanted)
        for count, built in enumerate(each_built, 1):
            now = time.monotonic()
            if now - told >= NOTE_SECONDS:
                told, left = now, (now - started) / count * (len(wanted) - count)
                note(f"{count} of {len(wanted)} units compiled, {left:.0f} s left")
            yield built


def _target(arch: int) -> str:
    return compiler.architecture(divmod(arch, 10))


def _compile(unit: Unit, wanted: Sequence[str], dynamic: Mapping[tuple[int, Variant], int]) -> Built:
    arch, file, defines = unit
    name = name_of(unit)
    try:
        cubin, log = loader.compiled(file, defines, _target(arch), compiler.SOURCES)
    except (CompileFailedError, SourceMissingError) as error:
        return Built(unit, b"", [], [f"{name}: {error.cause}"], getattr(error, "log", ""))
    taken = compiler.resources(log)
    errors = [f"{kernel} spills {each.spill_bytes} bytes" for kernel, each in taken.items() if each.spill_bytes]
    said = log[:500] or "nothing"
    errors += [f"{file} has no kernel {kernel}; the log says: {said}" for kernel in wanted if kernel not in taken]
    of_unit = {"arch": arch, "file": file, "defines": dict(defines)}
    rows = [
        {
            **of_unit,
            "kernel": kernel,
            **vars(taken[kernel]),
            "dynamic_shared_bytes": dynamic.get((arch, (file, kernel, defines))),
        }
        for kernel in sorted(taken)
    ]
    return Built(unit, cubin, rows, [f"{name}: {error}" for error in errors], log)


def table(rows: Sequence[Row]) -> list[str]:
    """Return lines for people, a heading first."""
    lines = [f"{'arch':>4}  {'kernel':16} registers  spills  stack  shared  dynamic  macros"]
    for row in rows:
        macros = " ".join(f"{name.removeprefix('Q6K_')}={value}" for name, value in row["defines"].items())
        dynamic = "" if row["dynamic_shared_bytes"] is None else row["dynamic_shared_bytes"]
        lines.append(
            f"{row['arch']:>4}  {row['kernel']:16} {row['registers']:>9}  {row['spill_bytes']:>6}  "
            f"{row['stack_bytes']:>5}  {row['shared_bytes']:>6}  {dynamic:>7}  {macros}"
        )
    return lines
