"""Writes what the library is built from besides `src/`.

    python -m q6k_kernels.cpp.generate FOLDER [--arch 80 ...] [--jobs N]

| file | what |
|---|---|
| cubins.bin | the kernels' code, one cubin behind the other |
| cubins.S | that file as data of the library |
| cubins.inc | where each cubin lies: architecture, file, values of macros, offset, bytes |
| tables.h | the numbers that plans are made from, as Python has them |
| abi.h | values of cuda.h, as NVIDIA's bindings for Python have them |
| about.h | versions |
| settings.cmake | the folder of torch |

Files that would not change are left alone, so that nothing is built again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from q6k_kernels.cpp.cubins import Built, compile_units
from q6k_kernels.cpp.units import FILES, of_library
from q6k_kernels.cuda import decode, decode_plan, device, dispatch, expand, gemm_mma, gemm_wgmma
from q6k_kernels.cuda import rows as row_kernels
from q6k_kernels.formats import ggml, types
from q6k_kernels.jit import compiler, driver, loader

MOST_VALUES = 14
"""Macros of a unit that there is room for."""
CUBIN_ALIGNMENT = 64
"""Bytes; the driver reads cubins where they lie."""
ENUMS = (
    *("CUresult", "CUdevice_attribute", "CUfunction_attribute", "CUlaunchAttributeID", "CUstreamCaptureMode"),
    *("CUtensorMapDataType", "CUtensorMapInterleave", "CUtensorMapSwizzle", "CUtensorMapL2promotion"),
    "CUtensorMapFloatOOBfill",
)
VALUES = ("CU_LAUNCH_PARAM_END", "CU_LAUNCH_PARAM_BUFFER_POINTER", "CU_LAUNCH_PARAM_BUFFER_SIZE")
"""What `src/` uses of cuda.h, besides functions and structures."""


def weight_types() -> list[str]:
    """Return the rows of `formats.types`, and where each type's arrays lie in a tile, as C++."""
    rows = []
    for index, row in enumerate(types.WEIGHT_TYPES.values()):
        planes, weights = len(row.arrays) - len(row.scales), types.TILE_ROWS * ggml.SUPER_BLOCK
        at, arrays = 0, []
        for array in row.arrays:
            size = types.DTYPE_BYTES[array.dtype]
            place = next(i for i, roles in enumerate(row_kernels.PACKED_ROLES) if array.role in roles)
            arrays.append(f'{{"{array.role}", "{array.dtype}", {array.weights}, {size}, {at}, {place}}}')
            at += weights // array.weights * size
        macros = [value for _, value in row.macros]
        numbers = [*macros, int(row.stepped), row.block, row.tile_bytes, gemm_wgmma.tile_pieces(row)]
        counts = [index, planes, len(row.arrays)]
        values = [_list(macros), *map(str, numbers), *map(str, counts), _list(arrays)]
        rows.append(f'{{"{row.name}", {", ".join(values)}}}')
    longest = max(map(len, types.BOOKS))
    return [
        "// `at`: bytes before a tile's elements of the array, of `bytes` each; `place`: among parameters.",
        "struct PlaneArray { const char *role, *dtype; int64_t weights, bytes, at, place; };",
        "// `macros`: values of the weight type's macros, which follow by name. The first `planes` of the `count`",
        "// arrays are of codes.",
        "struct WeightType {",
        "  const char* name;",
        f"  int64_t macros[{len(types.CODE_MACROS)}];",
        f"  int64_t {', '.join(name.removeprefix('Q6K_').lower() for name in types.CODE_MACROS)};",
        "  int64_t stepped, block, tile_bytes, tile_pieces, index, planes, count;",
        "  PlaneArray arrays[MOST_PLANES];",
        "};",
        f"inline constexpr WeightType WEIGHT_TYPES[] = {_list(rows)};",
        f"constexpr signed char BOOKS[][{longest}] = {_list(map(_list, types.BOOKS))};",
    ]


def wgmma_configs() -> list[str]:
    """Return the configurations of `cuda.gemm_wgmma` as C++, with what depends on the weight type."""
    rows, each_type = [], types.WEIGHT_TYPES.values()
    for config in gemm_wgmma.CONFIGS:
        numbers = config.tokens, config.consumers, config.x_stages, config.occupancy, config.cycles
        stages, shared = (_list(map(get, each_type)) for get in (config.stages, config.shared_bytes))
        rows.append(_list((*numbers, config.rows, config.threads, stages, shared)))
    count = len(each_type)
    return [
        "// `gemm_wgmma.Config`; stages and shared memory by weight type, in the order of WEIGHT_TYPES.",
        "struct WgmmaConfig {",
        "  int64_t tokens, consumers, x_stages, occupancy, cycles, rows, threads;",
        f"  int64_t stages[{count}], shared_bytes[{count}];",
        "};",
        f"inline constexpr WgmmaConfig WGMMA_CONFIGS[] = {_list(rows)};",
    ]


def tables() -> str:
    """Return the header of numbers that Python's launch plans are made from."""
    numbers = {
        "TILE_ROWS": types.TILE_ROWS,
        "SUPER_BLOCK": ggml.SUPER_BLOCK,
        "SCALES_E8M0": types.KIND_OF_SCALE["U8", False],
        "MOST_VALUES": MOST_VALUES,
        "MOST_PLANES": len(row_kernels.PACKED_ROLES),
        "ALIGNMENT": device.ALIGNMENT,
        "DECODE_M": dispatch.DECODE_M,
        "PREFILL_M": dispatch.PREFILL_M,
        "MOST_TOKENS": decode_plan.MOST_TOKENS,
        "CLUSTER_ARCH": decode_plan.CLUSTER_ARCH,
        "LARGE_SHARED": decode_plan.LARGE_SHARED,
        "MOST_WAVES": decode_plan.MOST_WAVES,
        "QUANTIZE_THREADS": decode.QUANTIZE_THREADS,
        "WGMMA_ARCH": gemm_wgmma.ARCH,
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
        *wgmma_configs(),
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


def abi_header() -> str:
    """Return the values of cuda.h, under its names, and the sets of results that mean the same."""
    cuda = driver.bindings()
    members = (member for enum in ENUMS for member in getattr(cuda, enum))
    values = {member.name: int(member) for member in members}
    values |= {name: int(getattr(cuda, name)) for name in VALUES}
    sets = {
        "ERRORS_OF_IMAGES": loader.ERRORS_OF_IMAGES,
        "ERRORS_OF_EARLIER_KERNELS": driver.ERRORS_OF_EARLIER_KERNELS,
    }
    lines = [
        "// Made by generate.py from NVIDIA's bindings for Python.",
        "#pragma once",
        "namespace q6k {",
        *(f"constexpr int {name} = {value};" for name, value in values.items()),
        *(f"constexpr int {name}[] = {_list(sorted(results))};" for name, results in sets.items()),
        "}  // namespace q6k",
    ]
    return "\n".join(lines) + "\n"


def about_header(version: str) -> str:
    """Return the header with the versions of the library and of its kernels' compiler."""
    nvrtc = ".".join(map(str, compiler.version()))
    return f"""// Made by generate.py.
#pragma once
#define Q6K_VERSION "{version}"
#define Q6K_NVRTC "{nvrtc}"
"""


def cubin_index(built: Iterable[Built]) -> tuple[bytes, str]:
    """All cubins, each where the driver can read it, and the table of them."""
    blob, rows = bytearray(), list[str]()
    for each in built:
        arch, file, defines = each.unit
        values = [int(value) for _, value in defines]
        if len(values) > MOST_VALUES or not all(0 <= value < 1 << 16 for value in values):
            raise ValueError(f"{file}: {len(values)} macros {values}: the library has room for {MOST_VALUES}")
        blob += bytes(-len(blob) % CUBIN_ALIGNMENT)
        key = f"{FILES.index(file)}, {len(values)}, {_list(values)}"
        rows.append(f"{{{arch}, {{{key}}}, {len(blob)}, {len(each.cubin)}}},")
        blob += each.cubin
    return bytes(blob), "\n".join(["// Made by generate.py.", "const Cubin CUBINS[] = {", *rows, "};", ""])


def assembly(blob: Path) -> str:
    """Return assembly that holds a file as read-only data."""
    return f"""# Made by generate.py.
.section .rodata.q6k_cubins, "a", %progbits
.balign {CUBIN_ALIGNMENT}
.globl q6k_cubins
.hidden q6k_cubins
q6k_cubins:
.incbin "{blob}"
.section .note.GNU-stack, "", %progbits
"""


def write(folder: Path, built: Sequence[Built], version: str) -> None:
    """Write the files.

    Args:
        folder: where they go; made if need be.
        built: the library's units, compiled.
        version: what the library says of itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blob, rows = cubin_index(built)
    contents = {
        "cubins.bin": blob,
        "cubins.S": assembly(folder.resolve() / "cubins.bin").encode(),
        "cubins.inc": rows.encode(),
        "tables.h": tables().encode(),
        "abi.h": abi_header().encode(),
        "about.h": about_header(version).encode(),
        "settings.cmake": f'set(TORCH_FOLDER "{Path(torch.__file__).parent}")\n'.encode(),
    }
    for name, content in contents.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def main(arguments: list[str] | None = None) -> int:
    """Compile the kernels and write the files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", type=int, nargs="*", default=())
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(arguments)
    built = list(compile_units(of_library(args.arch), args.jobs, print))
    for error in (errors := [error for each in built for error in each.errors]):
        print(f"error: {error}", file=sys.stderr)
    if not errors:
        write(args.folder, built, "0")
    return int(bool(errors))


def _list(values: Iterable[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


if __name__ == "__main__":
    sys.exit(main())
