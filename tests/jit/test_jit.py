"""Kernels from source to the cache, with the real compiler."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernel_sources import ARCHITECTURES, COMMON, KERNEL, ONE
from q6k_kernels.errors import (
    CompileFailedError,
    CompilerMissingError,
    GpuTooOldError,
    SourceMissingError,
)
from q6k_kernels.jit import compiler, cubin_cache, loader
from q6k_kernels.jit.cubin_cache import CacheWarning

pytestmark = pytest.mark.usefixtures("cache")


# The compiler


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_a_kernel_compiles_for_every_architecture(capability: int, sources: Path) -> None:
    arch = compiler.architecture(divmod(capability, 10))
    assert arch == ARCHITECTURES[capability]
    cubin, log = compiler.compile_cubin(
        compiler.source_text("k.cuh", sources), "k.cuh", compiler.options(ONE, arch)
    )
    assert cubin.startswith(b"\x7fELF")
    assert struct.unpack_from("<H", cubin, 18)[0] == 190  # EM_CUDA
    assert set(compiler.resources(log)) == {"k", "other"}
    assert compiler.resources(log)["k"].registers > 0


def test_hopper_kernels_may_use_what_only_sm_90a_has() -> None:
    source = 'extern "C" __global__ void k() { asm volatile("wgmma.fence.sync.aligned;"); }'
    compiler.compile_cubin(source, "k", compiler.options((), "sm_90a"))
    with pytest.raises(CompileFailedError, match="wgmma"):
        compiler.compile_cubin(source, "k", compiler.options((), "sm_90"))


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1), (0, 0)])
def test_gpus_that_are_too_old_are_refused(capability: tuple[int, int]) -> None:
    with pytest.raises(GpuTooOldError, match=rf"{capability[0]}\.{capability[1]}, the kernels need 8.0"):
        compiler.architecture(capability)


def test_a_mistake_is_reported_where_it_is(sources: Path) -> None:
    (sources / "k.cuh").write_text(KERNEL.replace("*p", "*q"))
    with pytest.raises(CompileFailedError) as caught:
        loader.compiled("k.cuh", ONE, "sm_80", sources)
    assert 'k.cuh(2): error: identifier "q" is undefined' in caught.value.cause
    assert "-DVALUE=1" in caught.value.cause
    assert "^" in caught.value.log
    (sources / "common.cuh").write_text("\n\nnonsense\n")
    with pytest.raises(CompileFailedError, match=re.escape("common.cuh(3): error")):
        loader.compiled("k.cuh", ONE, "sm_80", sources)


def test_a_source_that_is_missing(tmp_path: Path, sources: Path) -> None:
    with pytest.raises(SourceMissingError, match="absent.cuh cannot be read: No such file"):
        loader.compiled("absent.cuh", (), "sm_80", sources)
    with pytest.raises(SourceMissingError, match="common.cuh cannot be read"):
        loader.compiled("k.cuh", (), "sm_80", tmp_path)


@pytest.mark.parametrize("name", ["", "A B", "A;rm", "-O0", "1A"])
def test_a_macro_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected names of macros"):
        compiler.options(((name, 1),), "sm_80")


def test_an_architecture_that_the_compiler_does_not_know() -> None:
    with pytest.raises(CompilerMissingError, match=r"does not know sm_999; it knows .*sm_90"):
        compiler.compile_cubin("", "k", compiler.options((), "sm_999"))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forgets which compiler there is, before and after."""

    def forget() -> None:
        for each in (compiler._nvrtc, compiler.version, compiler.library_path, compiler.identity):
            each.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("fresh_compiler")
def test_no_bindings(monkeypatch: pytest.MonkeyPatch, sources: Path) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CompilerMissingError, match="cuda-bindings is not installed") as caught:
        loader.compiled("k.cuh", ONE, "sm_80", sources)
    assert "pip install cuda-bindings" in caught.value.remedy


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_no_nvrtc(error: type[Exception], monkeypatch: pytest.MonkeyPatch, sources: Path) -> None:
    def version() -> None:
        raise error("libnvrtc.so.13:\n no such file")

    monkeypatch.setattr(compiler, "_nvrtc", lambda: SimpleNamespace(nvrtcVersion=version))
    with pytest.raises(CompilerMissingError, match="NVRTC.* was not found .*: libnvrtc.so.13: no such file"):
        loader.compiled("k.cuh", ONE, "sm_80", sources)
    monkeypatch.undo()


def test_the_compiler_says_what_it_is() -> None:
    assert compiler.version() >= (12, 8)
    assert compiler.library_path().name.startswith("libnvrtc.so")
    assert compiler.identity().startswith(f"nvrtc {compiler.version()[0]}.")


# What kernels take


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas info    : Function properties for two
    40 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 40 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 1.000 ms
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 352 bytes cmem[0]
"""
CALLED = """\
ptxas info    : Function properties for _Z6calledPf
    0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", {}),
        (PTXAS, {"two": (24, 40, 12, 1024), "one": (10, 0, 0, 0)}),
        (PTXAS.replace("    ", "ptxas         .     "), {"two": (24, 40, 12, 1024), "one": (10, 0, 0, 0)}),
        (PTXAS + CALLED, {"two": (24, 40, 16, 1024), "one": (10, 0, 4, 0)}),
    ],
)
def test_the_log_is_read(log: str, expected: dict[str, tuple[int, ...]]) -> None:
    found = compiler.resources(log)
    assert {name: tuple(vars(taken).values()) for name, taken in found.items()} == expected


def test_a_log_without_figures_is_refused() -> None:
    with pytest.raises(ValueError, match="does not say what two, one takes"):
        compiler.resources(PTXAS.replace("Used", "Took"))


def test_figures_of_a_real_kernel() -> None:
    source = """
extern "C" __global__ void k(float* p, int n) {
  __shared__ float s[300];
  float local[50];
  for (int i = 0; i < 50; i++) local[i] = 0;
  for (int i = 0; i < n; i++) local[i * n % 50] += p[i];
  s[threadIdx.x] = local[n];
  __syncthreads();
  *p = s[n];
}"""
    taken = compiler.resources(compiler.compile_cubin(source, "k", compiler.options((), "sm_80"))[1])["k"]
    assert (taken.stack_bytes, taken.spill_bytes, taken.shared_bytes) == (200, 0, 1200)


# The cache


def test_a_compiled_kernel_is_found_again(sources: Path, cache: Path, compiled: list[Any]) -> None:
    first = loader.compiled("k.cuh", ONE, "sm_80", sources)
    assert loader.compiled("k.cuh", ONE, "sm_80", sources) == first
    assert len(compiled) == 1
    (entry,) = cache.iterdir()
    # The format, byte by byte, as its docstring has it.
    log = first.log.encode()
    content = struct.pack("<I", len(log)) + log + first.cubin
    assert entry.read_bytes() == b"q6k cubin 2\n\0\0\0\0" + hashlib.sha256(content).digest() + content
    assert cubin_cache.contents() == cubin_cache.Contents(1, 48 + len(content))
    assert set(compiler.resources(first.log)) == {"k", "other"}


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Path, dict[str, Any]], object]] = {
    "source": lambda _, sources, __: (sources / "k.cuh").write_text(KERNEL + "\n"),
    "preamble": lambda _, sources, __: (sources / "common.cuh").write_text(COMMON + "\n"),
    "value": lambda _, __, call: call.update(defines=(("VALUE", 2),)),
    "macro": lambda _, __, call: call.update(defines=(*ONE, ("MORE", 1))),
    "architecture": lambda _, __, call: call.update(arch="sm_86"),
    "compiler": lambda patch, _, __: patch.setattr(compiler, "identity", lambda: "nvrtc 99.9 1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_makes_another_kernel_compiles(
    change: str, sources: Path, cache: Path, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {"file": "k.cuh", "defines": ONE, "arch": "sm_80", "sources": sources}
    loader.compiled(**call)
    CHANGES[change](monkeypatch, sources, call)
    for _ in range(2):
        loader.compiled(**call)
    assert (len(compiled), len(list(cache.iterdir()))) == (2, 2)


def test_parts_of_a_key_do_not_run_into_each_other() -> None:
    keys = {cubin_cache.key(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc")]}
    assert len(keys) == 5


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut in the header": lambda entry: entry[:40],
    "cut in the cubin": lambda entry: entry[:-1],
    "one byte more": lambda entry: entry + b"\0",
    "a bit of the magic": lambda entry: bytes([entry[0] ^ 1]) + entry[1:],
    "a bit of the checksum": lambda entry: entry[:20] + bytes([entry[20] ^ 1]) + entry[21:],
    "a bit of the cubin": lambda entry: entry[:-1] + bytes([entry[-1] ^ 0x80]),
    "without the header": lambda entry: entry[48:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(damage: str, sources: Path, cache: Path, compiled: list[Any]) -> None:
    right = loader.compiled("k.cuh", ONE, "sm_80", sources)
    (entry,) = cache.iterdir()
    entry.write_bytes(DAMAGES[damage](entry.read_bytes()))
    with pytest.warns(CacheWarning, match="has a damaged entry"):
        again = loader.compiled("k.cuh", ONE, "sm_80", sources)
    assert again.cubin == right.cubin
    assert loader.compiled("k.cuh", ONE, "sm_80", sources) == again
    assert len(compiled) == 2


def test_the_cache_is_for_this_user_alone(sources: Path, cache: Path) -> None:
    loader.compiled("k.cuh", ONE, "sm_80", sources)
    (entry,) = cache.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (cache, entry)] == [0o700, 0o600]


def _pipe(entry: Path) -> None:
    entry.unlink()
    os.mkfifo(entry)


def _link(entry: Path) -> None:
    entry.rename(entry.with_name("elsewhere"))
    entry.symlink_to("elsewhere")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (_pipe, "not used.*expected a regular file"),
    "a link": (_link, "cannot be read: .*symbolic links"),
    "writable by others": (
        lambda entry: entry.chmod(0o666),
        "not used.*only its owner can write, found mode 100666",
    ),
    "writable by the group": (lambda entry: entry.chmod(0o620), "not used.*only its owner can write"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_entry_that_others_may_have_made_is_made_again(
    kind: str, sources: Path, cache: Path, compiled: list[Any]
) -> None:
    right = loader.compiled("k.cuh", ONE, "sm_80", sources)
    (entry,) = cache.iterdir()
    FOREIGN[kind][0](entry)
    with pytest.warns(CacheWarning, match=FOREIGN[kind][1]):
        again = loader.compiled("k.cuh", ONE, "sm_80", sources)
    assert again.cubin == right.cubin
    assert loader.compiled("k.cuh", ONE, "sm_80", sources) == again
    assert len(compiled) == 2


def test_an_entry_of_another_user_is_made_again(
    sources: Path, cache: Path, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader.compiled("k.cuh", ONE, "sm_80", sources)
    (entry,) = cache.iterdir()
    owner = entry.stat().st_uid
    real = os.fstat

    def owned_by(uid: int) -> None:
        monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*real(fd)[:4], uid, *real(fd)[5:10])))
        monkeypatch.setattr(os, "geteuid", lambda: 1000)

    for uid, count in ((0, 1), (1000, 1)):
        owned_by(uid)
        loader.compiled("k.cuh", ONE, "sm_80", sources)
        assert len(compiled) == count
    owned_by(1001)
    with pytest.warns(CacheWarning, match="expected a file of this user or root, found one of user 1001"):
        loader.compiled("k.cuh", ONE, "sm_80", sources)
    assert len(compiled) == 2
    assert entry.stat().st_uid == owner


@pytest.mark.filterwarnings("error")
def test_a_cache_that_cannot_be_used_costs_a_warning(sources: Path, cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    with pytest.warns(CacheWarning) as caught:
        assert loader.compiled("k.cuh", ONE, "sm_80", sources).cubin.startswith(b"\x7fELF")
    assert [str(each.message).split(": ")[0] for each in caught] == [
        f"the cache of compiled kernels, {cache}, cannot be read",
        f"the cache of compiled kernels, {cache}, cannot be written",
    ]
    assert all("Q6K_KERNELS_CACHE names another directory" in str(each.message) for each in caught)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_only_be_read(sources: Path, cache: Path) -> None:
    cache.mkdir(mode=0o500)
    with pytest.warns(CacheWarning, match="cannot be written: .*Permission denied"):
        assert loader.compiled("k.cuh", ONE, "sm_80", sources).cubin.startswith(b"\x7fELF")


def test_a_failed_write_leaves_nothing(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.warns(CacheWarning, match="cannot be written: .*No space left"):
        loader.compiled("k.cuh", ONE, "sm_80", sources)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"Q6K_KERNELS_CACHE": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"Q6K_KERNELS_CACHE": "", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/q6k-kernels"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/q6k-kernels"),
        ({"HOME": "/h"}, "/h/.cache/q6k-kernels"),
    ],
)
def test_the_cache_directory(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Q6K_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cubin_cache.directory() == Path(expected)


def test_processes_share_a_cache(sources: Path, cache: Path) -> None:
    program = (
        "import hashlib, sys; from pathlib import Path; from q6k_kernels.jit import loader as jit\n"
        "for value in range(8):\n"
        "    code = jit.compiled('k.cuh', (('VALUE', value),), 'sm_80', Path(sys.argv[1]))\n"
        "    print(hashlib.sha256(code.cubin).hexdigest())\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(sources)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [each.communicate()[0] for each in running]
    assert [each.returncode for each in running] == [0] * 4
    assert len(set(outputs)) == 1
    assert len(set(outputs[0].split())) == 8
    assert sorted(path.suffix for path in cache.iterdir()) == [".cubin"] * 8
