"""Writes what the library is built from besides `src/`: what CMake runs while it configures.

    python -m q6k_kernels.cpp.generate FOLDER [--arch 80 ...] [--only REGEX]

| file | what |
|---|---|
| units.json | every unit: file, kernels, the dynamic shared memory that they ask for, options |
| units.cmake | their names, and the device code that they are made of |
| cubins.S | their cubins, one behind the other |
| cubins.inc | which is which: architecture, file, values of macros |
| tables.h | the numbers that plans are made from, as Python has them |

Files that would not change are left alone, so that nothing is built again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

from q6k_kernels.cpp import units as library
from q6k_kernels.cpp.units import FILES, Unit
from q6k_kernels.cuda import decode, decode_plan, device, dispatch, expand, gemm_mma, gemm_wgmma
from q6k_kernels.cuda import rows as row_kernels
from q6k_kernels.formats import ggml, types
from q6k_kernels.jit import compiler

MOST_VALUES = 12
"""Of the macros of a unit; `Key` in `src/kernels.h` has room for as many."""


def weight_types() -> list[str]:
    """Return the rows of `formats.types` as C++."""
    rows = []
    for row in types.WEIGHT_TYPES.values():
        arrays = _list(f'{{"{array.role}", "{array.dtype}", {array.weights}}}' for array in row.arrays)
        numbers = [value for _, value in row.macros] + [row.block, row.tile_bytes, len(row.arrays)]
        rows.append(f'{{"{row.name}", {", ".join(map(str, numbers))}, {arrays}}}')
    return [
        "struct PlaneArray { const char *role, *dtype; int64_t weights; };",
        "struct WeightType {",
        "  const char* name;",
        "  int64_t bits, group, minimum, scales, block, tile_bytes, count;",
        "  PlaneArray arrays[MOST_PLANES];",
        "};",
        f"constexpr WeightType WEIGHT_TYPES[] = {_list(rows)};",
    ]


def tables() -> str:
    """The header of numbers that Python's launch plans are made from."""
    numbers = {
        "TILE_ROWS": types.TILE_ROWS,
        "SUPER_BLOCK": ggml.SUPER_BLOCK,
        "SCALES_STEPPED": types.KIND_OF_SCALE["I8"],
        "MOST_PLANES": row_kernels.PACKED_PLANES,
        "ALIGNMENT": device.ALIGNMENT,
        "DECODE_M": dispatch.DECODE_M,
        "PREFILL_M": dispatch.PREFILL_M,
        "MOST_TOKENS": decode_plan.MOST_TOKENS,
        "CLUSTER_ARCH": decode_plan.CLUSTER_ARCH,
        "LARGE_SHARED": decode_plan.LARGE_SHARED,
        "MOST_WAVES": decode_plan.MOST_WAVES,
        "QUANTIZE_THREADS": decode.QUANTIZE_THREADS,
        "WGMMA_ARCH": gemm_wgmma.ARCH,
        "TILE_PIECES": gemm_wgmma.TILE_PIECES,
        "MMA_WARPS": gemm_mma.WARPS,
        "MMA_THREADS": gemm_mma.THREADS,
        "REDUCE_THREADS": gemm_mma.REDUCE_THREADS,
        "MMA_STAGE_BYTES": gemm_mma.STAGE_BYTES,
        "MOST_SPLITS": gemm_mma.MOST_SPLITS,
        "MOST_WORKSPACE": gemm_mma.MOST_WORKSPACE,
        "EXPAND_BYTES": expand.SCRATCH_BYTES,
        "PACK_WARPS": row_kernels.PACK_WARPS,
        "ROW_THREADS": row_kernels.THREADS,
    }
    configs = [
        (each.tokens, each.consumers, each.tile_stages, each.x_stages, each.occupancy, each.cycles)
        for each in gemm_wgmma.CONFIGS
    ]
    lines = [
        "// Made by generate.py from Python's launch plans.",
        "#pragma once",
        "#include <cstdint>",
        "namespace q6k {",
        *(f"constexpr int64_t {name} = {value};" for name, value in numbers.items()),
        *weight_types(),
        f"constexpr int64_t TOKENS[] = {_list(decode_plan.TOKENS)};",
        f"constexpr int64_t CLUSTERS[] = {_list(decode_plan.CLUSTERS)};",
        f"constexpr int64_t SMALL[][3] = {_list(map(_list, decode_plan.SMALL))};",
        *_decode_rows(),
        f"constexpr int64_t WGMMA_CONFIGS[][6] = {_list(map(_list, configs))};",
        f"constexpr int64_t MMA_CONFIGS[][2] = {_list(map(_list, gemm_mma.CONFIGS))};",
        f"constexpr int64_t SMALL_SHARED[] = {_list(gemm_mma.SMALL_SHARED)};",
        "}  // namespace q6k",
    ]
    return "\n".join(lines) + "\n"


def _decode_rows() -> list[str]:
    """Return the lines of `decode_plan.ROWS`."""
    bits = {name: 1 << at for at, name in enumerate(types.WEIGHT_TYPES)}
    most = max(len(row.shapes) for row in decode_plan.ROWS)
    rows = []
    for row in decode_plan.ROWS:
        sizes = sum(map(bits.__getitem__, row.formats)), sum(row.tokens), row.k, row.tiles
        how = int(row.fused), int(row.early), row.resident, len(row.shapes), _list(map(_list, row.shapes))
        rows.append(f"    {_list((*sizes, *how))},")
    return [
        "// `decode_plan.Row`; formats, of which WEIGHT_TYPES has the order, and tokens are sums of bits.",
        "struct DecodeRow {",
        f"  int64_t formats, tokens, k, tiles, fused, early, resident, count, shapes[{most}][3];",
        "};",
        "constexpr DecodeRow DECODE_ROWS[] = {",
        *rows,
        "};",
    ]


def assembly(names: Iterable[str], folder: Path) -> str:
    """The cubins as read-only data, aligned as the driver reads them."""
    lines = ["# Made by generate.py.", '.section .rodata.q6k_cubins, "a", %progbits']
    for index, name in enumerate(names):
        lines += [
            ".balign 64",
            *(f".globl q6k_cubin_{index}{end}\n.hidden q6k_cubin_{index}{end}" for end in ("", "_end")),
            f"q6k_cubin_{index}:",
            f'.incbin "{folder / "cubins" / name}.cubin"',
            f"q6k_cubin_{index}_end:",
            ".byte 0",
        ]
    return "\n".join([*lines, '.section .note.GNU-stack, "", %progbits', ""])


def index(units: Iterable[Unit]) -> str:
    """The table of cubins."""
    externs, rows = [], []
    for number, (arch, file, defines) in enumerate(units):
        values = [int(value) for _, value in defines]
        if len(values) > MOST_VALUES or not all(0 <= value < 1 << 16 for value in values):
            raise ValueError(f"{file}: {len(values)} macros {values}: the library has room for {MOST_VALUES}")
        key = f"{FILES.index(file)}, {len(values)}, {_list(values)}"
        externs.append(f"extern const unsigned char q6k_cubin_{number}[], q6k_cubin_{number}_end[];")
        rows.append(f"{{{arch}, {{{key}}}, q6k_cubin_{number}, q6k_cubin_{number}_end}},")
    head = ['extern "C" {', *externs, "}", "const Cubin CUBINS[] = {"]
    return "\n".join(["// Made by generate.py.", *head, *rows, "};", ""])


def main(arguments: list[str] | None = None) -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", type=int, nargs="*", default=())
    parser.add_argument("--only", default="", help="units whose name this matches")
    args = parser.parse_args(arguments)
    folder: Path = args.folder.resolve()
    wanted = {unit: kernels for unit, kernels in library.plan(args.arch).items() if unit[1] not in library.OF_STEPS}
    units = {library.name_of(unit): unit for unit in wanted if re.search(args.only, library.name_of(unit))}
    for unit in units.values():
        library.check(unit)
    dynamic = library.dynamic_shared(units.values())
    described = {
        name: {
            "arch": unit[0],
            "file": unit[1],
            "defines": dict(unit[2]),
            "kernels": wanted[unit],
            "dynamic_shared_bytes": {
                kernel: dynamic.get((unit[0], (unit[1], kernel, unit[2]))) for kernel in wanted[unit]
            },
            "options": library.options_of(unit),
        }
        for name, unit in units.items()
    }
    sources = sorted({compiler.SOURCES / each for _, file, _ in units.values() for each in compiler.files_of(file)})
    folder.joinpath("cubins").mkdir(parents=True, exist_ok=True)
    _write(folder / "units.json", json.dumps(described, indent=1) + "\n")
    _write(
        folder / "units.cmake",
        "".join(
            f"set({key} {' '.join(json.dumps(str(one)) for one in each)})\n"
            for key, each in (("UNITS", units), ("CUH", sources))
        ),
    )
    _write(folder / "cubins.S", assembly(units, folder))
    _write(folder / "cubins.inc", index(units.values()))
    _write(folder / "tables.h", tables())


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _list(values: Iterable[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


if __name__ == "__main__":
    main()
