"""Gated delta nets of a prompt's chunks on the emulated GPU, against the same in plain torch, chunk after chunk."""

from __future__ import annotations

from typing import Any

import pytest

import cuda_emulator

torch = pytest.importorskip("torch")

from chunk_cases import nets_in_chunks
from cuda_emulator.memory import emulate
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.generate.chunk_cuda import ChunkKernels
from q6k_kernels.generate.step_cuda import Kernels

pytestmark = cuda_emulator.requires_compiler


@pytest.mark.parametrize(("dtype", "tiled"), [(torch.bfloat16, True), (torch.float16, False)])
def test_chunks(dtype: torch.dtype, tiled: bool, monkeypatch: Any) -> None:
    memory, cpu = emulate(monkeypatch, device_like(90)), torch.device("cpu", 0)
    nets_in_chunks(ChunkKernels(cpu, dtype, Kernels(cpu, dtype)), dtype, "cpu", tiled)
    memory.check()
