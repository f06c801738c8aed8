"""The source distribution builds with a C compiler alone, and its wheel has everything and works by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from inside import without_coverage

ROOT = Path(__file__).parents[2]
SKIPPED = ("__pycache__", "*.so", "*.egg-info", ".*")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"


def build(what: str, source: Path, out: Path, path: str) -> Path:
    environment = {**os.environ, "PATH": path, "PYTHONPATH": ""}
    command = [sys.executable, "-c", BUILD, what, str(out)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution, and from that the wheel, on a PATH with gcc and its assembler and linker."""
    folder = tmp_path_factory.mktemp("packages")
    source = folder / "clone"
    for name in ("kernels", "q6k_convert"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*SKIPPED))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    tools = folder / "tools"
    tools.mkdir()
    for name in ("gcc", "as", "ld"):
        if (found := shutil.which(name)) is None:
            pytest.skip(f"{name} is not on PATH")
        (tools / name).symlink_to(found)
    archive = build("sdist", source, folder / "sdist", os.environ["PATH"])
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return build("wheel", unpacked, folder / "wheel", str(tools))


def test_one_wheel_is_for_every_python(wheel: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["cp311", "abi3"]


def test_the_wheel_has_every_module_and_source(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(folder))
        for folder in (ROOT, ROOT / "kernels")
        for package in ("q6k_convert", "q6k_kernels")
        for kind in ("py", "cuh", "cpp", "h", "c", "map", "txt")
        for path in (folder / package).rglob(f"*.{kind}")
    }
    assert len(wanted) > 200
    assert wanted <= names
    assert {"q6k_convert/convert/_repack.abi3.so", "q6k_kernels/ops/_products.abi3.so"} <= names


def test_the_wheel_converts_and_verifies(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    command = [sys.executable, str(ROOT / "scripts" / "ci" / "check_wheel.py")]
    # Coverage would count the wheel's files beside the repository's.
    environment = without_coverage() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 weight types converted and verified" in done.stdout


def test_the_image_is_made_of_files_that_are_there() -> None:
    """No engine builds it here; its steps are those of the wheel above and of `check_wheel.py`."""
    folder = ROOT / "scripts" / "docker"
    lines = (folder / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    ignored = (folder / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
