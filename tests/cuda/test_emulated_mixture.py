"""The kernels of mixtures of experts and of sums between products, emulated, against the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import any_type
import cuda_emulator

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from cuda_emulator.memory import emulate
from q6k_kernels import PackedLinear, PackedWeight
from q6k_kernels.cpp.variants import device_like
from q6k_kernels.cuda import decode
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate.chunk_cuda import ChunkKernels
from q6k_kernels.generate.heads import Norm
from q6k_kernels.generate.mixture import Mixed, Mixture, MixtureNorms
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import TorchOperations
from q6k_kernels.weights.experts import PackedExperts

pytestmark = cuda_emulator.requires_compiler
DTYPES = [torch.bfloat16, torch.float16]
Make = Callable[[torch.dtype], Kernels]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    memory = emulate(monkeypatch, device_like(90))
    yield lambda dtype: Kernels(torch.device("cpu", 0), dtype)
    memory.check()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def norm(k: int, seed: int) -> Norm:
    return Norm(1 + random(k, seed=seed) / 4, 1e-5)


def norms(k: int) -> MixtureNorms:
    return MixtureNorms(*(norm(k, seed) for seed in range(4)))


def assert_near(found: Tensor | None, expected: Tensor | None) -> None:
    """Two roundings apart at most."""
    assert found is not None
    assert expected is not None
    assert found.dtype == expected.dtype
    apart = 2 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected.double(), rtol=apart, atol=apart)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "top"), [(1, 1), (5, 5), (32, 8), (128, 8), (257, 32), (512, 10)])
def test_the_experts_of_the_largest_logits_are_chosen(
    make: Make, dtype: torch.dtype, experts: int, top: int
) -> None:
    """Logits are weights of the router, as of a token all of whose values but one are 0, or its biases."""
    run, logits = make(dtype), (3 * random(experts)).to(dtype)
    x, router = torch.zeros(1, 16, dtype=dtype), torch.randn(experts, 16).to(dtype)
    x[0, 3], router[:, 3] = 1.0, logits
    # Many logits are alike, in 16 bits: the first of them.
    expected = sorted(range(experts), key=lambda each: (-float(logits[each]), each))[:top]
    zeros = torch.zeros_like(router)
    for weights, bias, scales in (
        (router, None, None),
        (router, None, random(experts, seed=1).abs()),
        (zeros, logits, None),
    ):
        chosen, factors = run.route(x, Mixture(weights, nn.Identity(), experts, top, scales, bias=bias))
        assert not run._counted.any()
        assert chosen[0].tolist() == expected
        softmax = logits[expected].double().softmax(0) * (1.0 if scales is None else scales[expected])
        torch.testing.assert_close(factors[0].double(), softmax, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_experts_without_numbers_are_within_bounds(make: Make) -> None:
    logits = torch.full((40,), float("nan")).bfloat16()
    logits[7] = 1.0
    x, run = torch.ones(1, 8).bfloat16(), make(torch.bfloat16)
    chosen, _ = run.route(x, Mixture(logits[:, None].repeat(1, 8), nn.Identity(), 40, 4))
    assert int(chosen[0, 0]) == 7
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < 40


def stack(count: int, n: int, k: int) -> PackedWeight:
    row = weight_type("q8_0")
    each = [layout.pack(any_type.planes(row, n, k), row) for _ in range(2)]
    return PackedWeight(torch.stack([each[i % 2] for i in range(count)]), (count, n, k), row.name)


@pytest.mark.parametrize(
    ("joined", "activation"),
    [(True, "silu"), (False, "silu"), (True, "gelu_tanh"), (False, "clamped_swiglu")],
)
def test_experts_are_multiplied_as_in_torch(make: Make, joined: bool, activation: str) -> None:
    """More columns than a warp loads at once, and experts that do not fill blocks of rows.

    With an expert that all tokens share where gate and up are joined, without one where they are apart, with norms
    where the activation is Gemma's, with biases where it is that of gpt-oss.
    """
    count, top, k, between, dtype = 37, 5, 3328, 256, torch.bfloat16
    parts = [stack(count, 2 * between, k)] if joined else [stack(count, between, k), stack(count, between, k)]
    normed, biased = activation == "gelu_tanh", activation == "clamped_swiglu"
    rows = [each.shape[1] for each in parts] + [k]
    biases = [(6 * random(count, n)).to(dtype) for n in rows] if biased else None
    experts = PackedExperts(parts, stack(count, k, between), activation, biases)
    router = (random(count + (joined and not normed), k) / 20).to(dtype)
    router[7] = router[11]  # of equal ones the first is chosen
    scales = random(count).abs() if normed else None
    bias = random(len(router), seed=5).to(dtype) if biased else None
    mixture = Mixture(router, experts, count, top, scales, norms(k) if normed else None, bias)
    kernels = make(dtype)
    assert kernels.supports_mixture(mixture) == ""
    for seed in range(2):
        x = random(1, k, seed=seed).to(dtype)
        beside = random(1, k, seed=seed + 9).to(dtype) if joined else None
        totals = list[Tensor]()
        for each in (kernels, TorchOperations()):
            chosen, factors = each.route(x, mixture)
            mixed = each.mix(x, mixture, chosen, factors, beside)
            assert mixed.gated == (joined and not normed)
            totals.append(mixed.sum().float())
        # Activations of products are in 8 bits.
        assert (totals[0] - totals[1]).norm() < 0.02 * totals[1].norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top", "k"), [(1, 96), (5, 256), (8, 4128)])
@pytest.mark.parametrize("kind", ["alone", "gated", "normed"])
def test_the_sum_of_a_mixture_is_part_of_the_residual_sum(
    make: Make, dtype: torch.dtype, top: int, k: int, kind: str
) -> None:
    rows, hidden, beside = (random(1, *shape, seed=len(shape)).to(dtype) for shape in ((top, k), (k,), (k,)))
    factors = random(1, top + (kind == "gated"), seed=3).to(dtype).float()
    mixed = Mixed(rows, factors, None if kind == "alone" else beside, norms(k) if kind == "normed" else None)
    after = norm(k, 7) if kind == "normed" else None
    (total, x), (expected_total, expected) = (
        each.add_norm(hidden, mixed, after, norm(k, 5), [nn.Identity()], 0.5, 0.75)
        for each in (make(dtype), TorchOperations())
    )
    assert_near(total, expected_total)
    assert_near(x.halves, expected.halves)


@pytest.mark.parametrize("k", [96, 4128])
def test_further_norms_of_a_sum(make: Make, k: int) -> None:
    hidden, delta = (random(1, k, seed=each).bfloat16() for each in (0, 1))
    further = norm(k, 3), norm(k, 4)
    (total, x), (expected_total, expected) = (
        each.add_norm(hidden, delta, norm(k, 1), norm(k, 2), [nn.Identity()], further=further)
        for each in (make(torch.bfloat16), TorchOperations())
    )
    assert len(x.further) == len(expected.further) == 2
    assert_near(total, expected_total)
    assert_near(x.halves, expected.halves)
    for one, other in zip(x.further, expected.further, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("kind", ["alone", "gated", "normed"])
def test_sums_and_further_norms_of_a_chunk(make: Make, kind: str) -> None:
    k, top, rows, dtype = 96, 4, 3, torch.bfloat16
    hidden, beside = (random(rows, k, seed=each).to(dtype) for each in (0, 1))
    factors = random(rows, top + (kind == "gated"), seed=3).to(dtype).float()
    outputs = random(rows, top, k).to(dtype)
    mixed = Mixed(outputs, factors, None if kind == "alone" else beside, norms(k) if kind == "normed" else None)
    chunk = ChunkKernels(torch.device("cpu", 0), dtype, make(dtype))
    (total, x), (expected_total, expected) = (
        each.add_norm(hidden, mixed, norm(k, 7), norm(k, 5), [nn.Identity()], further=(norm(k, 3), norm(k, 4)))
        for each in (chunk, TorchOperations())
    )
    assert_near(total, expected_total)
    for one, other in zip((x.halves, *x.further), (expected.halves, *expected.further), strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("rows", [1, 3])
def test_gates_of_rows_that_lie_apart(make: Make, rows: int) -> None:
    gate, up = random(rows, 96).bfloat16().split(48, -1)
    found, expected = (
        each.gate(gate, up, "gelu_tanh", [nn.Identity()]) for each in (make(torch.bfloat16), TorchOperations())
    )
    assert_near(found.halves, expected.halves)


@pytest.mark.parametrize("k", [96, 288, 4352])
def test_codes_past_the_last_value_are_zeros(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """As the kernel writes them that quantises rows alone."""
    users = [PackedLinear.from_weight(stack(1, 32, k)[0]), nn.Identity()]
    memory = emulate(monkeypatch, device_like(90))
    monkeypatch.setattr(decode, "stream", lambda on: 0)
    run = Kernels(torch.device("cpu", 0), torch.bfloat16)
    one, other = (random(1, k, seed=seed).bfloat16() for seed in (0, 1))
    for x in (run.gate(one, other, "silu", users), run.add_norm(one, other, None, norm(k, 2), users)[1]):
        assert x.codes is not None
        assert x.halves is not None
        assert torch.equal(x.codes, decode._quantize(x.halves, 1, device_like(90)))
    memory.check()


@pytest.mark.parametrize("normed", [True, False])
def test_scaled_sums(make: Make, normed: bool) -> None:
    hidden, delta = (random(1, 96, seed=each).bfloat16() for each in (0, 1))
    given: Any = hidden, delta, norm(96, 3), norm(96, 2) if normed else None, [nn.Identity()]
    (total, x), (expected_total, expected) = (
        each.add_norm(*given, scale=0.75) for each in (make(torch.bfloat16), TorchOperations())
    )
    assert_near(total, expected_total)
    assert_near(x.halves, expected.halves)
