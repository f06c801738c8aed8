"""How chunks of prompts are launched on a GPU, from sizes alone: no GPU."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from q6k_kernels import PackedLinear
from q6k_kernels.cpp import variants as all_of
from q6k_kernels.cuda import decode, device, gemm_wgmma
from q6k_kernels.generate import chunk_attend_cuda
from q6k_kernels.generate.chunk_cuda import ChunkKernels
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import ProductInput
from q6k_kernels.jit import driver, loader, tensor_map

CPU = torch.device("cpu", 0)


class Launches:
    """The kernels that are loaded and launched, where there is no GPU."""

    def __init__(self, arch: int, patch: pytest.MonkeyPatch) -> None:
        self.loaded, self.launched = Counter[Any](), Counter[str]()
        patch.setattr(device, "device", lambda index: all_of.device_like(arch))
        for module in (device, gemm_wgmma, decode):
            patch.setattr(module, "stream", lambda on: 0)
        patch.setattr(loader, "load", self._load)
        patch.setattr(driver, "current", lambda context: nullcontext())
        patch.setattr(driver, "primary_context", lambda index: 0)
        patch.setattr(tensor_map, "encode", lambda *_, **__: bytes(128))
        for cached in (gemm_wgmma.tile_map, gemm_wgmma.x_map):
            cached.cache_clear()

    def _load(self, *variant: Any) -> Any:
        self.loaded[variant[:3]] += 1

        def launch(grid: Any, threads: int, arguments: bytes, **_: Any) -> None:
            assert min(grid) > 0
            assert arguments
            self.launched[variant[1]] += 1

        return SimpleNamespace(launch=launch)


def kernels() -> ChunkKernels:
    return ChunkKernels(CPU, torch.bfloat16, Kernels(CPU, torch.bfloat16))


def given(rows: int, k: int) -> ProductInput:
    return ProductInput(torch.zeros(rows, k, dtype=torch.bfloat16), None, k)


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    yield
    for cached in (gemm_wgmma.tile_map, gemm_wgmma.x_map):  # which hold what this file's stand-in made
        cached.cache_clear()


def test_a_product_is_prepared_once_for_a_weight_and_a_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, run, module = Launches(90, monkeypatch), kernels(), PackedLinear(512, 96)
    for rows, times in ((64, 1), (64, 1), (65, 2), (64, 2)):
        assert run.multiply(module, given(rows, 512)).shape == (rows, 96)
        assert sum(launches.loaded.values()) == times
    module.tiles = nn.Parameter(module.tiles.clone(), requires_grad=False)  # another weight
    run.multiply(module, given(64, 512))
    assert sum(launches.loaded.values()) == 3
    assert launches.launched == {gemm_wgmma.KERNEL: 5}
    run.multiply(module, given(1, 512))  # for which other kernels are faster
    assert launches.launched[decode.KERNEL] == 1


def test_products_of_other_gpus_and_of_other_modules_are_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, run = Launches(80, monkeypatch), kernels()
    run.multiply(PackedLinear(512, 96), given(64, 512))
    assert gemm_wgmma.KERNEL not in launches.launched
    assert sum(launches.launched.values()) == 1
    dense = nn.Linear(512, 8, dtype=torch.bfloat16)
    assert run.multiply(dense, given(64, 512)).shape == (64, 8)
    assert sum(launches.launched.values()) == 1


def test_recorded_products_share_no_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would go on using what is freed when another product needs more."""
    found, call = list[torch.Tensor | None](), gemm_wgmma.Product.__call__

    def noted(self: gemm_wgmma.Product, *given: torch.Tensor | None) -> None:
        found.append(given[2])
        call(self, *given)  # type: ignore[arg-type]

    Launches(90, monkeypatch)
    monkeypatch.setattr(gemm_wgmma.Product, "__call__", noted)
    for recorded in (False, True):
        run = ChunkKernels(CPU, torch.bfloat16, Kernels(CPU, torch.bfloat16), recorded=recorded)
        run.multiply(PackedLinear(4096, 96), given(64, 4096))
    assert found[0] is not None
    assert len(found[0]) > 0
    assert found[1] is None


def test_between_products_there_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, run, norm = Launches(90, monkeypatch), kernels(), Norm(torch.ones(512), 1e-6)
    monkeypatch.setattr(chunk_attend_cuda, "_in_parts", lambda *given: torch.zeros(given[2].shape[1], 512))
    x = torch.zeros(20, 512, dtype=torch.bfloat16)
    run.add_norm(x, x, norm, norm, [])
    assert launches.launched == {"q6k_add_norm_rows": 1}
    assert run.add_norm(x, None, None, None, [])[1].halves is x  # there is nothing to compute
    run.gate(*x.split(256, -1), "silu", [])
    angles = torch.zeros(64, 64)
    heads = Heads(4, 1, 128, 1.0, None, None, None, angles, angles)
    cached = Cached(*(torch.zeros(1, 1, 64, 128, dtype=torch.bfloat16) for _ in "kv"), 0, 0)
    run.attend(x, x[:, :128], x[:, :128], heads, cached, torch.arange(20), [])
    assert launches.launched == {"q6k_add_norm_rows": 1, "q6k_gate_rows": 1, "q6k_place_heads": 1}


def test_heads_without_kernels_are_computed_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, run, angles = Launches(90, monkeypatch), kernels(), torch.zeros(64, 20)
    heads = Heads(4, 1, 40, 1.0, None, None, None, angles, angles)
    assert not chunk_attend_cuda.supports(heads)
    cached = Cached(*(torch.zeros(1, 1, 64, 40, dtype=torch.bfloat16) for _ in "kv"), 0, 0)
    q, k = (torch.zeros(20, width, dtype=torch.bfloat16) for width in (160, 40))
    found = run.attend(q, k, k, heads, cached, torch.arange(20), []).halves
    assert found is not None
    assert found.shape == (20, 160)
    assert not launches.launched
