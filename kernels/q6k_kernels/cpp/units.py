"""What kernels are compiled from ahead of time: a unit for each architecture, file and set of macros.

A unit is what `jit` compiles at run time, to the same cubin. Which there are, only `q6k_kernels.cpp.variants` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from q6k_kernels.formats.types import CODE_MACROS, WEIGHT_TYPES, WeightType
from q6k_kernels.jit.compiler import Defines

Unit = tuple[int, str, Defines]
"""Compute capability, file, macros: compiled once, whatever kernels it has."""
Variant = tuple[str, str, Defines]
"""File, kernel, macros."""

MACROS: dict[str, tuple[str, ...]] = {
    "decode.cuh": (
        *(*CODE_MACROS, "Q6K_FP16", "Q6K_TOKENS", "Q6K_FUSED"),
        *("Q6K_WARPS", "Q6K_STAGES", "Q6K_OCCUPANCY", "Q6K_SPLIT"),
    ),
    "quantize_rows.cuh": ("Q6K_FP16", "Q6K_TOKENS", "Q6K_FUSED"),
    "gemm_wgmma.cuh": (
        *(*CODE_MACROS, "Q6K_FP16", "Q6K_TOKENS", "Q6K_CONSUMERS"),
        *("Q6K_TILE_STAGES", "Q6K_X_STAGES", "Q6K_OCCUPANCY"),
    ),
    "gemm_mma.cuh": (*CODE_MACROS, "Q6K_FP16", "Q6K_BN", "Q6K_KW", "Q6K_SLOTS"),
    "rows.cuh": (*CODE_MACROS, "Q6K_OUT", "Q6K_INDEX32"),
    "pack.cuh": CODE_MACROS,
}
"""The macros of each file in the order in which `src/` gives their values; `check` compares `variants` with it."""
OF_PYTHON = (
    *(
        "step.cuh",
        "attend.cuh",
        "delta.cuh",
        "mixture.cuh",
        "choose.cuh",
        "persist.cuh",
        "chunk.cuh",
        "chunk_heads.cuh",
        "chunk_delta.cuh",
    ),
    *("experts_decode.cuh", "experts_sort.cuh", "experts_wgmma.cuh", "experts_mma.cuh"),
)
"""Files with kernels that Python launches alone: those of steps and chunks, which are no part of the ops, and of
experts, since models that have some are not exported."""
HOPPER = 90
FILES = tuple(MACROS)
"""In the order of `File` in `src/kernels.h`."""


def plan(architectures: Sequence[int] = ()) -> dict[Unit, list[str]]:
    """Return the kernels wanted of each unit, for all architectures if none is given."""
    from q6k_kernels.cpp.variants import ARCHITECTURES, all_variants  # they import torch

    units: dict[Unit, list[str]] = {}
    for arch in architectures or ARCHITECTURES:
        for file, kernel, defines in all_variants(arch):
            units.setdefault((arch, file, defines), []).append(kernel)
    return units


def of_library(
    architectures: Sequence[int] = (), only: str = "", formats: Iterable[WeightType] = WEIGHT_TYPES.values()
) -> dict[Unit, list[str]]:
    """Return the units of `plan` that the library holds.

    Args:
        architectures: as in `plan`.
        only: a regular expression that the units' names must match.
        formats: weight types; units that belong to none are always among the library's.

    Raises:
        ValueError: `src/` does not know a unit's macros.
    """
    wanted = {row.macros for row in formats} | {()}
    found = {
        unit: kernels
        for unit, kernels in plan(architectures).items()
        if unit[1] not in OF_PYTHON and format_macros(unit) in wanted and re.search(only, name_of(unit))
    }
    for unit in found:
        check(unit)
    return found


def format_macros(unit: Unit) -> Defines:
    """Return the macros of the unit's weight type, none if it serves all."""
    return tuple((name, value) for name, value in unit[2] if name in CODE_MACROS)


def cover(wanted: Mapping[Unit, Sequence[str]]) -> dict[Unit, list[str]]:
    """Return few of the units, such that each architecture has every kernel, and some have every macro's value.

    The oldest architecture and Hopper, which has kernels of its own, also have every value of each macro, and each
    file's every weight type. The others, whose kernels are the oldest one's, have each kernel once, and the values
    of macros that those two do not have.
    Greedy: the unit with the most that is missing comes next; among equal ones that with the largest values, which
    take the most registers.
    """
    thorough = {min(arch for arch, _, _ in wanted), HOPPER}
    compiled = {(file, each) for arch, file, defines in wanted if arch in thorough for each in defines}

    def items(unit: Unit) -> set[Any]:
        arch, file, defines = unit
        kernels = set(wanted[unit])
        if arch in thorough:
            return {*kernels, *defines, format_macros(unit)}
        return {*kernels, *(each for each in defines if (file, each) not in compiled)}

    chosen: dict[Unit, list[str]] = {}
    for _, units in groupby(sorted(wanted), key=lambda unit: unit[:2]):
        left = {unit: items(unit) for unit in units}
        missing = set[Any]().union(*left.values())
        while missing:
            best = max(left, key=lambda unit: (len(left[unit] & missing), sum(value for _, value in unit[2])))
            chosen[best] = list(wanted[best])
            missing -= left.pop(best)
    return chosen


def dynamic_shared(units: Iterable[Unit]) -> dict[tuple[int, Variant], int]:
    """Bytes that launches of kernels ask for, by compute capability and variant, where it is known."""
    from q6k_kernels.cpp.variants import shared_bytes

    return {
        (arch, variant): size
        for arch in dict.fromkeys(arch for arch, _, _ in units)
        for variant, size in shared_bytes(arch).items()
    }


def check(unit: Unit) -> None:
    """Check that `src/` knows the unit's macros.

    Raises:
        ValueError: it does not: a kernel has got a macro that the library's host side does not choose.
    """
    _, file, defines = unit
    names = tuple(name for name, _ in defines)
    if names != MACROS.get(file):
        known = ", ".join(MACROS.get(file, ("no such file",)))
        raise ValueError(f"{file}: the library's host side knows {known}; variants has {', '.join(names)}")


def name_of(unit: Unit) -> str:
    """Return a name for the unit's files, as sm90_decode_0_1_8: its macros' values in order."""
    arch, file, defines = unit
    return "_".join((f"sm{arch}", file.removesuffix(".cuh"), *(str(int(value)) for _, value in defines)))
