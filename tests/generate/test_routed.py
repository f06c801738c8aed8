"""The kernels of a mixture of experts, emulated, against the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import cuda_emulator

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from cuda_emulator.memory import emulate
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.generate import routed_cuda
from q6k_kernels.generate.heads import Norm
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations

pytestmark = cuda_emulator.requires_compiler

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[torch.dtype], Kernels]]:
    memory = emulate(monkeypatch, device_like(80))
    yield lambda dtype: Kernels(torch.device("cpu", 0), dtype)
    memory.check()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "top"), [(1, 1), (5, 5), (32, 8), (128, 8), (257, 32), (512, 10)])
def test_routes_are_those_in_torch(
    make: Callable[[torch.dtype], Kernels], dtype: torch.dtype, experts: int, top: int
) -> None:
    run = make(dtype)
    for scales in (None, random(experts, seed=1).abs()):
        logits = (3 * random(1, experts)).to(dtype)
        chosen, weights = run.route(logits, scales, top)
        # Many logits are alike, in 16 bits: the first of them.
        expected = sorted(range(experts), key=lambda each: (-float(logits[0, each]), each))[:top]
        assert chosen[0].tolist() == expected
        softmax = logits[0, expected].double().softmax(0) * (1.0 if scales is None else scales[expected])
        torch.testing.assert_close(weights[0].double(), softmax, rtol=1e-5, atol=1e-7)


def test_experts_without_numbers_are_within_bounds(make: Callable[[torch.dtype], Kernels]) -> None:
    logits = torch.full((1, 40), float("nan")).bfloat16()
    logits[0, 7] = 1.0
    chosen, _ = make(torch.bfloat16).route(logits, None, 4)
    assert int(chosen[0, 0]) == 7
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < 40


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top", "k"), [(1, 16), (3, 256), (8, 2064)])
def test_rows_are_combined(make: Callable[[torch.dtype], Kernels], dtype: torch.dtype, top: int, k: int) -> None:
    run, rows, weights = make(dtype), random(1, top, k).to(dtype), random(1, top, seed=1)
    found = routed_cuda.combine(run._launch, run._macros, rows, weights)
    expected = torch.einsum("mtk,mt->mk", rows.double(), weights.double())
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3])
def test_gates_of_rows_that_lie_apart(make: Callable[[torch.dtype], Kernels], rows: int) -> None:
    gate, up = random(rows, 96).bfloat16().split(48, -1)
    found = make(torch.bfloat16).gate(gate, up, "gelu_tanh", [nn.Identity()]).halves
    expected = TorchOperations().gate(gate, up, "gelu_tanh", []).halves
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("normed", [True, False])
def test_scaled_sums(make: Callable[[torch.dtype], Kernels], normed: bool) -> None:
    hidden, delta = (random(1, 96, seed=each).bfloat16() for each in (0, 1))
    norm, after = (Norm(1 + random(96, seed=each) / 4, 1e-5) for each in (2, 3))
    (total, found), (expected_total, expected) = (
        each.add_norm(hidden, delta, after, norm if normed else None, [nn.Identity()], scale=0.75)
        for each in (make(torch.bfloat16), TorchOperations())
    )
    for one, other in ((total, expected_total), (found.halves, expected.halves)):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-2, atol=1e-2)
