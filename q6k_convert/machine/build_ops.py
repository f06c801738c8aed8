"""Building the C++ library of the operations: the tools it takes, and CMake.

In DIR it leaves `libq6k_ops.so` and `build/`, which is CMake's: building again compiles only what has changed, and
`build/build.log` has all that was printed.
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
from q6k_convert.machine import built_kernels
from q6k_convert.machine.doctor import OLDEST_TORCH
from q6k_kernels.errors import GpuTooOldError
from q6k_kernels.jit import compiler, cubin_cache

LIBRARY = "libq6k_ops.so"
OLDEST_CMAKE = (3, 20)
NOTE_SECONDS = 5.0
"""Between two lines of progress."""
_STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)|%)\]\s*(.*)")
_SOURCE = Path(compiler.__file__).parents[1] / "cpp"
Note = Callable[[str], None]


@dataclass(frozen=True)
class Tools:
    """What a build takes.

    Attributes:
        cmake: the program.
        nvcc: the program.
        nvcc_release: (13, 0), say.
        generator: which of CMake's.
        torch: its version.
    """

    cmake: str
    nvcc: str
    nvcc_release: tuple[int, int]
    generator: str
    torch: str


def build(
    out: Path | None, architectures: Sequence[int], jobs: int | None, note: Note, only: str = ""
) -> dict[str, Any]:
    """Builds the library.

    Args:
        out: its folder; by default `ops` in the cache of kernels.
        architectures: compute capabilities to compile kernels for; all that tests are made for if there is none.
        jobs: compilers at a time; as many as processors by default.
        note: told what happens, line by line.
        only: for tests, a regular expression of the units to build in, whose names are as `units.name_of` has them.

    Returns:
        For `--json`: `library`, its path, `bytes`, `architectures`, `nvcc`, `torch`, `seconds`, and `kernels`, what
        each takes.

    Raises:
        UsageError: an architecture is none that kernels run on.
        EnvironmentMissingError: a tool is missing or too old, or the build fails.
        OSError: the folder cannot be written to.
    """
    started = time.monotonic()
    for arch in architectures:
        try:
            compiler.architecture(divmod(arch, 10))
        except GpuTooOldError as error:
            raise UsageError(
                f"--arch {arch}: expected a compute capability of 80 or later, as 90 for 9.0", "`--arch 90`, say."
            ) from error
    tools = find_tools()
    chosen = tuple(dict.fromkeys(architectures)) or _all_architectures()
    _expect_architectures(tools, chosen)
    folder = (out if out is not None else cubin_cache.directory() / "ops").resolve()
    work = folder / "build"
    work.mkdir(parents=True, exist_ok=True)
    release = ".".join(map(str, tools.nvcc_release))
    targets = ", ".join(compiler.architecture(divmod(arch, 10)) for arch in chosen)
    note(f"building {folder / LIBRARY} for {targets}, with nvcc {release} and torch {tools.torch}")
    with (work / "build.log").open("w", encoding="utf-8") as log:
        _configure(tools, work, chosen, only, note, log.write)
        _compile(tools, work, jobs, note, log.write)
    rows = built_kernels.rows(work / "generated")
    for line in built_kernels.table(rows):
        note(line)
    library = _install(work / LIBRARY, folder / LIBRARY)
    _expect_loads(library, chosen)
    seconds = time.monotonic() - started
    size = library.stat().st_size
    note(f"{text.plural(len(rows), 'kernel')}, none spills; {text.size(size)}, {text.seconds(seconds)}")
    return {
        "status": "done",
        "library": str(library),
        "bytes": size,
        "architectures": list(chosen),
        "nvcc": release,
        "torch": tools.torch,
        "seconds": seconds,
        "kernels": rows,
    }


def find_tools() -> Tools:
    """cmake, nvcc and torch.

    Raises:
        EnvironmentMissingError: one is missing, or too old.
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
    places = [Path(root) / "bin" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    nvcc = shutil.which("nvcc") or next((str(each / "nvcc") for each in places if (each / "nvcc").is_file()), None)
    if nvcc is None:
        raise EnvironmentMissingError(
            "nvcc is not on PATH, nor in $CUDA_HOME/bin or /usr/local/cuda/bin",
            "Install NVIDIA's CUDA toolkit, no newer than the driver where the library shall run.",
        )
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise EnvironmentMissingError(
            f"the C++ compiler {os.environ.get('CXX', 'c++')} is not on PATH", "Install g++ or clang++, or set CXX."
        )
    generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
    return Tools(cmake, nvcc, _version(nvcc, r"release (\d+)\.(\d+)"), generator, _torch())


def _torch() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise EnvironmentMissingError(
            f"torch does not load, whose headers the library needs: {error}", "Install it: `pip install torch`."
        ) from error
    version = str(torch.__version__)
    major, minor = re.findall(r"\d+", version)[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise EnvironmentMissingError(
            f"torch is {version}, needed is {oldest} or later", "Install a newer one: `pip install torch`."
        )
    return version


def _all_architectures() -> tuple[int, ...]:
    from q6k_kernels.cpp.variants import ARCHITECTURES

    return ARCHITECTURES


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


def _expect_architectures(tools: Tools, wanted: Sequence[int]) -> None:
    command = [tools.nvcc, "--list-gpu-code"]
    known = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()  # noqa: S603
    targets = [compiler.architecture(divmod(arch, 10)) for arch in wanted]
    unknown = [target for target in targets if target.rstrip("a") not in known]
    if known and unknown:
        raise EnvironmentMissingError(
            f"{tools.nvcc} {'.'.join(map(str, tools.nvcc_release))} does not know {', '.join(unknown)}; it knows "
            + ", ".join(known),
            "Install a CUDA toolkit that supports this GPU, or leave it out: `--arch` for each one wanted.",
        )


def _configure(
    tools: Tools, work: Path, architectures: Sequence[int], only: str, note: Note, log: Callable[[str], object]
) -> None:
    # Options of an earlier build must not stay; what it compiled does.
    (work / "CMakeCache.txt").unlink(missing_ok=True)
    shutil.rmtree(work / "CMakeFiles", ignore_errors=True)
    command = [
        *(tools.cmake, "-S", str(_SOURCE), "-B", str(work), "-G", tools.generator),
        f"-DQ6K_ARCHITECTURES={';'.join(map(str, architectures))}",
        f"-DQ6K_VERSION={__version__}",
        f"-DNVCC={tools.nvcc}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DQ6K_ONLY={only}",
    ]
    _run(command, work, log, lambda line: note(line[3:]) if "units to compile" in line else None)


def _compile(tools: Tools, work: Path, jobs: int | None, note: Note, log: Callable[[str], object]) -> None:
    started = last = time.monotonic()

    def step(line: str) -> None:
        nonlocal last
        match, now = _STEP.match(line), time.monotonic()
        if match is None or now - last < NOTE_SECONDS:
            return
        last = now
        share = int(match[1]) / int(match[2] or 100)
        left = (now - started) * (1 - share) / share if share else 0.0
        note(f"{100 * share:.0f}%: {match[3]}, {text.seconds(left)} left")

    _run([tools.cmake, "--build", str(work), "--parallel", str(jobs or _processors())], work, log, step)


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _run(command: list[str], work: Path, log: Callable[[str], object], line_by_line: Note) -> None:
    """Runs a program, its output into the log, line by line; interrupted, it ends all that it started."""
    last = deque[str](maxlen=200)
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
                last.append(line.rstrip())
                line_by_line(line.rstrip())
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode:
        told = [line for line in last if line] or ["no message"]
        first = next((line for line in told if "error" in line.lower()), told[-1])
        raise EnvironmentMissingError(
            f"{Path(command[0]).name} ended with code {process.returncode}: {first}",
            f"{work / 'build.log'} has all of it.",
        )


def _install(made: Path, library: Path) -> Path:
    """Puts the library in its place in one step: a process that has the old one loaded keeps it whole."""
    temporary = library.with_suffix(".tmp")
    shutil.copy2(made, temporary)
    return temporary.replace(library)


def _expect_loads(library: Path, architectures: Sequence[int]) -> None:
    """In a process of its own, so that this one's operations stay as they are."""
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
