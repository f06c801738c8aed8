"""The kernels of a prompt's chunk, emulated: sums, norms and gates against fp64, heads against plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import cuda_emulator

torch = pytest.importorskip("torch")

from torch import Tensor

from chunk_cases import CASES, heads_in_chunks, random
from cuda_emulator.memory import emulate
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.generate import chunk_attend_cuda
from q6k_kernels.generate.chunk_cuda import ChunkKernels
from q6k_kernels.generate.heads import Norm
from q6k_kernels.generate.step_cuda import Kernels

pytestmark = cuda_emulator.requires_compiler
CPU = torch.device("cpu", 0)
Make = Callable[[torch.dtype], ChunkKernels]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    memory = emulate(monkeypatch, device_like(90))
    yield lambda dtype: ChunkKernels(CPU, dtype, Kernels(CPU, dtype))
    memory.check()


def normed(x: Tensor, norm: Norm) -> Tensor:
    x = x.double() - (x.double().mean(-1, keepdim=True) if norm.centred else 0)
    return x / (x.square().mean(-1, keepdim=True) + norm.epsilon).sqrt() * norm.weight.double()


@pytest.mark.parametrize(
    ("dtype", "k", "with_delta", "with_after", "with_norm"),
    [
        (torch.bfloat16, 96, True, True, True),
        (torch.bfloat16, 2080, False, False, True),
        (torch.bfloat16, 5376, True, True, True),
        (torch.float16, 8192, True, False, False),
    ],
)
def test_sums_and_norms_of_rows(
    make: Make, dtype: torch.dtype, k: int, with_delta: bool, with_after: bool, with_norm: bool
) -> None:
    hidden, delta = (3 * random(3, k)).to(dtype), random(3, k, seed=1).to(dtype)
    norm, after = (Norm(1 + random(k, seed=seed) / 4, 1e-3, centred=k == 2080) for seed in (2, 3))
    total, x = make(dtype).add_norm(
        *(hidden, delta if with_delta else None, after if with_after else None, norm if with_norm else None),
        *([], 0.25, 0.5),
    )
    expected = hidden.double()
    if with_delta:
        added = normed(delta, after).to(dtype) if with_after else delta
        expected = (expected + 0.25 * added.double()) * 0.5
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-3}
    torch.testing.assert_close(total.double(), expected, **close)
    assert x.halves is not None
    torch.testing.assert_close(x.halves.double(), normed(total, norm) if with_norm else expected, **close)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu_squared"])
def test_gates_are_halves_of_a_product(make: Make, activation: Any) -> None:
    gate, up = (4 * random(3, 2 * 1040)).bfloat16().split(1040, -1)
    x = gate.double()
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    share = {"silu": x.sigmoid(), "gelu_tanh": (1 + inner.tanh()) / 2, "relu_squared": x.clamp(min=0)}[activation]
    for factor in (up, None):
        found = make(torch.bfloat16).gate(gate, factor, activation, []).halves
        assert found is not None
        expected = x * share * (1 if factor is None else up.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("dim", "group", "window", "rotated", "more"), CASES)
def test_heads_in_chunks(
    make: Make, dim: int, group: int, window: int, rotated: int, more: dict[str, Any], monkeypatch: Any
) -> None:
    """Chunks after each other, of which the second wraps a ring and the third is longer than one."""
    monkeypatch.setattr(chunk_attend_cuda, "SCORES_AT_ONCE", 2 * group * 40 * 5)  # some five queries at a time
    heads_in_chunks(make(torch.bfloat16), torch.bfloat16, "cpu", dim, group, window, rotated, more)
