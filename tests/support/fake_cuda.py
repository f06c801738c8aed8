"""Build `fake_cuda.c` and put it in the driver's place until the process ends."""

from __future__ import annotations

import ctypes
import os
import shutil
import site
import subprocess
from pathlib import Path

import pytest

from q6k_kernels.jit import driver, loader, tensor_map

COMPILER = shutil.which("gcc") or "cc"
SOURCE = Path(__file__).with_name("fake_cuda.c")
NAME = "libcuda.so.1"
CACHES = (
    driver.bindings,
    driver.library,
    driver.device_handle,
    driver.capability,
    driver.most_shared_bytes,
    driver.launches_cooperatively,
    driver._primary_context,
    tensor_map._encode_tiled,
    tensor_map.encode,
)


def headers() -> Path:
    """Return the folder of NVIDIA's cuda.h, from the package nvidia-cuda-runtime or a toolkit."""
    places = [Path(each) / "nvidia" / "cu13" / "include" for each in site.getsitepackages()]
    for place in (*places, Path("/usr/local/cuda/include")):
        if (place / "cuda.h").exists():
            return place
    pytest.skip("no cuda.h: install nvidia-cuda-runtime")


def build(folder: Path) -> Path:
    """Compile the stand-in driver."""
    library = folder / NAME
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-D_GNU_SOURCE", f"-I{headers()}", f"-Wl,-soname,{NAME}"]
    subprocess.run([*command, str(SOURCE), "-o", str(library), "-lpthread"], check=True)
    return library


class FakeCuda:
    """Settings and records of the stand-in driver, for tests."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(NAME, mode=os.RTLD_NOLOAD)
        except OSError:
            # Loaded by this name, so that every later request for the driver gets this library.
            self._library = ctypes.CDLL(str(path))
        if not hasattr(self._library, "fake_record"):
            pytest.skip("NVIDIA's own driver is loaded in this process: run this test in another")
        self._library.fake_record.restype = ctypes.c_char_p
        self._library.fake_fail.argtypes = (ctypes.c_char_p, ctypes.c_int)
        self.reset()

    def reset(
        self, *, version: int = 13000, devices: int = 1, capability: int = 90, static_shared: int = 0
    ) -> None:
        self._library.fake_reset(version, devices, capability, static_shared)
        for each in CACHES:
            each.cache_clear()
        for known in (loader._locks, loader._libraries, loader._kernels):
            known.clear()

    def fail(self, function: str, code: int) -> None:
        self._library.fake_fail(function.encode(), code)

    def refuse_cooperation(self) -> None:
        """Make GPUs that have no cooperative launches."""
        self._library.fake_cooperates(0)

    def slow(self, microseconds: int) -> None:
        """Make every launch take that long, so that another thread has time to interfere."""
        self._library.fake_slow(microseconds)

    def lines(self, first: str = "") -> list[str]:
        """Return the recorded lines of one kind."""
        return [each for each in self._library.fake_record().decode().splitlines() if each.startswith(first)]

    @property
    def depth(self) -> int:
        """Return the number of contexts on the calling thread's stack."""
        return int(self._library.fake_depth())

    @property
    def mode(self) -> int:
        """Return the calling thread's capture mode; 0, global, at first."""
        return int(self._library.fake_mode())
