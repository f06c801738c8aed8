"""How what lies between a step's products is launched on a GPU, from sizes alone: no GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from q6k_kernels import PackedLinear
from q6k_kernels.cpp import variants as all_of
from q6k_kernels.cuda import device
from q6k_kernels.generate import attend_cuda, step_cuda
from q6k_kernels.generate.attend_cuda import HEAD_DIMS, MOST_BLOCKS, MOST_HEADS, attend_static
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.norm_cuda import MOST_K
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TokenChoice
from untraced import untraced

CPU = torch.device("cpu", 0)


class Launches:
    """What kernels are launched with, where there is no GPU."""

    def __init__(self, arch: int, patch: pytest.MonkeyPatch) -> None:
        self.device, self.all = all_of.device_like(arch), list[tuple[Any, Any, int]]()
        patch.setattr(device, "device", lambda index: self.device)
        patch.setattr(device, "stream", lambda on: 0)
        patch.setattr(step_cuda.loader, "load", lambda *variant: SimpleNamespace(launch=self._of(variant[:3])))

    def _of(self, variant: Any) -> Any:
        def launch(grid: Any, threads: int, arguments: bytes, *, shared_bytes: int, **_: Any) -> None:
            assert 1 <= threads <= 1024
            assert arguments
            self.all.append((variant, grid, shared_bytes))

        return launch


def heads_of(dim: int, key_heads: int = 2, group: int = 4) -> Heads:
    angles = torch.zeros(16, dim // 2)
    return Heads(key_heads * group, key_heads, dim, 1.0, None, None, None, angles, angles)


def attend(run: Kernels, heads: Heads) -> Any:
    run.reserve(heads)
    q, k = (torch.zeros(1, count * heads.dim).half() for count in (heads.count, heads.key_heads))
    cached = Cached(*(torch.zeros(1, heads.key_heads, 16, heads.dim).half() for _ in range(2)), 0)
    return run.attend(q, k, k, heads, cached, torch.tensor([3]), [nn.Linear(1, 1)])


@pytest.mark.parametrize("arch", all_of.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_launched_fits_and_is_compiled(arch: int, dtype: torch.dtype, monkeypatch: Any) -> None:
    """A block has room for the shared memory of all sizes that are supported."""
    launches = Launches(arch, monkeypatch)
    run, users = Kernels(CPU, dtype), [nn.Linear(1, 1)]
    for dim in HEAD_DIMS:
        assert run.supports(256, 256, heads_of(dim)) == ""
        attend(run, heads_of(dim))
    for hidden in (32, 4096, 4128, 8192, MOST_K):
        x, norm = torch.zeros(1, hidden, dtype=dtype), Norm(torch.zeros(hidden), 0.0)
        if run.supports(hidden, hidden, heads_of(64)) == "":
            run.add_norm(x, x, norm, norm, users)
        run.gate(x, x, "silu", users)
    for size in (1, 262144):
        state = [torch.zeros(1, dtype=torch.int64) for _ in range(4)]
        run.choose(torch.zeros(1, size, dtype=dtype), None, TokenChoice(*state, 0.0))  # type: ignore[arg-type]
    known = set(untraced(all_of.all_variants)(arch))
    for variant, grid, shared_bytes in launches.all:
        assert variant in known
        assert min(grid) > 0
        own = attend_static(dict(variant[2]).get("Q6K_HEAD_DIM", 64))
        assert shared_bytes + own <= launches.device.shared_bytes, (variant, shared_bytes)


@pytest.mark.parametrize("multiprocessors", [1, 20, 132])
def test_every_head_has_its_blocks(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(90, monkeypatch)
    launches.device = replace(launches.device, multiprocessors=multiprocessors)
    run = Kernels(CPU, torch.float16)
    for key_heads in (1, 2, 8, 40):
        for group in (1, 2, 3, 5, 7, 8, 11, 12, 16):
            heads = heads_of(64, key_heads, group)
            rows, blocks, together = attend_cuda.grid(heads, run._device)
            assert rows * together == heads.count
            assert 1 <= together <= MOST_HEADS
            assert group % together == 0  # all of a block with the same keys
            assert 1 <= blocks <= MOST_BLOCKS
            assert rows * blocks <= max(rows, multiprocessors)
            assert attend(run, heads).halves.shape == (1, heads.count * 64)
            assert launches.all[-1][1] == (blocks, rows, 1)
            # Sums of a head, their weight and maximum, by block; a counter for each row.
            assert len(run._partials) >= heads.count * blocks * (64 + 2)
            assert len(run._counters) >= rows
    assert not run._counters.any()


def test_activations_come_in_the_forms_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    Launches(90, monkeypatch)
    run, norm = Kernels(CPU, torch.bfloat16), Norm(torch.zeros(512), 0.0)
    packed, wide = PackedLinear(512, 16), PackedLinear(512, 16, activations="bf16")
    for users, halves, codes in [
        ([packed], False, True),
        ([packed, nn.Linear(1, 1)], True, True),
        ([nn.Linear(1, 1)], True, False),
        ([wide], True, False),
        ([packed, wide], True, True),
    ]:
        total, x = run.add_norm(torch.zeros(1, 512).bfloat16(), None, None, norm, users)  # type: ignore[arg-type]
        assert total.shape == (1, 512)
        assert (x.halves is not None, x.codes is not None, x.k) == (halves, codes, 512)
        if x.halves is not None:
            assert (x.halves.shape, x.halves.dtype) == ((1, 512), torch.bfloat16)


def test_sizes_without_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Launches(90, monkeypatch)
    run, fine = Kernels(CPU, torch.float16), heads_of(128)
    assert run.supports(4096, 14336, fine) == ""
    assert "a hidden size of 4112: expected a multiple of 32" in run.supports(4112, 14336, fine)
    assert f"up to {MOST_K}" in run.supports(MOST_K + 32, 14336, fine)
    assert "an intermediate size of 48" in run.supports(4096, 48, fine)
    assert "heads of 80 values: expected 64, 96, 128, 256, 512" in run.supports(4096, 14336, heads_of(80))
