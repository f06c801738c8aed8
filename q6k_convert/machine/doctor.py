"""Check what this machine needs to run kernels.

Each probe catches its own errors, so a broken machine gets a report and not a traceback. Only the last
probe, the self-test of the kernels, uses memory of a GPU.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from q6k_convert import text
from q6k_kernels.errors import CudaError, DriverMissingError, GpuMissingError
from q6k_kernels.jit import compiler, cubin_cache, driver

OLDEST_TORCH = (2, 11)
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
OLDEST_TRANSFORMERS = (5, 17)
_GET_TORCH = "Install torch for CUDA: `pip install torch`."
_REPLACE_TORCH = (
    "pip keeps it unless it is removed first: `pip uninstall -y torch`, then `pip install torch`, from PyPI and "
    "not from an index of builds for the CPU (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL)."
)
_DRIVERS = {12: 525, 13: 580}
"""Major version of CUDA -> the oldest release of NVIDIA's driver that runs it."""
_LIKELY = "Run where `nvidia-smi` lists a GPU; in a container, start it with access to GPUs (`--gpus all`)."
_ANY_ARCHITECTURE = "sm_80"
"""Architecture that the compiler is tried with where no supported GPU is found."""
_PROBE = 'extern "C" __global__ void probe(int* p) { *p = 1; }'


@dataclass(frozen=True)
class Finding:
    """Result of one probe.

    Attributes:
        name: part of the machine that was checked.
        state: "ok", "missing", "broken", or "skipped" because something else is missing.
        detail: what was found, or what is wrong.
        remedy: how to repair it, if something is wrong.
        needed: whether kernels need this part to run.
        facts: the same details as data, for `--json`.
    """

    name: str
    state: Literal["ok", "missing", "broken", "skipped"]
    detail: str
    remedy: str = ""
    needed: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Known:
    """Results that later probes need of earlier ones; None if not found."""

    torch_cuda: tuple[int, int] | None = None
    driver_cuda: tuple[int, int] | None = None
    gpus: int = 0
    architectures: list[str] = field(default_factory=list)


def examine() -> dict[str, Any]:
    """Run all probes and return the document for `--json`: `status` ("ok" or "not ready") and `findings`."""
    known = _Known()
    findings = [finding for probe in _PROBES for finding in _guarded(probe, known)]
    if all(finding.state == "ok" for finding in findings if finding.needed):
        findings += [finding for gpu in range(known.gpus) for finding in _guarded(_self_test, gpu)]
    else:
        findings.append(Finding("kernels", "skipped", "not tested, because something they need is missing"))
    ready = all(finding.state == "ok" for finding in findings if finding.needed)
    return {"status": "ok" if ready else "not ready", "findings": [asdict(finding) for finding in findings]}


def _guarded(probe: Callable[[Any], Iterator[Finding]], known: Any) -> list[Finding]:
    findings: list[Finding] = []
    try:
        findings.extend(probe(known))
    except CudaError as error:
        state: Literal["missing", "broken"] = "missing" if isinstance(error, DriverMissingError) else "broken"
        findings.append(Finding(_name(probe, known), state, error.cause, error.remedy))
    except Exception as error:
        findings.append(
            Finding(
                _name(probe, known),
                "broken",
                f"looking at it failed: {type(error).__name__}: {error}",
                "This may be a bug in q6k-convert: report it with what `q6k-convert doctor --json` prints.",
            )
        )
    return findings


def _name(probe: Callable[[Any], Iterator[Finding]], known: Any) -> str:
    if probe is _self_test:
        return f"kernels, GPU {known}"
    return "GPU" if probe is _gpus else probe.__name__.strip("_")


def _python(_: _Known) -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding(
        "python", "ok", f"{version}, {sys.executable}", facts={"version": version, "executable": sys.executable}
    )


def _torch(known: _Known) -> Iterator[Finding]:
    try:
        import torch
    except ModuleNotFoundError as error:
        absent = "not installed" if error.name == "torch" else f"installed without {error.name}"
        yield Finding("torch", "missing", absent, _GET_TORCH)
        return
    except (ImportError, OSError) as error:  # a shared library is missing or of the wrong kind
        yield Finding("torch", "broken", f"does not load: {error}", "Install it again: `pip install torch`.")
        return
    version, cuda = str(torch.__version__), torch.version.cuda
    facts = {"version": version, "cuda": cuda}
    if _major_minor(version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        yield Finding(
            "torch",
            "broken",
            f"{version}, needed is {oldest} or later",
            "Update it: `pip install --upgrade torch`.",
            facts=facts,
        )
    elif cuda is None:
        yield Finding("torch", "missing", f"{version}, built without CUDA", _REPLACE_TORCH, facts=facts)
    else:
        known.torch_cuda = _major_minor(cuda)
        yield Finding("torch", "ok", f"{version}, built for CUDA {cuda}", facts=facts)


def _driver(known: _Known) -> Iterator[Finding]:
    driver.bindings()  # if these are missing, a driver would not help
    needs = known.torch_cuda[0] if known.torch_cuda else min(_DRIVERS)
    release_needed = f"{_DRIVERS[needs]} or later" if needs in _DRIVERS else f"that supports CUDA {needs}"
    try:
        version = known.driver_cuda = driver.version()
    except DriverMissingError as error:
        remedy = f"Install NVIDIA's driver {release_needed}; `nvidia-smi` shows which one is there."
        yield Finding("driver", "missing", error.cause, remedy)
        return
    release = _release()
    facts = {"version": release, "cuda": _dotted(version)}
    detail = f"{release + ', ' if release else ''}supports CUDA {_dotted(version)}"
    if known.torch_cuda is not None and version[0] < known.torch_cuda[0]:
        yield Finding(
            "driver",
            "broken",
            f"{detail}, and torch is built for CUDA {_dotted(known.torch_cuda)}",
            f"Update the driver to {release_needed}, or install a torch built for CUDA {version[0]}.",
            facts=facts,
        )
    else:
        yield Finding("driver", "ok", detail, facts=facts)


def _gpus(known: _Known) -> Iterator[Finding]:
    if known.driver_cuda is None:
        yield Finding("GPU", "missing", "none found, as there is no driver that works", _LIKELY)
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    narrowed = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
    try:
        known.gpus = driver.device_count()
    except GpuMissingError:
        known.gpus = 0
    if known.gpus == 0:
        yield Finding("GPU", "missing", f"the driver lists none{narrowed}", _LIKELY)
        return
    for gpu in range(known.gpus):
        major, minor = driver.capability(gpu)
        memory = driver.device_memory(gpu)
        units = driver.device_attribute(gpu, "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT")
        facts = {
            "name": driver.device_name(gpu),
            "capability": f"{major}.{minor}",
            "bytes": memory,
            "multiprocessors": units,
        }
        detail = f"{facts['name']}, compute capability {major}.{minor}, {text.size(memory)}, {units} SMs"
        try:
            known.architectures.append(compiler.architecture((major, minor)))
            yield Finding(f"GPU {gpu}", "ok", detail, facts=facts)
        except CudaError as error:
            yield Finding(f"GPU {gpu}", "broken", f"{detail}: {error.cause}", error.remedy, facts=facts)
    yield from _torch_sees(known)


def _torch_sees(known: _Known) -> Iterator[Finding]:
    if known.torch_cuda is None:
        return
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen != known.gpus:
        yield Finding(
            "GPU",
            "broken",
            f"the driver lists {known.gpus}, torch sees {seen}",
            '`python -c "import torch; torch.cuda.init()"` says why.',
        )


def _compiler(known: _Known) -> Iterator[Finding]:
    try:
        version = compiler.version()
    except CudaError as error:
        yield Finding("compiler", "missing", error.cause, error.remedy)
        return
    path = str(compiler.library_path())
    facts = {"version": _dotted(version), "path": path}
    detail = f"NVRTC {_dotted(version)}, {path}"
    for architecture in dict.fromkeys(known.architectures or [_ANY_ARCHITECTURE]):
        compiler.compile_cubin(_PROBE, "probe.cu", compiler.options((), architecture))
    if known.driver_cuda is not None and version[0] > known.driver_cuda[0]:
        yield Finding(
            "compiler",
            "broken",
            f"{detail}: it is newer than the driver, which supports CUDA {_dotted(known.driver_cuda)}",
            "Update the driver, or install a torch built for its CUDA version and remove this NVRTC.",
            facts=facts,
        )
    else:
        yield Finding("compiler", "ok", detail, facts=facts)


def _cache(_: _Known) -> Iterator[Finding]:
    remedy = f"Set {cubin_cache.VARIABLE} to a directory that you can write to; until then every process compiles."
    try:
        directory = cubin_cache.directory()
        cubin_cache.probe()
        held = cubin_cache.contents()
    except (OSError, RuntimeError) as error:
        yield Finding("cache", "broken", f"cannot be used: {error}", remedy, needed=False)
        return
    facts = {"path": str(directory), "writable": True, "entries": held.entries, "bytes": held.bytes}
    detail = f"{directory}, {held.entries} compiled, {text.size(held.bytes)}"
    yield Finding("cache", "ok", detail, needed=False, facts=facts)


def _transformers(_: _Known) -> Iterator[Finding]:
    remedy = "For whole models (`generate`, `export`, `load_model`): `pip install 'q6k-convert[inference]'`."
    try:
        found = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        yield Finding("transformers", "missing", "not installed", remedy, needed=False)
        return
    if _major_minor(found) < OLDEST_TRANSFORMERS:
        detail = f"{found}, needed is {_dotted(OLDEST_TRANSFORMERS)} or later"
        yield Finding("transformers", "broken", detail, remedy, needed=False)
    else:
        yield Finding("transformers", "ok", found, needed=False, facts={"version": found})


def _build_tools(_: _Known) -> Iterator[Finding]:
    """Look for what builds C++; the commands that build check the versions."""
    for name, program, remedy in (
        (
            "C++ compiler",
            os.environ.get("CXX", "g++"),
            "For `export` and `build-ops`: install g++, or name yours with CXX.",
        ),
        ("cmake", "cmake", "For `build-ops`: `pip install cmake ninja`."),
    ):
        path = shutil.which(program)
        if path is None:
            yield Finding(name, "missing", f"{program} is not on PATH", remedy, needed=False)
        else:
            yield Finding(name, "ok", path, needed=False, facts={"path": path})


def _self_test(gpu: int) -> Iterator[Finding]:
    from q6k_kernels.ops import self_test

    checks = self_test.run(f"cuda:{gpu}")
    facts = {"checks": [asdict(check) for check in checks]}
    wrong = [check for check in checks if not check.passed]
    if wrong or not checks:
        first = f"{wrong[0].name}: {wrong[0].detail}" if wrong else "no check was made"
        yield Finding(
            f"kernels, GPU {gpu}",
            "broken",
            f"{len(wrong)} of {len(checks)} checks failed; {first}",
            "This is a bug in q6k_kernels or a faulty GPU: report it with what `q6k-convert doctor --json` prints.",
            facts=facts,
        )
    else:
        yield Finding(f"kernels, GPU {gpu}", "ok", f"{len(checks)} checks against fp64", facts=facts)


_PROBES: tuple[Callable[[_Known], Iterator[Finding]], ...] = (
    *(_python, _torch, _driver, _gpus, _compiler, _cache),
    *(_transformers, _build_tools),
)


def _release() -> str | None:
    """Return the version of the NVIDIA driver, like 580.65.06; None where Linux does not list it."""
    try:
        match = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", _DRIVER_VERSION.read_text(errors="replace"))
    except OSError:
        return None
    return match[1] if match else None


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
