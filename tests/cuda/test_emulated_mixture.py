"""The kernels of mixtures of experts on the emulated GPU, against the same in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import any_type
import cuda_emulator

torch = pytest.importorskip("torch")

from torch import Tensor

from cuda_emulator.memory import Memory, emulate
from q6k_kernels import PackedWeight
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate.mixture import Mixture
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import ProductInput, TorchOperations
from q6k_kernels.weights.experts import PackedExperts

pytestmark = cuda_emulator.requires_compiler
COUNT, TOP, K, BETWEEN = 37, 5, 2304, 256
"""More columns than a warp loads at once, and experts that do not fill blocks of rows."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    memory = emulate(monkeypatch, device_like(90))
    yield memory
    memory.check()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def stack(n: int, k: int) -> PackedWeight:
    row = weight_type("q8_0")
    each = [layout.pack(any_type.planes(row, n, k), row) for _ in range(2)]
    return PackedWeight(torch.stack([each[i % 2] for i in range(COUNT)]), (COUNT, n, k), row.name)


@pytest.mark.parametrize("joined", [True, False])
def test_experts_are_chosen_and_added_as_in_torch(gpu: Memory, joined: bool) -> None:
    """With an expert that all tokens share where gate and up are joined, without one where they are apart."""
    dtype = torch.bfloat16
    parts = [stack(2 * BETWEEN, K)] if joined else [stack(BETWEEN, K), stack(BETWEEN, K)]
    experts = PackedExperts(parts, stack(K, BETWEEN), "silu")
    router = (random(COUNT + joined, K) / 20).to(dtype)
    router[7] = router[11]  # of equal ones the first is chosen
    mixture = Mixture(router, experts, COUNT, TOP)
    kernels = Kernels(torch.device("cpu", 0), dtype)
    assert kernels.supports_mixture(mixture) == ""
    for seed in range(3):
        x, shared = random(1, K, seed=seed).to(dtype), random(1, K, seed=seed + 9).to(dtype)
        given, beside = ProductInput(x, None, K), shared if joined else None
        found, expected = (each.mix(given, mixture, beside) for each in (kernels, TorchOperations()))
        # Activations of products are in 8 bits.
        assert (found.float() - expected.float()).norm() < 0.02 * expected.float().norm()
        assert not kernels._counted.any()
