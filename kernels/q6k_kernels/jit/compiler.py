"""Compile device code to cubins with NVRTC, the run-time compiler that comes with torch.

This needs no GPU and no CUDA toolkit. NVRTC is the one that `cuda-bindings` finds: torch requires both in the
version that fits its own CUDA.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from q6k_kernels.errors import CompileFailedError, CompilerMissingError, GpuTooOldError, SourceMissingError

SOURCES = Path(__file__).parents[1] / "cuda"
"""Device code, free of #include."""
PREAMBLE = "common.cuh"
"""File that is compiled in front of every other."""
FOUNDATIONS = {
    "decode.cuh": ("quantize.cuh", "tile_layout.cuh", "tile.cuh", "decode_tile.cuh", "one_token.cuh", "warps.cuh"),
    "experts_decode.cuh": (
        "gates.cuh",
        "sixteens.cuh",
        "quantize.cuh",
        "tile_layout.cuh",
        "tile.cuh",
        "decode_tile.cuh",
        "one_token.cuh",
        "warps.cuh",
    ),
    "experts_wgmma.cuh": (
        "tile_layout.cuh",
        "tile.cuh",
        "halves.cuh",
        "barriers.cuh",
        "wgmma.cuh",
        "wgmma_block.cuh",
        "experts_work.cuh",
    ),
    "persist.cuh": (
        *("barriers.cuh", "words.cuh", "gates.cuh", "eights.cuh", "quantize.cuh", "quantize_eights.cuh"),
        *("tile_layout.cuh", "tile.cuh", "decode_tile.cuh", "one_token.cuh", "warps.cuh"),
        *("second.cuh", "tile_layout.cuh", "tile.cuh", "decode_tile.cuh", "one_token.cuh"),
        *("schedule.cuh", "codes.cuh", "heads.cuh", "attend_halves.cuh", "attend_codes.cuh", "attend_block.cuh"),
        "persist_attend.cuh",
    ),
    "quantize_rows.cuh": ("quantize.cuh",),
    "step.cuh": ("gates.cuh", "sixteens.cuh", "quantize.cuh"),
    "attend.cuh": (
        *("quantize.cuh", "codes.cuh", "heads.cuh"),
        *("attend_halves.cuh", "attend_codes.cuh", "attend_block.cuh"),
    ),
    "chunk.cuh": ("gates.cuh", "eights.cuh"),
    "chunk_delta.cuh": ("fours.cuh",),
    "chunk_heads.cuh": ("fours.cuh", "codes.cuh"),
    "delta.cuh": ("quantize.cuh",),
    "gemm_wgmma.cuh": ("tile_layout.cuh", "tile.cuh", "halves.cuh", "barriers.cuh", "wgmma.cuh", "wgmma_block.cuh"),
    "gemm_mma.cuh": ("tile_layout.cuh", "tile.cuh", "halves.cuh", "mma_block.cuh"),
    "experts_mma.cuh": ("tile_layout.cuh", "tile.cuh", "halves.cuh", "mma_block.cuh", "experts_work.cuh"),
    "pack.cuh": ("tile_layout.cuh",),
    "rows.cuh": (
        "tile_layout.cuh",
        "tile.cuh",
    ),
}
"""Further files that some build on, compiled between the two."""
OLDEST_GPU = (8, 0)
"""The first compute capability with bf16 tensor cores and asynchronous copies."""
Defines = tuple[tuple[str, int], ...]
"""Macros that specialise a kernel: their names and values."""

_INSTALL = "A torch for CUDA brings it along; else `pip install cuda-bindings nvidia-cuda-nvrtc`."
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FUNCTION = re.compile(
    r"Function properties for (\w+)\n.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r"(?:\n.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?)?"
)


class Compiled(NamedTuple):
    """A translation unit that was compiled.

    Attributes:
        cubin: the code.
        log: warnings, and what each kernel takes, for `resources`.
    """

    cubin: bytes
    log: str


@dataclass(frozen=True)
class Resources:
    """Resources that a kernel needs.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread.
        spill_bytes: what a thread spills from registers to memory.
        shared_bytes: static shared memory of a block.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def architecture(capability: tuple[int, int]) -> str:
    """Return the architecture that kernels for a compute capability are compiled for.

    It is the GPU's own, not the oldest of its family; on Hopper sm_90a, which alone has wgmma and setmaxnreg.

    Raises:
        GpuTooOldError: the compute capability is below `OLDEST_GPU`.
    """
    major, minor = capability
    if capability < OLDEST_GPU:
        raise GpuTooOldError(
            f"the GPU has compute capability {major}.{minor}, the kernels need 8.0 or later (Ampere)",
            "Use a newer GPU, or keep the model on the CPU.",
        )
    return "sm_90a" if capability == (9, 0) else f"sm_{major}{minor}"


def files_of(file: str) -> tuple[str, ...]:
    """List the files of a translation unit, in order; those of a weight type may be there twice, for two types."""
    return (PREAMBLE, *FOUNDATIONS.get(file, ()), file)


def source_text(file: str, sources: Path = SOURCES) -> str:
    """Join a file and those it builds on into one translation unit, lines numbered as in the files.

    Raises:
        SourceMissingError: one of them cannot be read.
    """
    parts = []
    for name in files_of(file):
        try:
            parts.append(f'#line 1 "{name}"\n' + (sources / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise SourceMissingError(
                f"device code {sources / name} cannot be read: {error.strerror}", "Install q6k-convert again."
            ) from error
    return "\n".join(parts)


def options(defines: Defines, arch: str) -> tuple[str, ...]:
    """Return the options for NVRTC; the last makes the log say what `resources` reads.

    Raises:
        ValueError: the name of a macro is not an identifier.
    """
    for name, _ in defines:
        if not name.isidentifier():
            raise ValueError(f"defines: expected names of macros, found {name!r}")
    macros = (f"-D{name}={int(value)}" for name, value in defines)
    return ("-std=c++17", f"-arch={arch}", *macros, "--ptxas-options=-v")


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompilerMissingError(f"cuda-bindings is not installed or does not load: {error}", _INSTALL) from error
    return nvrtc


@cache
def version() -> tuple[int, int]:
    """Return the version of NVRTC, (major, minor).

    Raises:
        CompilerMissingError: there is no NVRTC, or it does not load.
    """
    try:
        code, major, minor = _nvrtc().nvrtcVersion()
    except (RuntimeError, OSError) as error:  # what the library's finder and loader raise
        reason = " ".join(str(error).split())
        raise CompilerMissingError(
            f"NVRTC, the run-time compiler, was not found or does not load: {reason}", _INSTALL
        ) from error
    _expect_success(code, "nvrtcVersion")
    return int(major), int(minor)


@cache
def library_path() -> Path:
    """Return the file that NVRTC was loaded from. Raises like `version`."""
    version()
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return Path(load_nvidia_dynamic_lib("nvrtc").abs_path)


@cache
def identity() -> str:
    """Name the compiler so that those whose cubins may differ have other names: by version and size of the file.

    The size is there because patch releases keep the version.

    Raises like `version`.
    """
    major, minor = version()
    return f"nvrtc {major}.{minor} {library_path().stat().st_size}"


def compile_cubin(source: str, name: str, arguments: tuple[str, ...]) -> Compiled:
    """Compile one translation unit. Threads may do so side by side.

    Args:
        source: its text.
        name: what to call it in messages.
        arguments: from `options`.

    Raises:
        CompilerMissingError: there is no NVRTC, or it does not know the architecture.
        CompileFailedError: NVRTC refused the source; the text holds the first error, `log` all.
    """
    version()
    nvrtc = _nvrtc()
    expect_architecture(next(each for each in arguments if each.startswith("-arch=")).removeprefix("-arch="))
    code, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    _expect_success(code, "nvrtcCreateProgram")
    try:
        flags = [argument.encode() for argument in arguments]
        (outcome,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        log = _fetch("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
        if outcome != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            errors = [line for line in log.splitlines() if "error" in line] or log.splitlines()
            first = errors[0] if errors else _error_text(outcome)
            raise CompileFailedError(
                f"NVRTC {version()[0]}.{version()[1]} does not compile {name} with {' '.join(arguments)}: {first}",
                "This is a bug in q6k_kernels, or the compiler is too old: report the log with it.",
                log,
            )
        return Compiled(_fetch("nvrtcGetCUBIN", program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def expect_architecture(arch: str) -> None:
    """Check that NVRTC compiles for an architecture.

    Args:
        arch: from `architecture`.

    Raises:
        CompilerMissingError: it does not know it, or there is no NVRTC.
    """
    major, minor = version()
    code, known = _nvrtc().nvrtcGetSupportedArchs()
    _expect_success(code, "nvrtcGetSupportedArchs")
    if int(arch.removeprefix("sm_").rstrip("af")) not in known:
        raise CompilerMissingError(
            f"NVRTC {major}.{minor} does not know {arch}; it knows " + ", ".join(f"sm_{each}" for each in known),
            "Install a torch built for a CUDA version that supports this GPU.",
        )


def resources(log: str) -> dict[str, Resources]:
    """Read the resources of each kernel, by name, from the log of NVRTC with --ptxas-options=-v.

    Spills of functions that are called, not inlined, are added to every kernel: the log does not say which
    kernels call them.

    Raises:
        ValueError: the log names a kernel without its resources.
    """
    entries = dict.fromkeys(_ENTRY.findall(log))
    called, found = 0, dict[str, tuple[int, ...]]()
    for name, *figures in _FUNCTION.findall(log):
        stack, stores, loads, registers, shared = (int(each or 0) for each in figures)
        if name in entries and registers:
            found[name] = registers, stack, max(stores, loads), shared
        else:
            called += max(stores, loads)
    if missing := [name for name in entries if name not in found]:
        raise ValueError(f"the compiler's log does not say what {', '.join(missing)} takes:\n{log}")
    return {
        name: Resources(registers, stack, spilled + called, shared)
        for name, (registers, stack, spilled, shared) in found.items()
    }


def _fetch(function: str, program: Any) -> bytes:
    nvrtc = _nvrtc()
    code, size = getattr(nvrtc, f"{function}Size")(program)
    _expect_success(code, f"{function}Size")
    buffer = bytearray(size)
    if size:
        filled = bytes(buffer)
        (code,) = getattr(nvrtc, function)(program, filled)
        _expect_success(code, function)
        return filled
    return b""


def _expect_success(code: Any, function: str) -> None:
    if code != _nvrtc().nvrtcResult.NVRTC_SUCCESS:
        raise CompilerMissingError(f"{function} failed: {_error_text(code)}", _INSTALL)


def _error_text(code: Any) -> str:
    _, text = _nvrtc().nvrtcGetErrorString(code)
    return bytes(text).decode(errors="replace")
