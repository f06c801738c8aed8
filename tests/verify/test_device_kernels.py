"""Checking a device by its kernels, whose place is taken by the same operations on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

import packed
from device_checks import Device, bundle, check, packed_bytes, ql_rows, raising
from gguf_builder import Builder, small_model, weight
from q6k_convert.errors import EnvironmentMissingError, ExitCode

torch = pytest.importorskip("torch")

from q6k_convert.verify import device_runs
from q6k_kernels import errors
from q6k_kernels.ops import schema


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
def test_a_kernel_that_does_not_compile_is_an_error(
    tmp_path: Path, kernels: pytest.MonkeyPatch, device: Device
) -> None:
    out = bundle(tmp_path, Builder([weight("w", (1, 256))]))
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
