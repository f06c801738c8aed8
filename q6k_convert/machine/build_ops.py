"""Build the C++ library of the operations: its kernels with NVRTC, the rest with CMake and a C++ compiler.

The output directory then holds `libq6k_ops.so` and CMake's folder `build/`. Another build compiles only what has
changed, because compiled kernels stay in the kernel cache. `build/build.log` holds the output of CMake and the
compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q6k_convert import __version__, text
from q6k_convert.errors import EnvironmentMissingError, UsageError
from q6k_convert.machine.doctor import OLDEST_TORCH
from q6k_kernels.errors import CompileFailedError, GpuTooOldError
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType, weight_type
from q6k_kernels.jit import compiler, cubin_cache

LIBRARY = "libq6k_ops.so"
OLDEST_CMAKE = (3, 20)
NOTE_SECONDS = 5.0
"""Least time between two lines of progress, in seconds."""
SHOWN_LINES = 12
"""Most lines to show of what CMake or the compiler prints when it fails."""
_STEP = re.compile(r"^\[[\s\d/%]+\]")
# Must not match the command line, which may hold -Werror.
_FAULT = re.compile(r"(^|\s)(fatal )?error:|CMake Error|undefined reference|cannot find -l|\*\*\* ")
_SOURCE = Path(compiler.__file__).parents[1] / "cpp"
Note = Callable[[str], None]


@dataclass(frozen=True)
class Tools:
    """Tools that a build needs.

    Attributes:
        nvrtc: version of NVRTC, the kernels' compiler, like "13.0".
        torch: version of torch.
        cmake: path of cmake.
        generator: CMake's generator, "Ninja" or "Unix Makefiles".
    """

    nvrtc: str
    torch: str
    cmake: str
    generator: str


def build(
    out: Path | None,
    architectures: Sequence[int],
    jobs: int | None,
    note: Note,
    only: str = "",
    formats: Sequence[str] = (),
) -> dict[str, Any]:
    """Build the library.

    Args:
        out: directory of the library; by default `ops` in the kernel cache.
        architectures: compute capabilities to compile kernels for, as 90 for 9.0; by default all supported ones.
        jobs: compilers at a time; by default the number of processors.
        note: called with each line about the progress.
        only: for tests, a regular expression that selects units by the names that `units.name_of` gives them.
        formats: weight types to compile kernels for; by default all.

    Returns:
        The document for `--json`: `library` (its path), `bytes`, `architectures`, `formats`, `nvrtc`, `torch`,
        `seconds`, and `kernels` (the resources of each kernel).

    Raises:
        UsageError: kernels do not run on a given architecture, or there is no such weight type.
        EnvironmentMissingError: a tool is missing or too old, or the build fails.
        CompilerMissingError: NVRTC is missing, or does not know an architecture.
        CompileFailedError: a kernel does not compile, or spills.
        OSError: the directory cannot be written to.
    """
    started = time.monotonic()
    for arch in architectures:
        try:
            compiler.architecture(divmod(arch, 10))
        except GpuTooOldError as error:
            raise UsageError(
                f"--arch {arch}: expected a compute capability of 80 or later, as 90 for 9.0",
                "Give `--arch 90`, for example.",
            ) from error
    rows = _weight_types(formats)
    tools = find_tools()
    from q6k_kernels.cpp import cubins, generate, units  # they import torch

    wanted = units.of_library(tuple(dict.fromkeys(architectures)), only, rows)
    chosen = list(dict.fromkeys(arch for arch, _, _ in wanted))
    if out is None:
        cubin_cache.make_private(cubin_cache.directory())
    folder = (out if out is not None else cubin_cache.directory() / "ops").resolve()
    work = folder / "build"
    work.mkdir(parents=True, exist_ok=True)
    targets = ", ".join(compiler.architecture(divmod(arch, 10)) for arch in chosen)
    names = ", ".join(row.name for row in rows)
    note(f"building {folder / LIBRARY} of {names} for {targets}, with NVRTC {tools.nvrtc} and torch {tools.torch}")
    processes = jobs or len(os.sched_getaffinity(0))
    built = []
    for unit in cubins.compile_units(wanted, processes, note):
        if unit.errors:
            raise CompileFailedError(
                unit.errors[0], "This is a bug in q6k_kernels, or NVRTC is too old: report it.", unit.log
            )
        built.append(unit)
    kernels = [row for unit in built for row in unit.rows]
    for line in cubins.table(kernels):
        note(line)
    generate.write(work / "generated", built, __version__)
    with (work / "build.log").open("w", encoding="utf-8") as log:
        _configure(tools, work, note, log.write)
        command = [tools.cmake, "--build", str(work), "--parallel", str(processes)]
        _run(command, work, note, log.write)
    library = _install(work / LIBRARY, folder / LIBRARY)
    _expect_loads(library, chosen)
    seconds = time.monotonic() - started
    size = library.stat().st_size
    note(f"{text.plural(len(kernels), 'kernel')}, none spills; {text.size(size)}, {text.seconds(seconds)}")
    return {
        "status": "done",
        "library": str(library),
        "bytes": size,
        "architectures": chosen,
        "formats": [row.name for row in rows],
        "nvrtc": tools.nvrtc,
        "torch": tools.torch,
        "seconds": seconds,
        "kernels": kernels,
    }


def _weight_types(formats: Sequence[str]) -> list[WeightType]:
    """Return the weight types of those names, or all of them."""
    try:
        return [weight_type(name) for name in dict.fromkeys(formats or WEIGHT_TYPES)]
    except ValueError as error:
        raise UsageError(
            f"--{error}", "Give the name of a weight type, or leave the option out for all."
        ) from error


def find_tools() -> Tools:
    """Find NVRTC, torch, CMake and a C++ compiler.

    Raises:
        EnvironmentMissingError: a tool is missing or too old.
        CompilerMissingError: NVRTC is missing.
    """
    cmake = shutil.which("cmake")
    if cmake is None:
        raise EnvironmentMissingError("cmake is not on PATH", "Install it: `pip install cmake ninja`.")
    found = _version(cmake, r"cmake version (\d+)\.(\d+)")
    if found < OLDEST_CMAKE:
        raise EnvironmentMissingError(
            f"{cmake} is {'.'.join(map(str, found))}, needed is {'.'.join(map(str, OLDEST_CMAKE))} or later",
            "Install a newer one: `pip install cmake ninja`.",
        )
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise EnvironmentMissingError(
            f"the C++ compiler {os.environ.get('CXX', 'c++')} is not on PATH", "Install g++ or clang++, or set CXX."
        )
    generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
    return Tools(".".join(map(str, compiler.version())), _torch(), cmake, generator)


def _torch() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise EnvironmentMissingError(
            f"torch, whose headers the library needs, does not load: {error}", "Install it: `pip install torch`."
        ) from error
    version = str(torch.__version__)
    major, minor = re.findall(r"\d+", version)[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise EnvironmentMissingError(
            f"torch is {version}, needed is {oldest} or later", "Install a newer one: `pip install torch`."
        )
    return version


def _version(program: str, pattern: str) -> tuple[int, int]:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        raise EnvironmentMissingError(f"{program} does not run: {error.strerror}", "Install it again.") from error
    match = re.search(pattern, done.stdout)
    if match is None:
        first = (done.stdout + done.stderr).strip().partition("\n")[0]
        raise EnvironmentMissingError(
            f"{program} --version ended with code {done.returncode} and says no version: {first or 'nothing'}",
            "Install it again.",
        )
    return int(match[1]), int(match[2])


def _configure(tools: Tools, work: Path, note: Note, log: Callable[[str], object]) -> None:
    # Drop the options of an earlier build.
    (work / "CMakeCache.txt").unlink(missing_ok=True)
    shutil.rmtree(work / "CMakeFiles", ignore_errors=True)
    _run([tools.cmake, "-S", str(_SOURCE), "-B", str(work), "-G", tools.generator], work, note, log)


def _run(command: list[str], work: Path, note: Note, log: Callable[[str], object]) -> None:
    """Run a program and log its output. If interrupted, end all processes that it started."""
    told = time.monotonic()
    last, complaint = deque[str](maxlen=SHOWN_LINES), list[str]()
    with subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            for line in process.stdout or ():
                log(line)
                if not line.strip():
                    continue
                last.append(line.rstrip())
                if len(complaint) < SHOWN_LINES and (complaint or _FAULT.search(line)):
                    complaint.append(line.rstrip())
                elif _STEP.match(line) and time.monotonic() - told >= NOTE_SECONDS:
                    told = time.monotonic()
                    note(line.rstrip())
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode:
        shown = complaint or list(last) or ["no message"]
        for line in shown:
            note(line)
        raise EnvironmentMissingError(
            f"{Path(command[0]).name} ended with code {process.returncode}: {shown[0]}",
            f"{work / 'build.log'} has all of it.",
        )


def _install(made: Path, library: Path) -> Path:
    """Replace the library in one step, so that a process which has the old one loaded keeps it intact."""
    temporary = library.with_suffix(".tmp")
    shutil.copy2(made, temporary)
    return temporary.replace(library)


def _expect_loads(library: Path, architectures: Sequence[int]) -> None:
    """Check that the library loads, in another process, so that this one keeps its own operations."""
    program = "import sys; from q6k_kernels.ops.library import load; print(*load(sys.argv[1]).architectures)"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program, str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode or sorted(map(int, done.stdout.split())) != sorted(architectures):
        last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise EnvironmentMissingError(
            f"{library} was built and does not load: {last}",
            "Build it with the torch and on the system that it shall run with.",
        )
