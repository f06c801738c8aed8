"""Activations in 8 bits on the emulated GPU: without divisions, but to the bit what they would give."""

from __future__ import annotations

import pytest

import cuda_emulator

torch = pytest.importorskip("torch")

from torch import Tensor

from cuda_emulator.memory import emulate
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda import decode
from q6k_kernels.ops.reference import quantize_activations

pytestmark = cuda_emulator.requires_compiler
LARGEST = {torch.bfloat16: (0x3F80, 0x0001, 0x0101, 0x7F00), torch.float16: (0x3C00, 0x0001, 0x0400, 0x7500)}
"""Bits of the numbers that the largest of groups begin with: in between, mantissas are the same again."""


def groups(first: int, dtype: torch.dtype) -> Tensor:
    """Groups of 32 whose largest are the numbers from `first` on, beside all down to a 254th: half a code."""
    step = 1 if dtype is torch.bfloat16 else 13
    most = torch.arange(first, first + 128 * step, step)
    others = most[:, None] - torch.arange(0, 34 * 31 * step, step)  # 8 times a mantissa's 128, and some
    rows = others.clamp(min=0).view(len(most), -1, 31)
    rows = torch.cat([most[:, None, None].expand(-1, rows.shape[1], 1), rows], 2)
    sign = torch.where(torch.arange(32) % 3 == 0, 0x8000, 0)
    return (rows.reshape(-1, 256) | sign.repeat(8)).to(torch.uint16).view(dtype)


@pytest.mark.parametrize("dtype", LARGEST)
def test_codes_are_those_of_divisions(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all pairs of bf16 mantissas, of subnormal numbers, zeros, and groups with an infinity or NaN."""
    memory = emulate(monkeypatch, device_like(90))
    monkeypatch.setattr(decode, "stream", lambda on: 0)
    x = torch.cat([groups(first, dtype) for first in LARGEST[dtype]])
    x[5, 40:80] = 0
    x[7, 3], x[9, 100] = torch.inf, torch.nan
    x = x.view(1, -1)
    codes, steps = quantize_activations(x)
    found = decode._quantize(x, 1, device_like(90))
    in_order = codes.view(-1, 4, 4, 2, 4, 2).permute(0, 1, 4, 2, 3, 5)  # [super-block][64][t][sixteen][half][two]
    end = x.shape[1]
    assert torch.equal(found[:end].view(torch.int8), in_order.reshape(-1))
    torch.testing.assert_close(
        found[end : end + steps.numel() * 4].view(torch.float32), steps[0], rtol=0, atol=0, equal_nan=True
    )
    memory.check()
