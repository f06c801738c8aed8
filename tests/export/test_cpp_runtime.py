"""The C++ runtime of compiled programs: torch's, whatever the compiler links by itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch._inductor import config

from q6k_kernels import PackedLinear
from q6k_kernels.errors import ExportFailedError
from q6k_kernels.export import cpp_runtime, exporting, program_file

GXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not on PATH")


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes torch compile by a script, given as what precedes its call of g++."""
    archive = Path(
        subprocess.run(
            [str(GXX), "-print-file-name=libstdc++.a"], check=True, capture_output=True, text=True
        ).stdout.strip()
    )
    if not archive.is_absolute():
        pytest.skip("g++ comes without libstdc++.a")
    folder = tmp_path / "static"
    folder.mkdir()
    (folder / archive.name).symlink_to(archive)

    def made(script: str) -> Path:
        path = tmp_path / "c++"
        path.write_text(f'#!/bin/sh\n{script}\nexec {GXX} -L{folder} "$@"\n')
        path.chmod(0o755)
        patches.enter_context(config.patch({"cpp.cxx": (None, str(path))}))
        return path

    with ExitStack() as patches:
        yield made


def test_a_compiler_with_the_shared_runtime_needs_no_option() -> None:
    assert cpp_runtime.link_options() == {}


def test_a_compiler_without_it_links_torchs(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    """The program of a layer then loads and runs; by what the compiler links by itself it would crash."""
    path = compiler("")
    alone = tmp_path / "alone.so"
    source = tmp_path / "alone.cpp"
    source.write_text("#include <iostream>\nvoid print() { std::cout << 1; }\n")
    subprocess.run([path, "-shared", "-fPIC", source, "-o", alone], check=True)
    assert not cpp_runtime.is_shared(alone.read_bytes())
    layer, x = PackedLinear(256, 8), torch.ones(2, 256)
    package = tmp_path / "layer.pt2"
    with torch.no_grad():
        exporting.export_module(layer, (x,), package)
        program_file.check_runtime(package)
        assert torch.equal(torch._inductor.aoti_load_package(str(package))(x), layer(x))


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ('for a do shift; [ "$a" = -l:libstdc++.so.6 ] || set -- "$@" "$a"; done', "as torch loads them"),
        ('[ "$1" != -shared ] || { echo "ld: none" >&2; exit 1; }', "as torch loads them: ld: none"),
    ],
    ids=["its own copy", "no library"],
)
def test_a_compiler_that_links_no_shared_runtime_is_refused(
    compiler: Callable[[str], Path], tmp_path: Path, script: str, told: str
) -> None:
    path = compiler(script)
    expected = rf"^{re.escape(str(path))} links no library that uses libstdc\+\+\.so\.6.*{told}\. Set CXX to"
    with pytest.raises(ExportFailedError, match=expected):
        exporting.export_module(PackedLinear(256, 8), (torch.ones(1, 256),), tmp_path / "layer.pt2")
    assert not list(tmp_path.glob("*.pt2"))
