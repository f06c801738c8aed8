"""Mixtures of experts in a prompt's chunk on the emulated GPU, against the same in plain torch and fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import any_type
import cuda_emulator

torch = pytest.importorskip("torch")

from chunk_cases import random
from cuda_emulator.memory import emulate
from q6k_kernels import PackedWeight
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda import experts_gemm
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate.chunk_cuda import ChunkKernels
from q6k_kernels.generate.heads import Norm
from q6k_kernels.generate.mixture import Mixed, Mixture, MixtureNorms
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations
from q6k_kernels.weights.experts import GATES, PackedExperts

pytestmark = cuda_emulator.requires_compiler
CPU, DTYPE = torch.device("cpu", 0), torch.bfloat16


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChunkKernels]:
    memory = emulate(monkeypatch, device_like(80))
    yield ChunkKernels(CPU, DTYPE, Kernels(CPU, DTYPE))
    memory.check()


def stack(count: int, n: int, k: int) -> PackedWeight:
    row = weight_type("q8_0")
    each = [layout.pack(any_type.planes(row, n, k), row) for _ in range(2)]
    return PackedWeight(torch.stack([each[i % 2] for i in range(count)]), (count, n, k), row.name)


@pytest.mark.parametrize(("count", "top", "gated"), [(37, 5, True), (300, 3, False)])
def test_routes_are_the_largest_logits(run: ChunkKernels, count: int, top: int, gated: bool) -> None:
    router = (random(count + gated, 96) / 20).to(DTYPE)
    router[7] = router[11]  # of equal ones the first is chosen
    mixture = Mixture(router, torch.nn.Identity(), count, top, scales=random(count).abs() if gated else None)
    x = random(11, 96).to(DTYPE)
    chosen, factors = run.route(x, mixture)
    logits = torch.nn.functional.linear(x, router).double()
    for token in range(11):
        expected = sorted(range(count), key=lambda each, own=logits[token]: (-float(own[each]), each))[:top]
        assert chosen[token].tolist() == expected
        shares = logits[token, expected].softmax(0)
        if mixture.scales is not None:
            shares = torch.cat([shares * mixture.scales[expected].double(), logits[token, count:].sigmoid()])
        torch.testing.assert_close(factors[token].double(), shares, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("tokens", [3, 20])
def test_experts_are_those_in_torch(run: ChunkKernels, activation: str, tokens: int) -> None:
    """Few tokens through the kernels for few, more sorted once for both products."""
    count, top, k, between = 4, 2, 256, 64
    parts = [stack(count, 2 * between, k)]
    experts = PackedExperts(parts, stack(count, k, between), activation)
    mixture = Mixture((random(count + 1, k) / 20).to(DTYPE), experts, count, top)
    x, beside = random(tokens, k).to(DTYPE) / 4, random(tokens, k, seed=1).to(DTYPE)
    total, expected = (
        each.add_norm(beside, each.mix(x, mixture, *each.route(x, mixture), beside), None, None, [])[0].float()
        for each in (run, TorchOperations())
    )
    assert (total - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("kind", ["gated", "plain", "alone", "normed", "normed alone"])
def test_outputs_are_added_up(run: ChunkKernels, kind: str) -> None:
    tokens, top, k = 3, 5, 1040
    norms = None
    if "normed" in kind:
        norms = MixtureNorms(*(Norm(1 + random(k, seed=seed) / 4, 1e-5) for seed in range(4)))
    mixed = Mixed(
        rows=random(tokens, top, k).to(DTYPE),
        factors=random(tokens, top + (kind == "gated")),
        beside=None if "alone" in kind else random(tokens, k, seed=1).to(DTYPE),
        norms=norms,
    )
    hidden = torch.zeros(tokens, k, dtype=DTYPE)
    total = run.add_norm(hidden, mixed, None, None, [])[0].double()
    expected = torch.einsum("mtk,mt->mk", mixed.rows.double(), mixed.factors[:, :top].double())
    beside = 0 if mixed.beside is None else mixed.beside.double()
    if norms is not None:
        expected = norms.after_experts(expected).double()
        beside = 0 if mixed.beside is None else norms.after_beside(mixed.beside).double()
    elif kind == "gated":
        beside = beside * mixed.factors[:, top:].double()
    torch.testing.assert_close(total, expected + beside, rtol=2e-2, atol=3e-2)


def test_what_is_sorted_is_given(run: ChunkKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    sorts, original = [], experts_gemm.sort

    def sort(*given: Any) -> Any:
        sorts.append(given)
        return original(*given)

    monkeypatch.setattr(experts_gemm, "sort", sort)
    test_experts_are_those_in_torch(run, "silu", 20)
    assert len(sorts) == 1
