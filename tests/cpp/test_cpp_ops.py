"""The C++ library of the operations: built, loaded in every order, right on the CPU, launching as Python does.

Loading it changes what the operations are, so whatever does is a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import packed
from cpp_library import library
from inside import run_inside
from q6k_convert.cli.main import app
from q6k_convert.errors import EnvironmentMissingError
from q6k_convert.machine import build_ops
from q6k_kernels.cpp import cubins, generate, units
from q6k_kernels.errors import CompileFailedError, CompilerMissingError
from q6k_kernels.jit import compiler
from untraced import untraced

KINDS = "pack_|rows_6_32_0_16_0_0_0_|gemm_mma_6_32_0_16_0_0_0_16"
"""Names of units of which some are compiled here."""
ORDERS = ("load", "python first", "library first")


@pytest.fixture(scope="session")
def built() -> Path:
    return library()


def inside(file: str, path: Path, order: str, *options: str, **more: str) -> None:
    given = {"Q6K_OPS_LIBRARY": str(path), "Q6K_OPS_ORDER": order}
    run_inside(f"cpp/{file}", *options, may_skip=bool(more), covered=file == "cpp_launches.py", **given, **more)


@pytest.mark.parametrize("order", ORDERS)
def test_on_the_cpu(built: Path, order: str) -> None:
    pytest.importorskip("torch")
    # What it computes does not depend on the order.
    inside("cpp_inside.py", built, order, *(() if order == "load" else ("-k", "active or schemas or is or export")))


def test_plans_and_launches_are_pythons(built: Path, fake_driver: Path) -> None:
    """With a driver that writes down what it is asked."""
    found = f"{fake_driver.parent}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(os.pathsep)
    inside("cpp_launches.py", built, "load", LD_LIBRARY_PATH=found, Q6K_FAKE_CUDA=str(fake_driver))


@pytest.mark.parametrize(
    ("content", "told"), [(None, "no such file"), (b"\x7fELF", "not a library of these operations")]
)
def test_what_is_no_library_is_refused_and_python_goes_on(tmp_path: Path, content: bytes | None, told: str) -> None:
    torch = pytest.importorskip("torch")
    from q6k_kernels.ops import library as ops_library

    path = tmp_path / "libq6k_ops.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=f"{told}.*build-ops"):
        ops_library.load(path)
    path.write_bytes(b"q6k_ops_about")
    with pytest.raises(OSError, match="does not load: .*build-ops"):
        ops_library.load(path)
    tiles = torch.zeros(1, 1, 3584, dtype=torch.uint8)
    assert packed.op_dequantize(tiles, 3, torch.float32).shape == (3, 256)
    assert "schema.py" in torch._C._dispatch_dump("q6k::dequantize").partition("CPU: ")[2].partition("\n")[0]


def test_withdrawn_implementations_come_back() -> None:
    torch = pytest.importorskip("torch")
    from q6k_kernels.ops import schema

    tiles = torch.zeros(1, 1, 3584, dtype=torch.uint8)
    schema.withdraw()
    try:
        with pytest.raises(NotImplementedError, match="q6k::dequantize"):
            packed.op_dequantize(tiles, 3, torch.float32)
    finally:
        schema.implement()
    assert packed.op_dequantize(tiles, 3, torch.float32).shape == (3, 256)


# Building


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["build-ops", *arguments])


@pytest.mark.parametrize(
    ("tool", "told"), [("cmake", "cmake is not on PATH"), ("c++", "compiler c++ is not on PATH")]
)
def test_a_missing_tool_is_named(tool: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_ops.shutil, "which", lambda name: None if name == tool else "/usr/bin/true")
    monkeypatch.setattr(build_ops, "_version", lambda program, pattern: (3, 25))
    monkeypatch.delenv("CXX", raising=False)
    result = command("--out", str(tmp_path))
    assert result.exit_code == 6
    assert told in result.stderr
    assert "try: Install" in result.stderr


def test_missing_nvrtc_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise CompilerMissingError("NVRTC was not found", "`pip install nvidia-cuda-nvrtc`.")

    monkeypatch.setattr(build_ops.shutil, "which", lambda name: "/usr/bin/true")
    monkeypatch.setattr(build_ops, "_version", lambda program, pattern: (3, 25))
    monkeypatch.setattr(compiler, "version", missing)
    result = command("--out", str(tmp_path))
    assert result.exit_code == 6
    assert result.stderr == "error: NVRTC was not found\ntry: `pip install nvidia-cuda-nvrtc`.\n"


def test_a_tool_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "cmake"
    old.write_text("#!/bin/sh\necho cmake version 3.5.1\n")
    old.chmod(0o755)
    monkeypatch.setattr(build_ops.shutil, "which", lambda name: str(old))
    with pytest.raises(EnvironmentMissingError, match=r"cmake is 3\.5, needed is 3\.20 or later"):
        build_ops.find_tools()
    old.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    with pytest.raises(EnvironmentMissingError, match="ended with code 3 and says no version: broken"):
        build_ops.find_tools()


def test_a_torch_that_is_missing_or_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_ops.shutil, "which", lambda name: "/usr/bin/true")
    monkeypatch.setattr(build_ops, "_version", lambda program, pattern: (3, 25))
    with monkeypatch.context() as old:
        old.setattr(torch, "__version__", "2.10.1+cpu")
        with pytest.raises(EnvironmentMissingError, match=r"torch is 2\.10\.1\+cpu, needed is 2\.11 or later"):
            build_ops.find_tools()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EnvironmentMissingError, match="torch, whose headers the library needs, does not load"):
        build_ops.find_tools()


@pytest.mark.parametrize("arch", ["75", "7", "-90"])
def test_architectures_without_kernels_are_usage(arch: str, tmp_path: Path) -> None:
    result = command("--out", str(tmp_path), "--arch", arch)
    assert result.exit_code == 2
    assert "expected a compute capability of 80 or later" in result.stderr


def test_an_architecture_that_nvrtc_does_not_know(tmp_path: Path) -> None:
    result = command("--out", str(tmp_path), "--arch", "990")
    assert result.exit_code == 6
    assert "does not know sm_990; it knows " in result.stderr


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that take no time."""
    every = units.of_library([90])
    monkeypatch.setattr(units, "of_library", lambda *_: {u: k for u, k in every.items() if u[1] == "pack.cuh"})


def test_a_failing_cmake_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: None) -> None:
    monkeypatch.setattr(build_ops, "_SOURCE", tmp_path / "nowhere")
    told = list[str]()
    with pytest.raises(EnvironmentMissingError, match="cmake ended with code 1: CMake Error") as caught:
        build_ops.build(tmp_path, [90], 1, told.append)
    assert any(str(tmp_path / "nowhere") in line for line in told)
    assert str(tmp_path / "build" / "build.log") in caught.value.remedy
    assert "nowhere" in (tmp_path / "build" / "build.log").read_text()


@pytest.mark.parametrize("ninja", [True, False])
def test_a_failing_compiler_is_quoted_and_not_its_command_line(
    ninja: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: None
) -> None:
    """With -Werror on the command line, whose first word that has "error" in it is no message."""
    if ninja and build_ops.shutil.which("ninja") is None:
        pytest.skip("ninja is not on PATH")
    project = tmp_path / "cpp"
    shutil.copytree(build_ops._SOURCE, project, ignore=shutil.ignore_patterns("*.py", "__pycache__", "example"))
    for source in (project / "src").glob("*.cpp"):
        source.unlink()
    (project / "src" / "one.cpp").write_text("int f(int unused) {\n  return 0;\n}\n")
    which = build_ops.shutil.which
    monkeypatch.setattr(build_ops, "_SOURCE", project)
    monkeypatch.setattr(build_ops.shutil, "which", lambda name: which(name) if ninja or name != "ninja" else None)
    monkeypatch.setenv("CXXFLAGS", "-Werror")
    told = list[str]()
    with pytest.raises(EnvironmentMissingError) as caught:
        build_ops.build(tmp_path, [90], 1, told.append)
    assert re.search(r"cmake ended with code \d: .*one\.cpp:1:11: error: unused parameter", caught.value.cause)
    at = next(number for number, line in enumerate(told) if "error: unused parameter" in line)
    assert "int f(int unused) {" in told[at + 1]
    assert not (tmp_path / build_ops.LIBRARY).exists()
    monkeypatch.delenv("CXXFLAGS")  # as users have it, a warning is none of their business
    with pytest.raises(EnvironmentMissingError, match="does not load"):
        build_ops.build(tmp_path, [90], 1, told.append)
    assert "warning: unused parameter" in (tmp_path / "build" / "build.log").read_text()


def test_what_kernels_take_is_reported(built: Path) -> None:
    rows = [row for unit in cubins.compile_units(units.of_library([80], KINDS), 2, print) for row in unit.rows]
    assert {row["kernel"] for row in rows} >= {"q6k_pack", "q6k_gather", "q6k_dequantize", "q6k_gemm_mma"}
    assert all(0 < row["registers"] <= 255 and row["spill_bytes"] == 0 for row in rows)
    for kernel, least in (("q6k_gemm_mma", 1024), ("q6k_reduce", 0)):
        asked = {row["dynamic_shared_bytes"] for row in rows if row["kernel"] == kernel}
        assert least <= min(asked) <= max(asked) <= 227 << 10
    lines = cubins.table(rows)
    assert len(lines) == len(rows) + 1
    assert lines[0].split() == [
        *("arch", "kernel", "registers", "spills", "stack", "shared", "dynamic", "macros")
    ]  # fmt: skip
    assert "BN=16" in "".join(lines)


def test_a_table_has_every_figure_in_its_column() -> None:
    row = {"arch": 90, "file": "f.cuh", "kernel": "q6k_f", "registers": 40, "spill_bytes": 1, "stack_bytes": 2}
    row |= {"shared_bytes": 3, "dynamic_shared_bytes": 4096, "defines": {"Q6K_TOKENS": 8, "OTHER": 0}}
    _, known, unknown = cubins.table([row, row | {"dynamic_shared_bytes": None}])
    assert known.split() == ["90", "q6k_f", "40", "1", "2", "3", "4096", "TOKENS=8", "OTHER=0"]
    assert unknown == known.replace("4096", "    ")


def test_a_kernel_that_spills_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of eight rows' sums, made to share a multiprocessor's registers with seven more of its blocks."""
    sums = {"Q6K_TOKENS": 8, "Q6K_WARPS": 8}.items()
    arch, file, defines = next(unit for unit in units.plan([90]) if sums <= dict(unit[2]).items())
    spilling = arch, file, tuple({**dict(defines), "Q6K_OCCUPANCY": 8}.items())
    monkeypatch.setattr(units, "of_library", lambda *_: {spilling: ["q6k_decode"]})
    with pytest.raises(CompileFailedError, match=rf"{units.name_of(spilling)}: q6k_decode spills [1-9]\d+ bytes"):
        build_ops.build(tmp_path, [90], 1, print)
    assert not (tmp_path / build_ops.LIBRARY).exists()
    result = command("--out", str(tmp_path))
    assert result.exit_code == 6
    assert "spills" in result.stderr


def test_every_variant_has_its_place_in_the_library() -> None:
    pytest.importorskip("torch")
    wanted = list(untraced(units.of_library)())
    assert {unit[1] for unit in wanted} == set(units.FILES)
    assert len({units.name_of(unit) for unit in wanted}) == len(wanted)
    blob, index = generate.cubin_index(cubins.Built(unit, b"code", [], [], "") for unit in wanted)
    places = [tuple(map(int, line.split("}, ")[1].rstrip("},").split(", "))) for line in index.splitlines()[2:-1]]
    assert [at for at, _ in places] == list(range(0, 64 * len(wanted), 64))
    assert {blob[at : at + size] for at, size in places} == {b"code"}
    with pytest.raises(
        ValueError, match="pack.cuh: the library's host side knows Q6K_BITS, .*; variants has Q6K_NEW"
    ):
        units.check((90, "pack.cuh", (("Q6K_NEW", 1),)))
