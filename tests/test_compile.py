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

from q6k_kernels import compiler

SCRIPT = Path(__file__).parents[1] / "scripts" / "compile_kernels.py"
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
    (sources / "spills.cuh").write_text(SPILLING)
    (sources / "wrong.cuh").write_text("nonsense")
    monkeypatch.setattr(compiler, "SOURCES", sources)
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(variants: list[Any], *arguments: str, architectures: tuple[int, ...] = (80, 90)) -> int:
        fake = ModuleType("q6k_kernels.variants")
        fake.all_variants, fake.ARCHITECTURES = lambda _: variants, architectures  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "q6k_kernels.variants", fake)
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
    out = capsys.readouterr().out
    assert out.startswith("NVRTC ")
    assert out.splitlines()[-1].startswith("18 kernels in 12 units, ")
    line = next(line for line in out.splitlines() if line.startswith("sm_90a"))
    assert line.split()[:3] == ["sm_90a", "fine", "VALUE=3"]
    assert line.split()[-1] == "ok"


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


def test_nothing_to_compile_is_a_failure(gate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.run([], "--compiler", "nvrtc") == 1
    assert "error: there was nothing to compile" in capsys.readouterr().err


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
