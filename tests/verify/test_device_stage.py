"""Checking a device: what is run, what is told, what is found, and what is said where it cannot be."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import packed
from gguf_builder import F32, Builder, small_model, weight
from q6k_convert.convert.pipeline import convert
from q6k_convert.convert.plan import Options
from q6k_convert.errors import EnvironmentMissingError, ExitCode
from q6k_convert.verify import device_stage
from q6k_convert.verify.device_stage import DeviceReport, check_device
from q6k_kernels import errors
from q6k_kernels.bundle import manifest as manifests
from q6k_kernels.jit import compiler, driver

torch = pytest.importorskip("torch")

from q6k_convert.verify import device_runs
from q6k_kernels.ops import reference, schema

Device = Literal["auto", "cpu", "cuda"]


def bundle(path: Path, builder: Builder, scales: Literal["bf16", "exact"] = "bf16") -> Path:
    source = builder.write(path / "in.gguf")
    convert(source, path / "out", Options(scales=scales))
    return path / "out"


def check(
    directory: Path, device: Device = "cpu", progress: Callable[[int], None] = lambda _: None
) -> DeviceReport:
    return check_device(directory, manifests.read(directory), device, progress)


def packed_bytes(directory: Path) -> int:
    """Of every planar tensor, from the shapes in the manifest."""
    sizes = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2}
    arrays = [
        array
        for tensor in manifests.read(directory).tensors
        if tensor.storage == "planar"
        for array in tensor.arrays.values()
    ]
    return sum(int(np.prod(array.shape)) * sizes[array.dtype] for array in arrays)


def ql_rows(directory: Path, name: str) -> Any:
    """The rows of a tensor's ql, read by another program."""
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")[f"{name}.ql"]


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with all that kernels need, as far as one can ask."""
    monkeypatch.setattr(driver, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    return monkeypatch


def raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*_: Any) -> Any:
        raise error

    return raise_it


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


# Where nothing is missing: the kernels' place is taken by the same operations on the CPU.


@pytest.fixture
def kernels(gpu: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    real = device_runs.run_on_gpu
    gpu.setattr(device_runs, "run_on_gpu", lambda *args: real(*args, device="cpu"))
    gpu.setattr(torch.cuda, "get_device_name", lambda: "Imaginary 9000")
    return gpu


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("scales", ["bf16", "exact"])
def test_every_planar_tensor_is_run_by_the_kernels(
    tmp_path: Path, kernels: pytest.MonkeyPatch, scales: Literal["bf16", "exact"], device: Device
) -> None:
    out = bundle(tmp_path, small_model(), scales)
    kernels.setitem(device_runs.EXACT_WEIGHTS, "cuda", 2 * 512)
    kernels.setattr(device_runs, "READ_WEIGHTS", 2 * 512)
    told = list[int]()
    report = check(out, device, told.append)
    assert (report.state, report.device, report.findings) == ("passed", "cuda", [])
    assert "kernels on one Imaginary 9000: 5 matrices at M=1 with int8 activations, M=16 with bf16" in report.detail
    assert set(report.runs) == set(check(out, "cpu").runs)
    for runs in report.runs.values():
        assert [(run.m, run.activations) for run in runs] == [(1, "int8"), (16, "bf16"), (512, "bf16")]
        assert all(run.passed and 0 <= run.worst_error_in_tolerances <= 1 and not run.first_bad for run in runs)
    assert max(run.worst_error_in_tolerances for runs in report.runs.values() for run in runs) > 0.5
    assert sum(told) == packed_bytes(out)


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_a_wrong_output_of_a_kernel_is_named(tmp_path: Path, kernels: pytest.MonkeyPatch, rows: int) -> None:
    out = bundle(tmp_path, Builder([weight("good", (2, 256)), weight("exps", (2, 5, 512), seed=2)]))
    kernels.setitem(device_runs.EXACT_WEIGHTS, "cuda", rows * 512)
    second, real = ql_rows(out, "exps")[1], schema.linear

    def broken(x: Any, tiles: Any, bias: Any, n: int, format: str, activations: str) -> Any:
        y = real(x, tiles, bias, n, format, activations)
        if len(x) == 512 and n == 5 and torch.equal(packed.untiled(tiles, n)[0], second):
            y[511, 4] *= 1.1
        return y

    kernels.setattr(schema, "linear", broken)
    report = check(out, "cuda")
    assert report.state == "failed"
    [finding] = report.findings
    assert (finding.file, finding.tensor) == ("model.safetensors", "exps")
    assert finding.problem.startswith("expert 1, M=512 with bf16 activations: y[511, 4] is ")
    assert [run.passed for run in report.runs["exps[1]"]] == [True, True, False]
    assert all(run.passed for run in (*report.runs["good"], *report.runs["exps[0]"]))


@pytest.mark.parametrize(("name", "what"), [("embedding", "gathered"), ("dequantize", "dequantised")])
def test_a_wrong_row_is_named(tmp_path: Path, kernels: pytest.MonkeyPatch, name: str, what: str) -> None:
    out = bundle(tmp_path, Builder([weight("w", (130, 256))]))
    real = getattr(schema, name)

    def broken(*args: Any) -> Any:
        rows = real(*args)
        rows[-1, 7] += 1
        return rows

    kernels.setattr(schema, name, broken)
    report = check(out, "cuda")
    assert report.state == "failed"
    [finding] = report.findings
    assert finding.problem.startswith(f"row 129 {what}: weight 7 is ")
    assert all(run.passed for run in report.runs["w"])


def test_tiles_that_are_packed_wrongly_are_found(tmp_path: Path, kernels: pytest.MonkeyPatch) -> None:
    out = bundle(tmp_path, Builder([weight("w", (3, 256))]))
    real = schema.pack
    kernels.setattr(schema, "pack", lambda planes, format: real([planes[0].roll(1, 1), *planes[1:]], format))
    assert check(out, "auto").state == "failed"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_kernel_that_does_not_compile_is_an_error(out: Path, kernels: pytest.MonkeyPatch, device: Device) -> None:
    kernels.setattr(
        schema, "linear", raising(errors.CompileFailedError("NVRTC does not compile", "Report it.", "log"))
    )
    with pytest.raises(errors.CompileFailedError):
        check(out, device)


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("place", "full_at", "calls"), [(device_runs.Rows, "read_to", 1), (schema, "pack", 1), (schema, "linear", 3)]
)
def test_a_gpu_whose_memory_is_full_is_one_of_the_environment(
    tmp_path: Path, kernels: pytest.MonkeyPatch, place: Any, full_at: str, calls: int, device: Device
) -> None:
    out = bundle(tmp_path, Builder([weight("exps", (2, 5, 512))]))
    seen, real = list[int](), getattr(place, full_at)

    def full(*args: Any, **more: Any) -> Any:
        seen.append(1)
        if len(seen) > calls:  # the first expert still fits
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*args, **more)

    kernels.setattr(place, full_at, full)
    with pytest.raises(EnvironmentMissingError) as caught:
        check(out, device)
    packed = 5 * (512 // 2 + 512 // 4 + 512 // 16 * 2)
    assert f"to check exps[1]: its planes take {packed} bytes (2.24 kB)" in caught.value.cause
    assert "nvidia-smi" in caught.value.remedy
    assert "--device cpu" in caught.value.remedy
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_activations_are_made_once_for_all_matrices_of_a_width(tmp_path: Path, gpu: pytest.MonkeyPatch) -> None:
    """Also where the device's full name is not the one that was asked for, as with "cuda" and "cuda:0"."""
    out = bundle(tmp_path, Builder([weight("exps", (3, 5, 512)), weight("w", (7, 512))]))
    real, made, randn = device_runs.run_on_gpu, list[int](), torch.randn
    gpu.setattr(device_runs, "run_on_gpu", lambda *args: real(*args, device="cpu:0"))
    gpu.setattr(torch.cuda, "get_device_name", lambda: "Imaginary 9000")

    def counted(*args: Any, **more: Any) -> Any:
        made.append(1)
        return randn(*args, **more)

    gpu.setattr(torch, "randn", counted)
    device_runs.activations_of.cache_clear()
    assert check(out, "cuda").state == "passed"
    assert len(made) == 1


@pytest.mark.parametrize("m", [1, 15, 16, 17, 512])
def test_the_rows_that_are_compared_have_both_ends(m: int) -> None:
    checked = device_runs.checked_rows(m)
    assert checked == sorted(set(checked))
    assert (checked[0], checked[-1], len(checked)) == (0, m - 1, min(m, 16))


def test_importing_the_module_imports_no_torch() -> None:
    program = "import q6k_convert.verify.device_stage, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
