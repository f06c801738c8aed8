"""`q6k-convert doctor`: what it finds on machines of every kind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bundle_helpers import failed, invoke, run_cli
from fake_cuda import FakeCuda
from q6k_convert.machine import doctor
from q6k_kernels.errors import CompilerMissingError
from q6k_kernels.jit import compiler, cubin_cache, driver

torch = pytest.importorskip("torch")

from q6k_kernels.ops import self_test

GPU = "Fake GPU 0, compute capability 9.0, 85.90 GB, 132 SMs"
PASSED = [self_test.Check("pack", True, "fine"), self_test.Check("linear", True, "fine")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cubin_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def machine(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One on which all is well; tests change what they like."""
    fake = ModuleType("torch")
    fake.__dict__.update(
        __version__="2.11.0+cu130",
        version=SimpleNamespace(cuda="13.0"),
        cuda=SimpleNamespace(is_available=lambda: True, device_count=lambda: driver.device_count()),
    )
    release = tmp_path / "version"
    release.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:00:00 UTC 2025\n")
    tested: list[str] = []

    def run(device: str) -> list[self_test.Check]:
        tested.append(device)
        return PASSED

    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(doctor, "_DRIVER_VERSION", release)
    monkeypatch.setattr(self_test, "run", run)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: {"transformers": "5.17.0"}[name])
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/tools/{name}")
    for variable in ("CUDA_VISIBLE_DEVICES", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    return SimpleNamespace(cuda=cuda, torch=fake, tested=tested, release=release)


def examined(code: int) -> dict[str, dict[str, Any]]:
    """Runs the command; its findings by name."""
    result = invoke("doctor", "--json")
    assert result.exit_code == code, result.output
    report = json.loads(result.stdout)
    assert report["status"] == ("ok" if code == 0 else "not ready")
    for finding in report["findings"]:
        assert finding["state"] in ("ok", "missing", "broken", "skipped")
        assert bool(finding["remedy"]) == (finding["state"] in ("missing", "broken")), finding
    return {finding["name"]: finding for finding in report["findings"]}


# A machine on which all is well


def test_all_is_well(machine: SimpleNamespace, cache: Path) -> None:
    machine.cuda.reset(devices=2)
    cubin_cache.fetch("0" * 64, lambda: compiler.Compiled(bytes(40), "x" * 8))
    found = examined(0)
    assert {name: finding["detail"] for name, finding in found.items() if name != "python"} == {
        "torch": "2.11.0+cu130, built for CUDA 13.0",
        "driver": "580.65.06, supports CUDA 13.0",
        "GPU 0": GPU,
        "GPU 1": "Fake GPU 1, compute capability 9.0, 85.90 GB, 133 SMs",
        "compiler": f"NVRTC {'.'.join(map(str, compiler.version()))}, {compiler.library_path()}",
        "cache": f"{cache}, 1 compiled, 100 B",
        "transformers": "5.17.0",
        "C++ compiler": "/tools/g++",
        "cmake": "/tools/cmake",
        "kernels, GPU 0": "2 checks against fp64",
        "kernels, GPU 1": "2 checks against fp64",
    }
    assert all(finding["state"] == "ok" for finding in found.values())
    assert found["python"]["facts"]["executable"] == sys.executable
    assert found["GPU 1"]["facts"] == {
        "name": "Fake GPU 1", "capability": "9.0", "bytes": 80 << 30, "multiprocessors": 133,
    }  # fmt: skip
    assert found["kernels, GPU 0"]["facts"]["checks"] == [asdict(check) for check in PASSED]
    assert machine.tested == ["cuda:0", "cuda:1"]


def test_what_a_person_sees(machine: SimpleNamespace) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert re.search(rf"^GPU 0 +ok +{re.escape(GPU)}", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-1] == "ready to run models on a GPU"


def test_a_driver_that_does_not_tell_its_release(machine: SimpleNamespace) -> None:
    machine.release.unlink()
    assert examined(0)["driver"]["detail"] == "supports CUDA 13.0"


# Machines on which something is not


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch, machine: SimpleNamespace) -> None:
    def absent() -> None:
        raise RuntimeError("libcuda.so.1: no such file")

    monkeypatch.setattr(driver, "bindings", lambda: SimpleNamespace(cuDriverGetVersion=absent))
    result = invoke("doctor")
    failed(result, 6, "driver is missing", "Install NVIDIA's driver 580 or later; `nvidia-smi` shows")
    failed(result, 6, "GPU is missing", "`nvidia-smi` lists a GPU")
    assert result.stdout.splitlines()[-1].startswith("not ready to run models on a GPU")
    found = examined(6)
    assert found["torch"]["state"] == found["compiler"]["state"] == found["cache"]["state"] == "ok"
    assert found["kernels"]["state"] == "skipped"
    assert machine.tested == []


def test_a_process_of_its_own_where_there_is_nothing() -> None:
    # No torch and no bindings, with or without a driver: what a plain `pip install` gives.
    program = (
        "import sys; sys.modules['torch'] = sys.modules['cuda'] = None\n"
        "from q6k_convert.cli.main import main; sys.argv[1:] = ['doctor', '--json']; main()\n"
    )
    done = run_program(program)
    assert done.returncode == 6, done.stderr
    assert "Traceback" not in done.stderr
    found = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert "cuda-bindings" in found["driver"]["detail"]
    assert "pip install cuda-bindings" in found["driver"]["remedy"]
    assert {name: each["state"] for name, each in found.items()} == {
        "python": "ok", "torch": "missing", "driver": "missing", "GPU": "missing", "compiler": "missing",
        "cache": "ok", "kernels": "skipped", **{name: found[name]["state"] for name in NOT_NEEDED},
    }  # fmt: skip


NOT_NEEDED = ("transformers", "C++ compiler", "cmake")


def test_what_only_some_commands_need_is_named_with_them(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", absent)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setenv("CXX", "clang++-19")
    found = examined(0)  # kernels run without them
    assert {name: (found[name]["state"], found[name]["detail"]) for name in NOT_NEEDED} == {
        "transformers": ("missing", "not installed"),
        "C++ compiler": ("missing", "clang++-19 is not on PATH"),
        "cmake": ("missing", "cmake is not on PATH"),
    }
    result = invoke("doctor")
    failed(
        result, 0, "transformers is missing, which kernels run without", "For whole models (`generate`, `export`"
    )
    failed(result, 0, "C++ compiler is missing", "For `export` and `build-ops`: install g++")
    monkeypatch.setattr(doctor.metadata, "version", lambda _: "5.16.2")
    assert examined(0)["transformers"]["detail"] == "5.16.2, needed is 5.17 or later"


def test_the_remedies_name_what_works(machine: SimpleNamespace) -> None:
    machine.torch.__dict__.update(__version__="2.13.0+cpu", version=SimpleNamespace(cuda=None))
    assert "`pip uninstall -y torch`, then `pip install torch`" in examined(6)["torch"]["remedy"]
    machine.torch.__dict__.update(__version__="2.11.0+cu130", version=SimpleNamespace(cuda="13.0"))
    machine.cuda.reset(version=12090)
    remedy = "Update the driver to 580 or later, or install a torch built for CUDA 12."
    assert examined(6)["driver"]["remedy"] == remedy


def test_the_oldest_transformers_is_the_one_that_models_need() -> None:
    from q6k_kernels.models.skeleton import OLDEST_TRANSFORMERS

    assert doctor.OLDEST_TRANSFORMERS == OLDEST_TRANSFORMERS


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_program_starts_without_torch() -> None:
    done = run_cli("doctor", "--help")
    assert done.returncode == 0
    assert "Exit codes" in done.stdout
    program = (
        "import sys, q6k_convert.cli.main, q6k_convert.machine.doctor; "
        "assert not {'torch', 'cuda'} & set(sys.modules)"
    )
    done = run_program(program)
    assert done.returncode == 0, done.stderr


CASES: dict[str, tuple[Any, str, str, str]] = {
    "no torch": (
        lambda m, patch: patch.setitem(sys.modules, "torch", None), "torch", "missing", "not installed",
    ),
    "a torch for CPUs": (
        lambda m, _: m.torch.__dict__.update(__version__="2.13.0+cpu", version=SimpleNamespace(cuda=None)),
        "torch", "missing", "2.13.0+cpu, built without CUDA",
    ),
    "an old torch": (
        lambda m, _: m.torch.__dict__.update(__version__="2.9.1"),
        "torch", "broken", "2.9.1, needed is 2.11 or later",
    ),
    "a torch of a newer CUDA": (
        lambda m, _: m.cuda.reset(version=12090),
        "driver", "broken", "580.65.06, supports CUDA 12.9, and torch is built for CUDA 13.0",
    ),
    "a compiler of a newer CUDA": (
        lambda m, _: (m.cuda.reset(version=12090), m.torch.version.__dict__.update(cuda="12.9")),
        "compiler", "broken", "it is newer than the driver, which supports CUDA 12.9",
    ),
    "an old driver": (
        lambda m, _: m.cuda.reset(version=11080), "driver", "missing", "supports CUDA 11.8, needed is 12.0",
    ),
    "a driver that fails": (
        lambda m, _: m.cuda.fail("cuInit", 1), "GPU", "broken", "cuInit failed: CUDA_ERROR_INVALID_VALUE (1)",
    ),
    "no GPU": (lambda m, _: m.cuda.reset(devices=0), "GPU", "missing", "the driver lists none"),
    "GPUs hidden": (
        lambda m, patch: (m.cuda.reset(devices=0), patch.setenv("CUDA_VISIBLE_DEVICES", "")),
        "GPU", "missing", "the driver lists none with CUDA_VISIBLE_DEVICES=''",
    ),
    "an old GPU": (
        lambda m, _: m.cuda.reset(capability=75),
        "GPU 0", "broken", "compute capability 7.5, the kernels need 8.0",
    ),
    "a torch that sees no GPU": (
        lambda m, _: m.torch.cuda.__dict__.update(is_available=lambda: False),
        "GPU", "broken", "the driver lists 1, torch sees 0",
    ),
    "a compiler that does not compile": (
        lambda m, patch: patch.setattr(doctor, "_PROBE", "nonsense"), "compiler", "broken", "probe.cu(1): error",
    ),
    "a wrong kernel": (
        lambda m, patch: patch.setattr(
            self_test, "run", lambda _: [*PASSED, self_test.Check("linear, M=16", False, "y[0, 3] is 5")]
        ),
        "kernels, GPU 0", "broken", "1 of 3 checks failed; linear, M=16: y[0, 3] is 5",
    ),
    "no check": (
        lambda m, patch: patch.setattr(self_test, "run", lambda _: []),
        "kernels, GPU 0", "broken", "no check was made",
    ),
    "a test that breaks off": (
        lambda m, patch: patch.setattr(self_test, "run", lambda _: 1 / 0),
        "kernels, GPU 0", "broken", "looking at it failed: ZeroDivisionError",
    ),
    "a compiler that does not know the GPU": (
        lambda m, _: m.cuda.reset(capability=199), "compiler", "broken", "does not know sm_199; it knows sm_",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(case: str, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    change, name, state, detail = CASES[case]
    change(machine, monkeypatch)
    finding = examined(6)[name]
    assert (finding["state"], detail in finding["detail"]) == (state, True), finding


def test_a_compiler_that_is_missing(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise CompilerMissingError("NVRTC was not found", "Install it.")

    monkeypatch.setattr(compiler, "version", missing)
    failed(invoke("doctor"), 6, "compiler is missing", "Install it.")


def test_a_torch_for_cpus_is_not_said_to_be_no_torch(machine: SimpleNamespace) -> None:
    machine.torch.__dict__.update(__version__="2.13.0+cpu", version=SimpleNamespace(cuda=None))
    result = invoke("doctor")
    failed(result, 6, "torch for CUDA is missing", "pip keeps it unless it is removed first")
    assert "models on a CPU need none" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("capabilities", "tried"),
    [
        ([(9, 0)], ["sm_90a"]),
        ([(8, 9), (12, 0), (8, 9)], ["sm_89", "sm_120"]),
        ([(7, 5), (8, 6)], ["sm_86"]),
        ([(7, 5)], ["sm_80"]),
        ([], ["sm_80"]),
    ],
)
def test_the_compiler_is_tried_for_every_gpu(
    capabilities: list[tuple[int, int]],
    tried: list[str],
    machine: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine.cuda.reset(devices=len(capabilities))
    monkeypatch.setattr(driver, "capability", lambda gpu: capabilities[gpu])
    asked, real = list[str](), compiler.compile_cubin

    def compile_cubin(source: str, name: str, options: tuple[str, ...]) -> Any:
        asked.extend(each.removeprefix("-arch=") for each in options if each.startswith("-arch="))
        return real(source, name, options)

    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    report = doctor.examine()
    assert asked == tried
    assert [each["state"] for each in report["findings"] if each["name"] == "compiler"] == ["ok"]


def test_an_error_with_a_remedy_in_the_kernels_test_keeps_it(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(device: str) -> list[self_test.Check]:
        if device == "cuda:1":
            raise CompilerMissingError("NVRTC does not know sm_199", "Install another torch.")
        return PASSED

    machine.cuda.reset(devices=2)
    monkeypatch.setattr(self_test, "run", run)
    found = examined(6)
    assert found["kernels, GPU 0"]["state"] == "ok"
    finding = found["kernels, GPU 1"]
    assert (finding["state"], finding["detail"], finding["remedy"]) == (
        "broken", "NVRTC does not know sm_199", "Install another torch.",
    )  # fmt: skip


def test_a_torch_that_does_not_load(
    machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch")
    finding = examined(6)["torch"]
    assert finding["state"] == "broken"
    assert finding["detail"] == "does not load: libcudart.so.13: cannot open shared object file"


def test_an_error_of_the_kernels_is_one_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def examine() -> None:
        raise CompilerMissingError("NVRTC was not found", "Install it.")

    monkeypatch.setattr(doctor, "examine", examine)
    failed(invoke("doctor"), 6, "NVRTC was not found", "Install it.")


def test_kernels_run_without_a_cache(machine: SimpleNamespace, cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    found = examined(0)
    assert (found["cache"]["state"], found["cache"]["needed"]) == ("broken", False)
    assert "Q6K_KERNELS_CACHE" in found["cache"]["remedy"]
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "error: cache is broken, which kernels run without" in result.stderr


@pytest.mark.parametrize("probe", [probe.__name__ for probe in doctor._PROBES])
def test_no_probe_can_take_the_report_along(
    probe: str, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> Iterator[doctor.Finding]:
        raise ValueError("unforeseen")
        yield

    broken.__name__ = probe
    probes = tuple(broken if each.__name__ == probe else each for each in doctor._PROBES)
    monkeypatch.setattr(doctor, "_PROBES", probes)
    found = examined(6)
    assert found[probe.strip("_")]["detail"] == "looking at it failed: ValueError: unforeseen"
    assert len(found) >= 7
