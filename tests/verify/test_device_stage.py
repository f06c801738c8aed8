"""Checking a device by the reference: what is run, told and found, and what is said where it cannot be."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from device_checks import Device, bundle, check, packed_bytes, ql_rows, raising
from gguf_builder import F32, Builder, small_model, weight
from q6k_convert.errors import EnvironmentMissingError, ExitCode
from q6k_convert.verify import device_stage
from q6k_convert.verify.device_stage import check_device
from q6k_kernels import errors
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.jit import compiler, driver

torch = pytest.importorskip("torch")

from q6k_convert.verify import device_runs
from q6k_kernels.ops import reference


@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_every_planar_tensor_is_run(tmp_path: Path, scales: Literal["bf16", "exact"]) -> None:
    out = bundle(tmp_path, small_model(), scales)
    told = list[int]()
    report = check(out, progress=told.append)
    assert (report.state, report.device, report.findings) == ("passed", "cpu", [])
    assert set(report.runs) == {
        "token_embd.weight",
        "blk.0.attn_q.weight",
        "blk.0.attn_k.weight",
        "blk.0.ffn_down_exps.weight[0]",
        "blk.0.ffn_down_exps.weight[1]",
    }
    assert "5 matrices at M=1 with int8 activations and M=16 with bf16 activations" in report.detail
    for runs in report.runs.values():
        assert [(run.m, run.activations) for run in runs] == [(1, "int8"), (16, "bf16")]
        assert all(run.passed and 0 <= run.worst_error_in_tolerances <= 1 and not run.first_bad for run in runs)
        assert all(run.seconds > 0 and run.gb_per_s is None for run in runs)
    # Something was rounded: a check of nothing, or of itself, would see no error at all.
    assert max(run.worst_error_in_tolerances for runs in report.runs.values() for run in runs) > 0.5
    assert sum(told) == packed_bytes(out)


def test_of_many_experts_four_are_run(tmp_path: Path) -> None:
    out = bundle(
        tmp_path, Builder([weight("exps", (7, 3, 256)), weight("few", (4, 1, 256)), weight("m", (2, 512))])
    )
    told = list[int]()
    report = check(out, progress=told.append)
    assert set(report.runs) == {*(f"exps[{e}]" for e in (0, 2, 4, 6)), *(f"few[{e}]" for e in range(4)), "m"}
    assert "exps: experts 0, 2, 4, 6 of 7" in report.detail
    assert "few" not in report.detail
    assert sum(told) == packed_bytes(out)


@pytest.mark.parametrize("count", range(1, 130))
def test_the_sample_of_experts_has_both_ends(count: int) -> None:
    sample = device_stage.sample(count)
    assert sample == sorted(set(sample))
    assert (sample[0], sample[-1], len(sample)) == (0, count - 1, min(count, 4))


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_a_wrong_output_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Whatever the chunks: the fifth of five rows of weights, at one size only."""
    out = bundle(tmp_path, Builder([weight("good", (2, 256)), weight("bad", (5, 512), seed=2)]))
    monkeypatch.setitem(device_runs.EXACT_WEIGHTS, "cpu", rows * 512)
    last = ql_rows(out, "bad")[4]
    real = reference.linear

    def broken(x: Any, planes: Any, *args: Any, **more: Any) -> Any:
        y, ql = real(x, planes, *args, **more), planes[0]
        if len(x) == 16 and ql.shape[1:] == last.shape:
            y[3, (ql == last).all(1)] *= 1.02  # three to five ulps
        return y

    monkeypatch.setattr(reference, "linear", broken)
    report = check(out)
    assert report.state == "failed"
    [finding] = report.findings
    assert (finding.file, finding.tensor) == ("model.safetensors", "bad")
    assert finding.problem.startswith("M=16 with bf16 activations: y[3, 4] is ")
    decode, prefill = report.runs["bad"]
    assert decode.passed
    assert not prefill.passed
    assert 2 < prefill.worst_error_in_tolerances < 10
    assert prefill.first_bad in finding.problem
    assert all(run.passed for run in report.runs["good"])


def test_the_expert_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(tmp_path, Builder([weight("exps", (3, 2, 256))]))
    second = ql_rows(out, "exps")[1]
    real = reference.linear

    def broken(x: Any, planes: Any, *args: Any, **more: Any) -> Any:
        y = real(x, planes, *args, **more)
        return y * float("nan") if torch.equal(planes[0], second) else y

    monkeypatch.setattr(reference, "linear", broken)
    report = check(out)
    assert [finding.tensor for finding in report.findings] == ["exps", "exps"]
    assert report.findings[0].problem.startswith("expert 1, M=1 with int8 activations: y[0, 0] is nan, expected ")
    assert [name for name, runs in report.runs.items() if not all(run.passed for run in runs)] == ["exps[1]"]


@pytest.mark.parametrize("role", ["ql", "qh", "scale", "steps"])
def test_a_device_that_reads_one_array_wrongly_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    out = bundle(tmp_path, Builder([weight("w", (3, 256))]), "exact")
    real = reference.linear

    def broken(x: Any, planes: Any, row: Any, **more: Any) -> Any:
        arrays = dict(zip(row.roles, planes, strict=True))
        arrays[role] = arrays[role].roll(1, 1 if role in ("ql", "qh") else 0)
        return real(x, list(arrays.values()), row, **more)

    monkeypatch.setattr(reference, "linear", broken)
    report = check(out)
    assert report.state == "failed"
    assert [finding.tensor for finding in report.findings] == ["w", "w"]


def test_a_bundle_without_planar_tensors(tmp_path: Path) -> None:
    report = check(bundle(tmp_path, Builder([weight("norm", (8,), F32)])))
    assert (report.state, report.device, report.runs) == ("skipped", "none", {})
    assert report.detail == "the bundle has no planar tensors"


def test_a_shard_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(tmp_path, Builder([weight("w", (3, 256))]))
    shard = out / "model.safetensors"
    monkeypatch.setitem(device_runs.EXACT_WEIGHTS, "cpu", 256)

    def cut(_: int) -> None:
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size - 1)

    with pytest.raises(OSError, match="ended .* bytes before its array") as caught:
        check(out, progress=cut)
    assert caught.value.filename == shard
    with pytest.raises(ValueError, match="the arrays end at byte"):
        check(out)


# What is missing.


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return bundle(tmp_path, Builder([weight("w", (1, 256))]))


def refused(out: Path, device: Device) -> EnvironmentMissingError:
    with pytest.raises(EnvironmentMissingError) as caught:
        check(out, device)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT == 6
    assert caught.value.remedy
    return caught.value


def test_without_torch(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert check(out, "auto").state == "skipped"
    error = refused(out, "cpu")
    assert "torch is not installed" in error.cause
    assert "pip install torch" in error.remedy


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (OSError("libtorch.so: cannot open"), "torch is installed but does not load: libtorch.so: cannot open"),
        (ImportError("wrong ELF class"), "torch is installed but does not load: wrong ELF class"),
        (ModuleNotFoundError("No module named 'sympy'", name="sympy"), "torch is installed without sympy"),
    ],
)
def test_with_a_broken_torch(out: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, words: str) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any) -> Any:
        if name == "torch":
            raise failure
        return real(name, *args)

    manifest = manifests.read(out)
    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(EnvironmentMissingError, match=words):
        check_device(out, manifest, "cpu", lambda _: None)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (lambda: 0, "no CUDA GPU was found"),
        (raising(errors.GpuMissingError("none", "Get one.")), "no CUDA GPU was found"),
        (
            raising(errors.DriverMissingError("it does not load", "Get it.")),
            "no CUDA GPU was found: it does not load",
        ),
        (
            raising(errors.DriverCallError("cuInit failed", "Restart.", "CUDA_ERROR_UNKNOWN")),
            "driver does not work: cuInit failed",
        ),
    ],
)
def test_without_a_gpu(out: Path, monkeypatch: pytest.MonkeyPatch, count: Any, words: str) -> None:
    monkeypatch.setattr(driver, "device_count", count)
    monkeypatch.setitem(sys.modules, "torch", None)  # is not looked for
    report = check(out, "auto")
    assert words in report.detail
    assert report.detail.endswith("; --device cpu runs the reference")
    assert (report.state, report.device, report.runs) == ("skipped", "none", {})
    assert f"--device cuda cannot run: {report.detail.split(';')[0]}" == refused(out, "cuda").cause


@pytest.mark.parametrize(
    ("place", "name", "value", "words", "remedy"),
    [
        (sys, "modules", {**sys.modules, "torch": None}, "torch is not installed", "pip install torch"),
        (torch.version, "cuda", None, "is built without CUDA", "pip install torch"),
        (torch.cuda, "is_available", lambda: False, "built for CUDA 13.0, cannot use the GPU", "torch.cuda.init"),
        (torch.cuda, "get_device_capability", lambda: (7, 5), "compute capability 7.5, .* 8.0", "newer GPU"),
        (
            compiler,
            "version",
            raising(errors.CompilerMissingError("NVRTC was not found", "Get NVRTC.")),
            "NVRTC was not found",
            "Get NVRTC",
        ),
    ],
)
def test_with_a_gpu_and_something_missing(
    out: Path, gpu: pytest.MonkeyPatch, place: Any, name: str, value: Any, words: str, remedy: str
) -> None:
    if place is sys:
        gpu.setitem(sys.modules, "torch", None)
    else:
        gpu.setattr(place, name, value)
    report = check(out, "auto")
    assert re.search(words, report.detail)
    assert (report.state, report.device, report.runs) == ("skipped", "none", {})
    error = refused(out, "cuda")
    assert re.search(words, error.cause)
    assert remedy in error.remedy
    assert "--device cpu" in error.remedy


def test_importing_the_module_imports_no_torch() -> None:
    program = "import q6k_convert.verify.device_stage, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
