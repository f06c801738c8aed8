"""The gate that compiles every kernel: it lets right ones through and nothing else."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from q6k_kernels.formats.types import CODE_MACROS
from q6k_kernels.jit import compiler

SCRIPT = Path(__file__).parents[2] / "scripts" / "kernels" / "compile_kernels.py"
FINE = (
    'extern "C" __global__ void fine(u32* p) { *p = VALUE; }\nextern "C" __global__ void also(u32* p) { *p = 0; }'
)
# 200 values that live at once in a kernel that may have no more than 32 registers.
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* p) {
  float a[200];
#pragma unroll
  for (int i = 0; i < 200; i++) a[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; i++) p[i * 1024 + threadIdx.x] = a[199 - i] * a[(i * 7) % 200];
}"""
VARIANT = ("fine.cuh", "fine", (("VALUE", 3),))


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`gate(variants, *arguments)`: the exit code."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "common.cuh").write_text("typedef unsigned u32;\n")
    (sources / "fine.cuh").write_text(FINE)
    (sources / "choose.cuh").write_text(FINE)
    (sources / "spills.cuh").write_text(SPILLING)
    (sources / "wrong.cuh").write_text("nonsense")
    monkeypatch.setattr(compiler, "SOURCES", sources)
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(variants: list[Any], *arguments: str, architectures: tuple[int, ...] = (80, 90)) -> int:
        fake = ModuleType("q6k_kernels.cpp.variants")
        fake.__dict__.update(
            all_variants=lambda _: variants,
            ARCHITECTURES=architectures,
            shared_bytes=lambda arch: {VARIANT: 1000 + arch},
        )
        monkeypatch.setitem(sys.modules, "q6k_kernels.cpp.variants", fake)
        return int(main(["--json", str(tmp_path / "rows.json"), *arguments]))

    return SimpleNamespace(run=run, rows=lambda: json.loads((tmp_path / "rows.json").read_text())["kernels"])


def test_kernels_that_compile_pass(gate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    variants = [VARIANT, ("fine.cuh", "also", (("VALUE", 3),)), ("fine.cuh", "fine", (("VALUE", 4),))]
    assert gate.run(variants, "--compiler", "nvrtc", architectures=(80, 86, 89, 90, 100, 120)) == 0
    rows = gate.rows()
    assert [(row["arch"], row["kernel"], row["defines"]["VALUE"]) for row in rows[:3]] == [
        ("sm_80", "fine", 3), ("sm_80", "also", 3), ("sm_80", "fine", 4),
    ]  # fmt: skip
    assert [row["arch"] for row in rows[::3]] == ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]
    assert all(row["registers"] > 0 and row["spill_bytes"] == 0 and row["error"] is None for row in rows)
    assert [row["dynamic_shared_bytes"] for row in rows[:6]] == [1080, None, None, 1086, None, None]
    out = capsys.readouterr().out
    assert out.startswith("NVRTC ")
    assert out.splitlines()[-1].startswith("18 kernels in 12 units, ")
    line = next(line for line in out.splitlines() if line.startswith("sm_90a"))
    assert line.split()[:3] == ["sm_90a", "fine", "VALUE=3"]
    assert line.split()[-2:] == ["1090", "ok"]


@pytest.mark.parametrize(
    ("variant", "error"),
    [
        (("spills.cuh", "spills", ()), "spills "),
        (("fine.cuh", "absent", (("VALUE", 1),)), "fine.cuh has no kernel absent"),
        (("fine.cuh", "fine", ()), 'identifier "VALUE" is undefined'),
        (("wrong.cuh", "wrong", ()), "wrong.cuh(1): error"),
        (("absent.cuh", "absent", ()), "cannot be read"),
    ],
)
def test_a_kernel_that_is_not_right_fails(
    variant: Any, error: str, gate: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate.run([VARIANT, variant], "--compiler", "nvrtc", "--arch", "80") == 1
    right, wrong = gate.rows()
    assert right["error"] is None
    assert error in wrong["error"]
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].endswith("; 1 failed or spill")
    assert ("error:" in captured.err) == bool(wrong["log"])
    if "spills" in error:
        assert wrong["spill_bytes"] > 0


def test_what_the_library_has_is_left_out_but_for_one_architecture(
    gate: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [VARIANT, ("fine.cuh", "also", VARIANT[2]), ("choose.cuh", "fine", VARIANT[2])]
    arguments = ("--compiler", "nvrtc", "--whole", "90")
    assert gate.run(variants, *arguments, architectures=(80, 90, 120)) == 0
    assert [(row["arch"], row["file"]) for row in gate.rows()] == [
        ("sm_80", "choose.cuh"),
        *(("sm_90a", file) for file in ("fine.cuh", "fine.cuh", "choose.cuh")),
        ("sm_120", "choose.cuh"),
    ]
    told = "4 kernels for other architectures than 90 are left to `q6k-convert build-ops`"
    assert capsys.readouterr().out.splitlines()[-1] == told
    assert gate.run(variants, *arguments, "80", "--arch", "80", "90") == 0
    assert len(gate.rows()) == 6
    assert "are left" not in capsys.readouterr().out
    # One that is not right fails wherever it is compiled, and nowhere else.
    wrong = ("choose.cuh", "absent", VARIANT[2])
    assert gate.run([VARIANT, wrong], *arguments) == 1
    assert [row["error"] is None for row in gate.rows()] == [False, True, False]


def test_the_architecture_that_is_compiled_whole_is_one_of_those_compiled(
    gate: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gate.run([VARIANT], "--compiler", "nvrtc", "--arch", "80", "86", "--whole", "90")
    assert "argument --whole: 90 is not among the architectures to compile for" in capsys.readouterr().err


def test_nothing_to_compile_is_a_failure(gate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.run([], "--compiler", "nvrtc") == 1
    assert "error: there was nothing to compile" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["nvcc", "nvrtc"])
@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("75", "expected a compute capability of 80 or later, as 90 for 9.0, found '75'"),
        ("-90", "expected a compute capability of 80 or later"),
        ("hopper", "found 'hopper'"),
        ("sm_90", "found 'sm_90'"),
        ("999", "999 is not one that the compiler knows: "),
    ],
)
def test_an_architecture_that_makes_no_sense_is_a_usage_error(
    arch: str, words: str, how: str, gate: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if how == "nvcc" and shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    with pytest.raises(SystemExit, match="2"):
        gate.run([VARIANT], "--compiler", how, f"--arch={arch}")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: argument --arch: " in error
    assert words in error


@pytest.mark.parametrize(
    ("arch", "kb"),
    [
        *((80, 163), (86, 99), (87, 163), (88, 99), (89, 99), (90, 227), (91, 227), (100, 227), (101, 227)),
        *((103, 227), (110, 227), (119, 227), (120, 99), (121, 99), (125, 99), (130, 99)),
    ],
)
def test_every_architecture_is_like_one_that_is_documented(arch: int, kb: int) -> None:
    variants = pytest.importorskip("q6k_kernels.cpp.variants", exc_type=ImportError)
    device = variants.device_like(arch)
    assert (device.arch, device.shared_bytes, device.multiprocessor_shared_bytes) == (
        arch, kb << 10, kb + 1 << 10,
    )  # fmt: skip
    known = variants.all_variants(arch)
    gemm = "q6k_gemm_wgmma" if arch == 90 else "q6k_gemm_mma"
    kernels = {kernel for _, kernel, _ in known}
    assert {"q6k_decode", gemm, "q6k_pack"} <= kernels
    assert ("q6k_gemm_mma" in kernels) == (arch != 90)
    sizes = variants.shared_bytes(arch)
    assert set(sizes) <= set(known)
    assert all(0 <= each <= device.shared_bytes for each in sizes.values())
    used = {kernel for (_, kernel, _), each in sizes.items() if each}
    assert used == {"q6k_decode", gemm, "q6k_attend"}
    # Of all kernels but decode's it is known.
    assert {kernel for _, kernel, _ in set(known) - set(sizes)} <= {"q6k_decode"}


@pytest.mark.parametrize("function", ["device_like", "all_variants", "shared_bytes"])
@pytest.mark.parametrize("arch", [79, 75, 0, -90])
def test_an_architecture_without_kernels_is_an_error(function: str, arch: int) -> None:
    variants = pytest.importorskip("q6k_kernels.cpp.variants", exc_type=ImportError)
    with pytest.raises(ValueError, match=f"arch: expected .* 80 or later, .* found {arch}$"):
        getattr(variants, function)(arch)


def test_dynamic_shared_memory_is_what_launches_ask_for() -> None:
    """By hand from the layouts in the device code."""

    variants = pytest.importorskip("q6k_kernels.cpp.variants", exc_type=ImportError)
    found = dict[tuple[Any, ...], int]()
    for (_, kernel, defines), size in {**variants.shared_bytes(80), **variants.shared_bytes(90)}.items():
        macros = dict(defines)
        own = (value for name, value in macros.items() if name not in (*CODE_MACROS, "Q6K_FP16"))
        found[kernel, macros.get("Q6K_SCALES"), *own] = size
    # Activations of two stages, and two tiles for each of eight warps.
    assert found["q6k_gemm_mma", 0, 16, 1, 2] == 2 * 8192 + 8 * 2 * 3584
    # Rings of x and of tiles, 2 KB for each consumer, a barrier pair for each stage.
    assert found["q6k_gemm_wgmma", 1, 256, 2, 3, 4, 1] == 4 * 256 * 128 + 3 * 8 * 3360 + 2 * 2048 + 7 * 16
    # Of 16 keys and values for each of eight warps, 16 bytes more than they take.
    assert found["q6k_attend", None, 1, 0, 128, 8] == 2 * 8 * 16 * (128 * 2 + 16)
    # A ring of 16 x 3 tiles, 21504 / 256 super-blocks of one token's codes and steps, 32 sums.
    assert found["q6k_decode", 0, 1, 0, 16, 3, 1, 0] >= 16 * 3 * 3584 + 84 * (256 + 32) + 32 * 16 * 4


def test_no_compiler_is_a_failure(gate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="2"):
        gate.run([VARIANT], "--compiler", "nvcc")


# A compiler that compiles nothing: what is asked of it, and what becomes of its answers.
NVCC = """#!/bin/sh
printf '%s\\n' "$@" >"$(dirname "$0")/arguments"
for last; do :; done
case "$*" in *wrong*) echo 'wrong.cuh(1): error: no good' >&2; exit 2;; esac
cat >&2 <<'END'
ptxas info    : Compiling entry function 'fine' for 'sm_80'
ptxas info    : Function properties for fine
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 21 registers, used 1 barriers, 128 bytes smem, 360 bytes cmem[0]
END
"""


@pytest.mark.parametrize("how", ["auto", "nvcc"])
def test_nvcc_is_used_where_it_is(how: str, gate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvcc").write_text(NVCC)
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gate.run([VARIANT], "--compiler", how, "--arch", "90") == 0
    (row,) = gate.rows()
    assert [row[name] for name in ("registers", "stack_bytes", "spill_bytes", "shared_bytes")] == [21, 16, 0, 128]
    asked = (tmp_path / "arguments").read_text().split("\n")
    assert asked[:5] == ["-cubin", "-std=c++17", "-arch=sm_90a", "-DVALUE=3", "--ptxas-options=-v"]
    assert gate.run([("wrong.cuh", "wrong", ())], "--compiler", how, "--arch", "80") == 1
    assert gate.rows()[0]["error"] == "nvcc does not compile wrong.cuh: wrong.cuh(1): error: no good"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_real_nvcc_and_nvrtc_agree_on_what_is_right(gate: Any) -> None:
    variants = [VARIANT, ("spills.cuh", "spills", ()), ("wrong.cuh", "wrong", ())]
    outcomes = []
    for how in ("nvcc", "nvrtc"):
        assert gate.run(variants, "--compiler", how, "--arch", "90") == 1
        outcomes.append([(row["error"] is None, bool(row["spill_bytes"])) for row in gate.rows()])
    assert outcomes[0] == outcomes[1] == [(True, False), (False, True), (False, False)]
