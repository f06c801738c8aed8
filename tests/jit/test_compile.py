"""The gate that compiles every kernel: it lets right ones through and nothing else."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import compile_kernels
from q6k_kernels.cpp import cubins
from q6k_kernels.errors import CompilerMissingError
from q6k_kernels.formats.types import CODE_MACROS
from q6k_kernels.jit import compiler

pytestmark = pytest.mark.usefixtures("cache")

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
    """`gate.run(variants, *arguments)`: the exit code; `gate.document()`: what it wrote."""
    sources = tmp_path / "cuda"
    sources.mkdir()
    (sources / "common.cuh").write_text("typedef unsigned u32;\n")
    (sources / "fine.cuh").write_text(FINE)
    (sources / "spills.cuh").write_text(SPILLING)
    (sources / "wrong.cuh").write_text("nonsense")
    monkeypatch.setattr(compiler, "SOURCES", sources)

    def run(wanted: list[Any], *arguments: str, architectures: tuple[int, ...] = (80, 90)) -> int:
        fake = ModuleType("q6k_kernels.cpp.variants")
        fake.__dict__.update(
            all_variants=lambda _: wanted,
            ARCHITECTURES=architectures,
            shared_bytes=lambda arch: {VARIANT: 1000 + arch},
        )
        monkeypatch.setitem(sys.modules, "q6k_kernels.cpp.variants", fake)
        return compile_kernels.main(["--all", "--json", str(tmp_path / "rows.json"), *arguments])

    return SimpleNamespace(run=run, document=lambda: json.loads((tmp_path / "rows.json").read_text()))


def test_kernels_that_compile_pass(gate: Any, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    wanted = [VARIANT, ("fine.cuh", "also", (("VALUE", 3),)), ("fine.cuh", "fine", (("VALUE", 4),))]
    architectures = (80, 86, 89, 90, 100, 120)
    assert gate.run(wanted, architectures=architectures) == 0
    rows = gate.document()["kernels"]
    assert [(row["arch"], row["kernel"], row["defines"]["VALUE"]) for row in rows[:4]] == [
        (80, "also", 3), (80, "fine", 3), (80, "also", 4), (80, "fine", 4),
    ]  # fmt: skip
    assert tuple(row["arch"] for row in rows[::4]) == architectures
    assert all(row["registers"] > 0 and row["spill_bytes"] == 0 for row in rows)
    assert [row["dynamic_shared_bytes"] for row in rows[:6]] == [None, 1080, None, None, None, 1086]
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("NVRTC ")
    assert out[-1].startswith("24 kernels in 12 units, ")
    (line,) = (line for line in out if line.split()[:2] == ["90", "fine"] and line.endswith("VALUE=3"))
    assert line.split()[-2:] == ["1090", "VALUE=3"]
    # Each is compiled once: what comes after finds it in the cache.
    assert len(list(cache.iterdir())) == 12


@pytest.mark.parametrize(
    ("variant", "error"),
    [
        (("spills.cuh", "spills", ()), "error: sm80_spills: spills spills "),
        (("fine.cuh", "absent", (("VALUE", 1),)), "error: sm80_fine_1: fine.cuh has no kernel absent"),
        (("fine.cuh", "fine", ()), 'identifier "VALUE" is undefined'),
        (("wrong.cuh", "wrong", ()), "wrong.cuh(1): error"),
        (("absent.cuh", "absent", ()), "cannot be read"),
    ],
)
def test_a_kernel_that_is_not_right_fails(
    variant: Any, error: str, gate: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate.run([variant, VARIANT], "--arch", "80") == 1
    document = gate.document()
    assert [row["kernel"] for row in document["kernels"] if row["defines"] == {"VALUE": 3}] == ["also", "fine"]
    assert len(document["errors"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].endswith("; 1 errors")
    assert error in captured.err
    if "spills" in error:
        assert document["kernels"][0]["spill_bytes"] > 0


def test_nothing_to_compile_is_a_failure(gate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.run([]) == 1
    assert "error: there was nothing to compile" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["75", "-90", "hopper", "sm_90"])
def test_an_architecture_that_makes_no_sense_is_a_usage_error(
    arch: str, gate: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gate.run([VARIANT], f"--arch={arch}")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: argument --arch: " in error
    assert f"expected a compute capability of 80 or later, as 90 for 9.0, found '{arch}'" in error


def test_an_architecture_that_the_compiler_does_not_know(gate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.run([VARIANT], "--arch", "90", "999") == 1
    assert re.match(r"error: NVRTC [\d.]+ does not know sm_999; it knows .*sm_90.*\ntry: ", capsys.readouterr().err)


def test_no_compiler_is_a_failure(
    gate: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise CompilerMissingError("NVRTC is not here", "Install it.")

    monkeypatch.setattr(compiler, "version", missing)
    assert gate.run([VARIANT]) == 1
    assert capsys.readouterr().err == "error: NVRTC is not here\ntry: Install it.\n"


def test_how_far_it_is(monkeypatch: pytest.MonkeyPatch, gate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cubins, "NOTE_SECONDS", 0.0)
    assert gate.run([VARIANT], "--jobs", "1") == 0
    assert re.findall(r"^(\d) of 2 units compiled, \d+ s left$", capsys.readouterr().out, re.M) == ["1", "2"]


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


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120, 91, 130])
def test_an_architecture_has_every_operation(arch: int) -> None:
    variants = pytest.importorskip("q6k_kernels.cpp.variants", exc_type=ImportError)
    known = variants.all_variants(arch)
    gemm = "q6k_gemm_wgmma" if arch == 90 else "q6k_gemm_mma"
    kernels = {kernel for _, kernel, _ in known}
    assert {"q6k_decode", gemm, "q6k_pack"} <= kernels
    assert ("q6k_gemm_mma" in kernels) == (arch != 90)
    sizes = variants.shared_bytes(arch)
    assert set(sizes) <= set(known)
    assert all(0 <= each <= variants.device_like(arch).shared_bytes for each in sizes.values())
    used = {kernel for (_, kernel, _), each in sizes.items() if each}
    expected = {"q6k_decode", gemm, gemm.replace("gemm", "experts"), "q6k_attend"}
    assert used == expected | ({"q6k_persist"} if arch == 90 else set())
    # Of all kernels but those of decoding it is known.
    assert {kernel for _, kernel, _ in set(known) - set(sizes)} <= {"q6k_decode", "q6k_experts_decode"}


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
        found[kernel, macros.get("Q6K_BITS"), macros.get("Q6K_SCALES"), *own] = size
    # Activations of two stages, and two tiles for each of eight warps.
    assert found["q6k_gemm_mma", 6, 0, 16, 1, 2] == 2 * 8192 + 8 * 2 * 3584
    # Rings of x and of tiles, 2 KB for each consumer, a barrier pair for each stage.
    assert found["q6k_gemm_wgmma", 6, 1, 256, 2, 3, 4, 1] == 4 * 256 * 128 + 3 * 8 * 3456 + 2 * 2048 + 7 * 16
    # Of 16 keys and values for each of eight warps, 16 bytes more than they take; a ring of two; codes, two scales.
    assert found["q6k_attend", None, None, 1, 0, 128, 8, 1, 0, 0, 0] == 2 * 8 * 16 * (128 * 2 + 16)
    assert found["q6k_attend", None, None, 1, 0, 128, 8, 2, 0, 0, 0] == 2 * 2 * 8 * 16 * (128 * 2 + 16)
    assert found["q6k_attend", None, None, 1, 0, 128, 16, 1, 1, 0, 0] == 2 * 16 * 16 * (128 + 16 + 2 * 4)
    # A ring of 16 x 3 tiles, 21504 / 256 super-blocks of one token's codes and steps, 32 sums.
    assert found["q6k_decode", 6, 0, 1, 0, 16, 3, 1, 0] >= 16 * 3 * 3584 + 84 * (256 + 32) + 32 * 16 * 4
