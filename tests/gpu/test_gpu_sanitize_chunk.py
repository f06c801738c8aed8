"""What compute-sanitizer runs of a prompt's chunk: see test_gpu_sanitize.py.

Rings that wrap are left to other tests: torch copies them, which initcheck does not see.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from chunk_cases import CASES, heads_in_chunks, nets_in_chunks, random
from q6k_kernels.generate.chunk_cuda import ChunkKernels
from q6k_kernels.generate.heads import Norm
from q6k_kernels.generate.mixture import Mixed, Mixture
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]
DTYPE = torch.float16


def kernels() -> ChunkKernels:
    device = torch.device("cuda", 0)
    return ChunkKernels(device, DTYPE, Kernels(device, DTYPE))


def check(found: Any, expected: Any) -> None:
    torch.cuda.synchronize()
    torch.testing.assert_close(found.cpu(), expected, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("case", [case for case in CASES if not case[2]])
def test_heads(case: Any) -> None:
    heads_in_chunks(kernels(), DTYPE, "cuda", *case)


def test_delta_nets() -> None:
    nets_in_chunks(kernels(), DTYPE, "cuda", tiled=True)


@pytest.mark.parametrize("k", [96, 5376])
def test_sums_norms_and_gates(k: int) -> None:
    hidden, delta = (random(3, k, seed=seed).to(DTYPE) for seed in (0, 1))
    weights = [random(k, seed=seed) for seed in (2, 3)]
    run, reference = kernels(), TorchOperations()
    total, x = run.add_norm(
        hidden.cuda(), delta.cuda(), *(Norm(each.cuda(), 1e-5, centred=True) for each in weights), []
    )
    right, expected = reference.add_norm(hidden, delta, *(Norm(each, 1e-5, centred=True) for each in weights), [])
    check(total, right)
    check(x.halves, expected.halves)
    gated = run.gate(hidden.cuda(), delta.cuda(), "gelu_tanh", []).halves
    check(gated, reference.gate(hidden, delta, "gelu_tanh", []).halves)


def test_routes_and_sums_of_experts() -> None:
    router, x, run = (random(41, 96) / 20).to(DTYPE), random(11, 96).to(DTYPE), kernels()
    mixtures = [Mixture(each, torch.nn.Identity(), 40, 3) for each in (router.cuda(), router)]
    chosen, factors = run.route(x.cuda(), mixtures[0])
    check(factors, TorchOperations().route(x, mixtures[1])[1])
    assert chosen.shape == (11, 3)
    rows, beside = random(11, 3, 96).to(DTYPE), random(11, 96).to(DTYPE)
    mixed = [Mixed(*each, None) for each in ((rows.cuda(), factors, beside.cuda()), (rows, factors.cpu(), beside))]
    check(run._added(mixed[0]), mixed[1].sum())
