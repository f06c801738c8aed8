"""Host memory in place of a GPU's: filled with garbage, between guards that no kernel may overwrite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cuda_emulator
from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda.device import Device
from q6k_kernels.jit import loader

GARBAGE, GUARD = 0xEB, 1 << 16


class Memory:
    """Allocator that stands in for `torch.empty`."""

    def __init__(self, empty: Callable[..., torch.Tensor]) -> None:
        self._empty = empty
        self._blocks: list[torch.Tensor] = []

    def empty(self, *shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        """Return a tensor like `torch.empty`, with garbage and guards, 16-byte aligned like a GPU's."""
        like = self._empty(*shape, dtype=dtype, device="meta")
        size = like.numel() * like.element_size()
        block = torch.full((size + 2 * GUARD + 15,), GARBAGE, dtype=torch.uint8)
        block = block[-block.data_ptr() % 16 :][: size + 2 * GUARD]
        self._blocks.append(block)
        return block[GUARD : GUARD + size].view(dtype).view(like.shape)

    def check(self) -> None:
        """Check that all guards are intact."""
        for block in self._blocks:
            assert (block[:GUARD] == GARBAGE).all(), "a kernel wrote before its output"
            assert (block[-GUARD:] == GARBAGE).all(), "a kernel wrote past its output"


def emulate(monkeypatch: pytest.MonkeyPatch, device: Device) -> Memory:
    """Make host code that launches kernels run them on the CPU, with tensors of the CPU."""
    memory = Memory(torch.empty)
    monkeypatch.setattr(loader, "load", cuda_emulator.load)
    monkeypatch.setattr(launching, "device", lambda index: device)
    monkeypatch.setattr(launching, "stream", lambda on: 0)
    monkeypatch.setattr(torch, "empty", memory.empty)
    return memory
