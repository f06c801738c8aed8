"""Compare the library's plans and launches with Python's, in a process where libcuda is `fake_cuda.c`.

`test_cpp_ops.py` runs this. Both sides get the same memory, so every byte passed to the driver is compared.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cpp_library import DECODE, H200, MMA, PRODUCTS, WGMMA, Functions, Product, named_cubin
from fake_cuda import FakeCuda
from q6k_kernels.cpp import variants
from q6k_kernels.cuda import decode, decode_plan, expand, gemm_mma, gemm_wgmma
from q6k_kernels.cuda import device as launching
from q6k_kernels.errors import CudaError
from q6k_kernels.formats.tiles import tiles_shape
from q6k_kernels.formats.types import WEIGHT_TYPES
from q6k_kernels.jit import loader
from q6k_kernels.jit.compiler import Compiled

FAKE = Path(os.environ["Q6K_FAKE_CUDA"])
STREAM, TICKET = 0x5EED, 1 << 40
SMALL = launching.Device(0, 90, 7, 227 << 10, 228 << 10)
GPUS = [*(variants.device_like(arch) for arch in variants.ARCHITECTURES), H200, SMALL]
ROWS = (1, 15, 16, 17, 100, 1000, 1024, 2048, 4096, 5376, 14336, 21504, 65536, 128256, 262144, 4000000)
COLUMNS = (256, 512, 800, 2304, 4096, 5376, 8192, 8448, 14336, 16384, 21504, 32768, 65536)
MANY = (1, 2, 8, 9, 16, 17, 33, 64, 65, 128, 129, 256, 257, 300, 512, 1000, 2048, 4096, 100000)


@pytest.fixture(scope="module")
def functions() -> Functions:
    return Functions(Path(os.environ["Q6K_OPS_LIBRARY"]))


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    """Return the stand-in driver of both sides, one library that LD_LIBRARY_PATH finds, too."""
    fake = FakeCuda(FAKE)
    yield fake
    fake.reset()


# Plans


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.arch}-{gpu.multiprocessors}")
def test_decode_plans(functions: Functions, gpu: launching.Device) -> None:
    some = 0
    for n, k, row, m in itertools.product(ROWS, COLUMNS, WEIGHT_TYPES.values(), range(1, 9)):
        plan = decode_plan.plan(m, n, k, row, gpu)
        wanted = None
        if plan is not None:
            some += 1
            wanted = [*map(int, plan.kernel), plan.cluster, plan.ranges, int(plan.early), plan.shared_bytes]
        assert functions.decode(m, n, k, row, gpu) == wanted, (m, n, k, row.name)
    assert some > 1000


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.arch == 90], ids=lambda gpu: str(gpu.multiprocessors))
def test_wgmma_plans(functions: Functions, gpu: launching.Device) -> None:
    shared, rows = 0, itertools.cycle(WEIGHT_TYPES.values())  # only the ring's depth depends on the type
    for n, k, m in itertools.product(ROWS, COLUMNS, MANY):
        plan, row = gemm_wgmma.plan(m, n, k, gpu), next(rows)
        c, counts = plan.config, [plan.token_blocks, plan.row_blocks, plan.blocks, plan.whole]
        config = [c.tokens, c.consumers, c.stages(row), c.x_stages, c.occupancy, c.cycles]
        wanted = [*config, *counts, plan.scratch_floats, plan.scratch_flags, c.shared_bytes(row)]
        assert functions.wgmma(m, n, k, row, gpu) == wanted, (m, n, k, row.name)
        shared += plan.shared > 0
    assert shared > 500


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm_{gpu.arch}-{gpu.multiprocessors}")
def test_mma_plans(functions: Functions, gpu: launching.Device) -> None:
    for n, k, row, m in itertools.product(ROWS[:12], COLUMNS[::2], WEIGHT_TYPES.values(), MANY[:15]):
        plan = gemm_mma.plan(m, n, k, row, gpu)
        wanted = [plan.tokens, plan.parts, plan.splits, plan.slots, plan.grid[0], plan.shared_bytes]
        assert functions.mma(m, n, k, row, gpu) == wanted, (m, n, k, row.name)
        assert plan.grid[1:] == (plan.splits, 1)


def test_slices_for_cublas(functions: Functions) -> None:
    for m, k in itertools.product(MANY, COLUMNS):
        assert functions.slice_rows(m, k) == expand.slice_rows(m, k)


# Launches


class Memory:
    """Memory of a product. Scratch memory of both sides comes from one buffer, at distances of 512 bytes."""

    def __init__(self, product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
        dtype = torch.float16 if product.fp16 else torch.bfloat16
        self.product = product
        self.x = torch.zeros(product.m, product.k + 8, dtype=dtype)[:, : product.k]
        self.tiles = torch.zeros(tiles_shape((product.n, product.k), product.row), dtype=torch.uint8)
        self.bias = torch.zeros(product.n) if product.row.stepped else None
        self.y = torch.zeros(product.m, product.n, dtype=dtype)
        self._room = torch.zeros(64 << 20, dtype=torch.uint8)
        self._begin = -self._room.data_ptr() % 512
        self.arena = self._room.data_ptr() + self._begin
        self._empty, self._patch = torch.empty, monkeypatch

    def python(self, device: launching.Device, fake: FakeCuda) -> list[str]:
        """Return Python's calls of the driver."""
        at = self._begin

        def empty(*shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
            nonlocal at
            count = torch.Size(shape).numel() * dtype.itemsize
            taken = self._room[at : at + max(count, 1)]
            at += -(-count // 512) * 512
            return taken.view(dtype).view(shape) if count else taken

        with self._patch.context() as patch:
            patch.setattr(torch, "empty", empty)
            for module in (launching, decode, gemm_wgmma):
                patch.setattr(module, "stream", lambda on: STREAM)
            patch.setattr(launching, "device", lambda index: device)
            patch.setattr(gemm_wgmma, "_tickets", itertools.count(TICKET))
            gemm_wgmma.tile_map.cache_clear()
            gemm_wgmma.x_map.cache_clear()
            arguments = self.x, self.tiles, self.bias, self.product.n, self.product.row, self.y
            if self.product.kind == MMA:
                gemm_mma.linear(*arguments)
            else:
                (decode if self.product.kind == DECODE else gemm_wgmma).linear(*arguments, device)
        return asked(fake)

    def library(self, functions: Functions, device: launching.Device) -> str | None:
        """Make the library launch the same, and return its error."""
        bias = 0 if self.bias is None else self.bias.data_ptr()
        pointers = [self.x.data_ptr(), self.tiles.data_ptr(), bias, self.y.data_ptr(), STREAM, self.arena]
        kind = 0 if self.bias is None else 3
        return functions.launch(
            self.product, device, pointers, stride=self.x.stride(0), bias_kind=kind, ticket=TICKET
        )


def asked(fake: FakeCuda) -> list[str]:
    """Return the recorded launches and tensor maps, in order within each kind."""
    return [*fake.lines("map"), *fake.lines("launch")]


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Python compile nothing: the recording driver needs only a kernel's name."""
    kernels = (decode.KERNEL, decode.QUANTIZE, gemm_wgmma.KERNEL, gemm_mma.KERNEL, gemm_mma.REDUCE)
    monkeypatch.setattr(loader, "compiled", lambda *_: Compiled(named_cubin(kernels), ""))


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_launches(product: Product, functions: Functions, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(product, monkeypatch)
    wanted = memory.python(product.device, fake)
    assert wanted
    fake.reset()
    assert memory.library(functions, product.device) is None
    assert asked(fake) == wanted
    assert (fake.depth, fake.mode) == (0, 0)
    if product.kind == WGMMA:
        assert len(fake.lines("map")) == 2


def test_another_gpu(functions: Functions, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.reset(devices=3)
    second = launching.Device(2, 90, 132, 227 << 10, 228 << 10)
    memory = Memory(PRODUCTS[0], monkeypatch)
    wanted = memory.python(second, fake)
    fake.reset(devices=3)
    assert memory.library(functions, second) is None
    assert asked(fake) == wanted
    assert all("device=2 " in line for line in fake.lines("launch"))


def test_first_use_by_many_threads(functions: Functions, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many threads launch first on an unused GPU: its kernel is loaded once, in relaxed capture mode."""
    fake.reset(devices=8)
    device, memory = launching.Device(5, 90, 132, 227 << 10, 228 << 10), Memory(PRODUCTS[0], monkeypatch)
    barrier, wrong = threading.Barrier(16), list[str | None]()

    def run() -> None:
        barrier.wait()
        wrong.append(memory.library(functions, device))

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [None] * 16
    assert fake.lines("retain") == ["retain 5"]
    assert fake.lines("function") == ["function device=5 mode=2"]
    assert len(fake.lines("set shared=")) == 1
    assert len(fake.lines("launch")) == 16
    assert len(set(fake.lines("launch"))) == 1


@pytest.mark.parametrize("code", [719, 1])
def test_a_launch_that_fails(
    code: int, functions: Functions, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(PRODUCTS[0], monkeypatch)
    fake.fail("cuLaunchKernelEx", code)
    with pytest.raises(CudaError) as expected:
        memory.python(H200, fake)
    assert memory.library(functions, H200) == str(expected.value)
    fake.reset()
    assert memory.library(functions, H200) is None


def test_what_the_library_has_no_kernel_for(
    functions: Functions, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(PRODUCTS[0], monkeypatch)
    told = memory.library(functions, launching.Device(0, 86, 84, 99 << 10, 100 << 10))
    assert told is not None
    assert "has no kernel q6k_decode" in told
    assert "compute capability 8.6; it was built for 80,90" in told
    assert "q6k-convert build-ops --arch 86" in told


def test_activations_that_do_not_fit(functions: Functions, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    product, small = (
        Product(DECODE, 1, 16, 1 << 18, "q6_k", False),
        launching.Device(0, 80, 108, 163 << 10, 164 << 10),
    )
    memory = Memory(product, monkeypatch)
    with pytest.raises(ValueError, match="do not fit") as expected:
        memory.python(small, fake)
    assert memory.library(functions, small) == str(expected.value)
