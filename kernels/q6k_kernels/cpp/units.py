"""What the library's kernels are compiled from: a unit for each file and set of macros, by nvcc, ahead of time.

A unit is what `jit` compiles at run time, to the same cubin but for the compiler's version. Which there are, only
`q6k_kernels.cpp.variants` says. Needs no torch, but for `plan` and `dynamic_shared`.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from q6k_kernels.errors import CompileFailedError
from q6k_kernels.formats.types import CODE_MACROS
from q6k_kernels.jit import compiler
from q6k_kernels.jit.compiler import Defines

Unit = tuple[int, str, Defines]
"""Compute capability, file, macros: compiled once, whatever kernels it has."""
Variant = tuple[str, str, Defines]
"""File, kernel, macros."""

MACROS: dict[str, tuple[tuple[str, ...], ...]] = {
    "decode.cuh": (
        (
            *(*CODE_MACROS, "Q6K_FP16", "Q6K_TOKENS", "Q6K_FUSED"),
            *("Q6K_WARPS", "Q6K_STAGES", "Q6K_OCCUPANCY", "Q6K_SPLIT"),
        ),
    ),
    "gemm_wgmma.cuh": (
        (
            *(*CODE_MACROS, "Q6K_FP16", "Q6K_TOKENS", "Q6K_CONSUMERS"),
            *("Q6K_TILE_STAGES", "Q6K_X_STAGES", "Q6K_OCCUPANCY"),
        ),
    ),
    "gemm_mma.cuh": ((*CODE_MACROS, "Q6K_FP16", "Q6K_BN", "Q6K_KW", "Q6K_SLOTS"),),
    "rows.cuh": ((*CODE_MACROS, "Q6K_OUT"), (*CODE_MACROS, "Q6K_OUT", "Q6K_INDEX32")),
    "pack.cuh": (CODE_MACROS,),
}
"""The macros of each file in the order in which `src/` gives their values; `check` holds `variants` against it."""
OF_STEPS = ("step.cuh", "attend.cuh", "choose.cuh")
"""Files with kernels of decoding steps, which are no part of the ops: `step_kernels` launches them from Python."""
FILES = tuple(MACROS)
"""In the order of `File` in `src/kernels.h`."""


@dataclass(frozen=True)
class Compiled:
    """One unit from nvcc.

    Attributes:
        cubin: the code; empty if nvcc, against its word, wrote none.
        log: warnings, and what each kernel takes, for `compiler.resources`.
    """

    cubin: bytes
    log: str


def plan(architectures: Sequence[int] = ()) -> dict[Unit, list[str]]:
    """The kernels wanted of each unit, for all architectures if none is given."""
    from q6k_kernels.cpp.variants import ARCHITECTURES, all_variants  # they import torch

    units: dict[Unit, list[str]] = {}
    for arch in architectures or ARCHITECTURES:
        for file, kernel, defines in all_variants(arch):
            units.setdefault((arch, file, defines), []).append(kernel)
    return units


def dynamic_shared(units: Iterable[Unit]) -> dict[tuple[int, Variant], int]:
    """Bytes that launches of kernels ask for, by compute capability and variant, where it is known."""
    from q6k_kernels.cpp.variants import shared_bytes

    return {
        (arch, variant): size
        for arch in dict.fromkeys(arch for arch, _, _ in units)
        for variant, size in shared_bytes(arch).items()
    }


def check(unit: Unit) -> None:
    """Whether `src/` knows the unit's macros.

    Raises:
        ValueError: it does not: a kernel has got a macro that the library's host side does not choose.
    """
    _, file, defines = unit
    names = tuple(name for name, _ in defines)
    if names not in MACROS.get(file, ()):
        known = " or ".join(", ".join(each) for each in MACROS.get(file, ())) or "no such file"
        raise ValueError(f"{file}: the library's host side knows {known}; variants has {', '.join(names)}")


def name_of(unit: Unit) -> str:
    """A name for the unit's files, as sm90_decode_0_1_8: its macros' values in order."""
    arch, file, defines = unit
    return "_".join((f"sm{arch}", file.removesuffix(".cuh"), *(str(int(value)) for _, value in defines)))


def options_of(unit: Unit) -> tuple[str, ...]:
    """What nvcc is told."""
    arch, _, defines = unit
    return compiler.options(defines, compiler.architecture(divmod(arch, 10)))


def compile_with_nvcc(nvcc: str, source: str, name: str, options: tuple[str, ...]) -> Compiled:
    """One translation unit.

    Args:
        nvcc: the program.
        source: the unit's text.
        name: what to call it in messages.
        options: from `compiler.options`.

    Raises:
        CompileFailedError: nvcc refused it; the text holds the first error, `log` all.
    """
    with tempfile.TemporaryDirectory(prefix="compile-") as folder:
        unit = Path(folder) / f"{name}.cu"
        cubin = unit.with_suffix(".cubin")
        unit.write_text(source, encoding="utf-8")
        command = [nvcc, "-cubin", *options, str(unit), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        log = done.stdout + done.stderr
        if done.returncode:
            first = next((line for line in log.splitlines() if "error" in line), log.strip() or "no message")
            raise CompileFailedError(f"nvcc does not compile {name}: {first}", "", log)
        return Compiled(cubin.read_bytes() if cubin.exists() else b"", log)
