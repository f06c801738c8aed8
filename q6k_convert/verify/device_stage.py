"""Check that a device computes correctly with a bundle's weights.

Every planar tensor is multiplied with random activations, as in decode and in prefill. The results are compared
with the fp64 statement of the formulas within a derived tolerance. `device_runs` does this for one matrix, with the
reference on the CPU or the kernels on a GPU. It imports torch, so it is imported only when needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from q6k_convert import text
from q6k_convert.errors import EnvironmentMissingError
from q6k_kernels.bundle.manifest import Manifest
from q6k_kernels.bundle.structure import Finding, read_header
from q6k_kernels.errors import CudaError, DriverMissingError, GpuMissingError
from q6k_kernels.jit import compiler, driver

MOST_EXPERTS = 4
"""Most experts of a stack to check: the first, the last and two in between."""

NO_TORCH = "torch is not installed"
NO_GPU = "no CUDA GPU was found"
_TRY_CPU = "--device cpu runs the reference"


@dataclass(frozen=True)
class DeviceRun:
    """Product of one matrix with `m` rows of activations.

    Attributes:
        m: rows of activations.
        activations: formula, "int8" or "bf16".
        worst_error_in_tolerances: largest error of all outputs; infinite for an unexpected NaN or infinity.
        passed: whether that error is at most 1.
        seconds: time of multiplying without reading and checking; on a GPU the time of one call from Python.
        gb_per_s: packed bytes read in that time, in 10**9 bytes per second; None on the CPU.
        first_bad: first wrong output: its coordinates, its value and the expected one.
    """

    m: int
    activations: str
    worst_error_in_tolerances: float
    passed: bool
    seconds: float
    gb_per_s: float | None
    first_bad: str | None


@dataclass(frozen=True)
class DeviceReport:
    """Runs on a device and their findings.

    Attributes:
        state: "skipped" if nothing was run.
        device: "cpu", "cuda" or "none".
        detail: one line that says what was run, or why nothing was.
        runs: runs by tensor, or by `tensor[expert]` for a stack; one for each size.
        findings: one for each run that failed and, on a GPU, for each wrong row.
    """

    state: Literal["passed", "failed", "skipped"]
    device: str
    detail: str
    runs: dict[str, list[DeviceRun]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def check_device(
    directory: Path,
    manifest: Manifest,
    device: Literal["auto", "cpu", "cuda"],
    progress: Callable[[int], None],
) -> DeviceReport:
    """Run every planar tensor of a bundle whose structure is sound (see `structure.check_structure`).

    Args:
        directory: directory of the bundle.
        manifest: its manifest.
        device: "cpu" or "cuda" has to run, or an error is raised; "auto" uses a CUDA GPU that is ready, and
            otherwise skips the runs and says what is missing.
        progress: called with the number of packed bytes newly done; in total the bytes of all planar tensors.
            Experts that are left out count as done.

    Raises:
        EnvironmentMissingError: something that `device` needs is missing, or the GPU's memory is exhausted.
        CudaError: the GPU is ready, but a kernel cannot be compiled or launched.
        ValueError: a shard's header breaks a rule of the format.
        OSError: a shard cannot be read, or is shorter than its header says.
    """
    if device == "cpu":
        if (problem := _torch_problem()) is not None:
            raise EnvironmentMissingError(
                f"--device cpu runs the reference in torch, and {problem}", "Install it: `pip install torch`."
            )
        return _run(directory, manifest, progress, "cpu")
    missing = missing_for_cuda()
    if missing is None:
        return _run(directory, manifest, progress, "cuda")
    if device == "cuda":
        remedy = f"{missing.remedy} {_TRY_CPU}; --device auto skips the check on a GPU."
        raise EnvironmentMissingError(f"--device cuda cannot run: {missing.what}", remedy)
    return DeviceReport("skipped", "none", f"{missing.what}; {_TRY_CPU}")


@dataclass(frozen=True)
class Missing:
    """Something missing for runs on a GPU, and a sentence that says how to get it."""

    what: str
    remedy: str


def missing_for_cuda() -> Missing | None:
    """Return the first thing missing for runs on a GPU; import torch (seconds) only if there is a GPU."""
    likely = "Run it where `nvidia-smi` lists a GPU."
    try:
        if driver.device_count() == 0:
            return Missing(NO_GPU, likely)
    except GpuMissingError:
        return Missing(NO_GPU, likely)
    except DriverMissingError as error:
        return Missing(f"{NO_GPU}: {error.cause}", error.remedy)
    except CudaError as error:
        return Missing(f"the GPU's driver does not work: {error.cause}", error.remedy)
    for_cuda = "Install torch for CUDA: `pip install torch`."
    if (problem := _torch_problem()) is not None:
        return Missing(problem, for_cuda)
    import torch

    if torch.version.cuda is None:
        return Missing(f"torch {torch.__version__} is built without CUDA", for_cuda)
    if not torch.cuda.is_available():
        return Missing(
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use the GPU",
            '`python -c "import torch; torch.cuda.init()"` says why.',
        )
    try:
        compiler.architecture(torch.cuda.get_device_capability())
        compiler.version()
    except CudaError as error:
        return Missing(error.cause, error.remedy)
    return None


def _torch_problem() -> str | None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        return NO_TORCH if error.name == "torch" else f"torch is installed without {error.name}"
    except (ImportError, OSError) as error:  # a shared library is missing or of the wrong kind
        return f"torch is installed but does not load: {error}"
    return None


def _run(
    directory: Path, manifest: Manifest, progress: Callable[[int], None], device: Literal["cpu", "cuda"]
) -> DeviceReport:
    import torch

    from q6k_convert.verify import device_runs

    run_matrix = device_runs.run_on_cpu if device == "cpu" else device_runs.run_on_gpu
    tensors = [tensor for tensor in manifest.tensors if tensor.storage == "planar"]
    if not tensors:
        return DeviceReport("skipped", "none", "the bundle has no planar tensors")
    files = sorted({array.file for tensor in tensors for array in tensor.arrays.values()})
    headers = {name: read_header(directory / name) for name in files}
    runs, findings, sampled = dict[str, list[DeviceRun]](), list[Finding](), list[str]()
    for tensor in tensors:
        *stack, n, _ = tensor.shape
        count = math.prod(stack)
        experts = sample(count)
        if len(experts) < count:
            sampled.append(f"{tensor.name}: experts {', '.join(map(str, experts))} of {count}")
        rows = device_runs.Rows(directory, headers, tensor)
        for expert in experts:
            label = f"{tensor.name}[{expert}]" if stack else tensor.name
            try:
                tallies, problems = run_matrix(rows, expert * n, n, progress)
            except torch.OutOfMemoryError as error:
                raise _no_memory(label, n * rows.bytes_a_row) from error
            runs[label] = [
                DeviceRun(t.m, t.formula, t.worst, t.worst <= 1, t.seconds, t.gb_per_s, t.first_bad)
                for t in tallies
            ]
            problems = [_problem(run) for run in runs[label] if not run.passed] + problems
            where = f"expert {expert}, " if stack else ""
            shard = next(iter(tensor.arrays.values())).file
            findings += [Finding(f"{where}{each}", shard, tensor.name) for each in problems]
        progress((count - len(experts)) * n * rows.bytes_a_row)
    settings = [f"M={m} with {activations} activations" for m, activations in device_runs.SIZES[device]]
    what = "the reference on the CPU" if device == "cpu" else f"kernels on one {torch.cuda.get_device_name()}"
    detail = f"torch {torch.__version__}, {what}: {len(runs)} matrices at "
    detail += f"{', '.join(settings[:-1])} and {settings[-1]}" + "".join(f"; {line}" for line in sampled)
    return DeviceReport("failed" if findings else "passed", device, detail, runs, findings)


def _no_memory(label: str, packed: int) -> EnvironmentMissingError:
    """Return the error for a matrix of `packed` bytes that does not fit."""
    return EnvironmentMissingError(
        f"the GPU's memory does not suffice to check {label}: its planes take {packed} bytes "
        f"({text.size(packed)}), its tiles as much, and the fp64 to compare with about 700 MB",
        f"End what else uses the GPU, as `nvidia-smi` lists it, or take a larger one; {_TRY_CPU}.",
    )


def sample(count: int) -> list[int]:
    """Return which matrices of a stack to check: all, or `MOST_EXPERTS` evenly spread with both ends."""
    if count <= MOST_EXPERTS:
        return list(range(count))
    return [round(i * (count - 1) / (MOST_EXPERTS - 1)) for i in range(MOST_EXPERTS)]


def _problem(run: DeviceRun) -> str:
    return (
        f"M={run.m} with {run.activations} activations: {run.first_bad}; "
        f"the worst output is off by {run.worst_error_in_tolerances:.3g} times the tolerance"
    )
