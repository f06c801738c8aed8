"""Run kernels of `cuda/` on the CPU: translate them to C++, compile with g++, run with `emulator.h`.

A `Kernel` is launched with the same grid, threads and packed arguments as `q6k_kernels.jit.loader.Kernel`, so host
code can be run unchanged. It takes pointers into host memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from q6k_kernels.jit import compiler
from q6k_kernels.jit.compiler import SOURCES

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
requires_compiler = pytest.mark.skipif(COMPILER is None, reason="needs Linux and g++")
_FLAGS = (
    "-std=c++17",
    "-Og",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-w",
    "-U_FORTIFY_SOURCE",
)
_FOLDER = tempfile.TemporaryDirectory(prefix="q6k-emulator-")

MOST_BLOCKS = (1 << 31) - 1, 65535, 65535

_CONSTANT = re.compile(r"^const (?=\w+ \w+$)")
_BRACE = re.compile(r"^\s*[{}]\s*$", re.MULTILINE)
_REGISTERS = {".pred": "bool"}
_ASM = re.compile(r"\basm\b(?:\s+volatile)?\s*\(")
_DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")
_KERNEL = re.compile(
    r'extern "C" __global__ void\s+(?:(?:__launch_bounds__|__maxnreg__)\((?:[^()]|\([^()]*\))*\)\s*)?'
    r"(\w+)\s*\(([^)]*)\)"
)


class EmulationError(RuntimeError):
    """Error of a kernel that trapped, or did what a GPU would not allow."""


class Kernel:
    """A kernel that runs on the CPU.

    Attributes:
        name: name of the kernel.
        order: 0 runs threads in the order of their numbers; other values shuffle them. With odd values
            asynchronous copies arrive at once, with even values when they are waited for.
        launches: grids that it was launched with.
    """

    def __init__(self, library: Path, name: str) -> None:
        self.name, self.order = name, 0
        self.launches: list[tuple[int, int, int]] = []
        self._run = getattr(ctypes.CDLL(str(library)), f"run_{name}")
        self._run.restype = ctypes.c_char_p

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: bytes,
        *,
        stream: int = 0,
        shared_bytes: int = 0,
        cluster: int = 1,
        dependent: bool = False,
        cooperative: bool = False,
    ) -> None:
        """Run a grid to its end, with `cooperative` all its blocks side by side.

        Raises:
            EmulationError: the kernel trapped, or did what a GPU would not allow.
        """
        assert all(0 < size <= most for size, most in zip(grid, MOST_BLOCKS, strict=True)), grid
        assert 0 < threads <= 1024
        self.launches.append(grid)
        failure = self._run(
            (ctypes.c_uint32 * 3)(*grid),
            ctypes.c_uint32(threads),
            arguments,
            ctypes.c_size_t(len(arguments)),
            ctypes.c_size_t(shared_bytes),
            ctypes.c_uint32(cluster),
            ctypes.c_uint32(cooperative),
            ctypes.c_uint32(self.order),
        )
        if failure is not None:
            raise EmulationError(f"{self.name}: {failure.decode()}")

    def most_blocks(self, threads: int, shared_bytes: int) -> int:
        """Return 1: a multiprocessor has one block at a time."""
        return 1


@cache
def load(file: str, kernel: str, defines: tuple[tuple[str, int], ...], device: int = 0) -> Kernel:
    """Return a kernel like `q6k_kernels.jit.loader.load`; `device` is ignored."""
    return load_text("".join((SOURCES / name).read_text() for name in compiler.files_of(file)), kernel, defines)


@cache
def load_text(source: str, kernel: str, defines: tuple[tuple[str, int], ...] = ()) -> Kernel:
    """Return a kernel from CUDA C++ that includes nothing."""
    return Kernel(_library(source, defines), kernel)


@cache
def _library(source: str, defines: tuple[tuple[str, int], ...]) -> Path:
    source = _preprocessed(source, defines)
    launchers = "".join(_launcher(name, parameters) for name, parameters in _KERNEL.findall(source))
    text = f'#include "instructions.h"\n{translate(source)}\n{launchers}'
    stem = Path(_FOLDER.name) / hashlib.sha256(text.encode()).hexdigest()[:16]
    stem.with_suffix(".cpp").write_text(text)
    _compile(
        "-shared", f"-I{_header()}", f"-I{HERE}", "-o", f"{stem}.so", f"{stem}.cpp", f"{_FOLDER.name}/emulator.o"
    )
    return stem.with_suffix(".so")


def _preprocessed(source: str, defines: tuple[tuple[str, int], ...]) -> str:
    """Return CUDA C++ without its macros, of which instructions in asm statements may be made."""
    assert COMPILER is not None
    macros = [f"-D{name}={value}" for name, value in (*defines, ("__CUDA_ARCH__", 900))]
    command = [COMPILER, "-E", "-P", "-w", "-x", "c++", *macros, "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return done.stdout


@cache
def _header() -> Path:
    """Return a folder with the precompiled header and what runs threads; compiling them takes most of the time."""
    _compile("-x", "c++-header", "-o", f"{_FOLDER.name}/instructions.h.gch", f"{HERE}/instructions.h")
    _compile("-c", "-o", f"{_FOLDER.name}/emulator.o", f"{HERE}/emulator.cpp")
    return Path(_FOLDER.name)


def _compile(*options: str) -> None:
    assert COMPILER is not None
    result = subprocess.run([COMPILER, *_FLAGS, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:4000]


def _launcher(kernel: str, parameters: str) -> str:
    """Return C++ that calls a kernel with a packed buffer of arguments."""
    members = [_CONSTANT.sub("", parameter.strip()) for parameter in parameters.split(",")]
    names = [re.findall(r"\w+", member)[-1] for member in members]
    return f"""
struct Arguments_{kernel} {{ {"; ".join(members)}; }};
extern "C" __attribute__((visibility("default"))) const char* run_{kernel}(
    const uint32_t* grid, uint32_t threads, const void* arguments, size_t bytes, size_t shared_bytes,
    uint32_t cluster, uint32_t cooperative, uint32_t order) {{
  Arguments_{kernel} a;
  const size_t end = offsetof(Arguments_{kernel}, {names[-1]}) + sizeof a.{names[-1]};
  if (bytes != end) return "arguments of a wrong size";
  memcpy(static_cast<void*>(&a), arguments, bytes);
  return emulator::run(grid, threads, shared_bytes, cluster, cooperative, order, [&] {{
    {kernel}({", ".join(f"a.{name}" for name in names)});
  }});
}}
"""


def translate(source: str) -> str:
    """Translate CUDA C++ without #include to C++ on `instructions.h`."""
    source = _DYNAMIC_SHARED.sub(r"\1* const \2 = reinterpret_cast<\1*>(emulator::current->block->shared);", source)
    parts, at = [], 0
    while found := _ASM.search(source, at):
        end = _closing(source, found.end())
        parts += [source[at : found.start()], _calls(source[found.end() : end])]
        at = end + 1
        assert source[at] == ";", source[found.start() : at + 20]
        at += 1
    return "".join([*parts, source[at:]])


def _closing(text: str, at: int) -> int:
    """Return where the parenthesis that opens before `at` closes, skipping those in strings."""
    depth = 1
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', text[at:]):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0:
            return at + token.start()
    raise AssertionError("an asm statement does not end")


def _calls(statement: str) -> str:
    """Translate the inside of asm(...) to calls, with operands in the order in which the instruction names them."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|::|:|[^":]+', statement)
    sections: list[list[str]] = [[]]
    for token in tokens:
        if token in (":", "::"):
            sections += [[] for _ in token]
        elif token.strip():
            sections[-1].append(token.strip())
    template = "".join(token[1:-1] for token in sections[0]).replace("\\n", "\n")
    template = _BRACE.sub("", template)  # of the scope of registers, which is the statement's
    operands = [operand for section in sections[1:3] for operand in _operands(section)]
    calls = []
    for instruction in filter(None, (line.strip() for line in template.split(";"))):
        mnemonic, _, rest = instruction.partition(" ")
        if mnemonic == ".reg":
            calls.append(f"{_REGISTERS[rest.split()[0]]} {rest.split(maxsplit=1)[1]};")
            continue
        arguments = [part for part in re.split(r"[\s,{}\[\]]+", rest) if part]
        values = [_value(argument, operands) for argument in arguments]
        calls.append(f"{re.sub(r'[.:]+', '_', mnemonic)}({', '.join(values)});")
    return "{ " + " ".join(calls) + " }"


def _value(argument: str, operands: list[str]) -> str:
    if argument == "_":
        return "emulated_sink"
    if argument.startswith("%%"):  # a special register
        return f"emulated_{argument[2:]}()"
    return f"({operands[int(argument[1:])]})" if argument.startswith("%") else argument


def _operands(section: list[str]) -> list[str]:
    """Return the expression in parentheses after each constraint."""
    text = "".join(section)
    found, at = [], 0
    while start := re.compile(r'\s*,?\s*"[^"]*"\s*\(').match(text, at):
        end = _closing(text, start.end())
        found.append(text[start.end() : end])
        at = end + 1
    assert not text[at:].strip(), text
    return found
