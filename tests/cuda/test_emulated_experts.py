"""Kernels of products with experts on the emulated GPU against fp64, in every order of threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import any_type
import cuda_emulator

torch = pytest.importorskip("torch")

from cuda_emulator.memory import Memory, emulate
from q6k_kernels.cuda import experts_decode, experts_gemm, gemm_wgmma
from q6k_kernels.cuda.device import Device
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType, weight_type
from q6k_kernels.jit import loader
from q6k_kernels.ops import accuracy

pytestmark = cuda_emulator.requires_compiler
COUNT = 5
GPU = Device(0, 90, 3, 227 << 10, 228 << 10)
"""With few multiprocessors blocks have many row tiles, which begin and end anywhere in a warp's share."""


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    found = emulate(monkeypatch, GPU)
    yield found
    found.check()


def in_order(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    """Let kernels run their threads in an order."""

    def load(*variant: Any) -> cuda_emulator.Kernel:
        kernel = cuda_emulator.load(*variant)
        kernel.order = order
        return kernel

    monkeypatch.setattr(loader, "load", load)


def chosen(m: int, top: int, dtype: torch.dtype) -> torch.Tensor:
    """Different experts for each token, one of them in all, so that it has more than a job's pairs."""
    source = torch.Generator().manual_seed(m)
    rows = [1 + torch.randperm(COUNT - 1, generator=source)[:top] for _ in range(m)]
    experts = torch.stack(rows)
    experts[:, top // 2] = 0
    return experts.to(dtype)


def check(
    y: torch.Tensor, x: torch.Tensor, planes: Any, format: str, experts: torch.Tensor, bias: Any, roundings: int = 0
) -> None:
    """With activations in 8 bits, or in 16 where the roundings are given."""
    row, k, formula = weight_type(format), x.shape[-1], "bf16" if roundings else "int8"
    roundings = roundings or -(-k // 256) * 8 + 3 + 2 * row.minimum + 8
    for i, j in ((i, j) for i in range(len(y)) for j in range(y.shape[1])):
        own, expert = (x[i : i + 1] if x.ndim == 2 else x[i, j : j + 1]), int(experts[i, j])
        weight = accuracy.of_planes([plane[expert] for plane in planes], row)
        own_bias = None if bias is None else bias[expert]
        rounded = formula == "bf16" and x.dtype is torch.bfloat16
        right = accuracy.linear(own, weight, own_bias, activations=formula, scales_rounded=rounded)
        found = accuracy.compare(y[i, j : j + 1], right, roundings)
        assert found.first is None, (i, j, found)


CASES = [
    # m, top, n, k, format, same row for all experts of a token, index dtype, dtype
    (1, 3, 40, 768, "q6_k", True, torch.int64, torch.bfloat16),
    (1, 2, 33, 512, "q5_k", False, torch.int32, torch.float16),
    (3, 2, 40, 512, "q6_k_exact", True, torch.int64, torch.bfloat16),
    (7, 3, 37, 256, "iq4_xs", False, torch.int32, torch.float16),
    (5, 2, 17, 288, "q4_1", True, torch.int64, torch.bfloat16),
    (2, 1, 17, 544, "q8_0", True, torch.int64, torch.bfloat16),
]


@pytest.mark.parametrize(("m", "top", "n", "k", "format", "shared", "index", "dtype"), CASES)
def test_decode_is_right_in_every_order_of_threads(
    memory: Memory,
    monkeypatch: pytest.MonkeyPatch,
    m: int,
    top: int,
    n: int,
    k: int,
    format: str,
    shared: bool,
    index: torch.dtype,
    dtype: torch.dtype,
) -> None:
    planes = any_type.planes(weight_type(format), n, k, (COUNT,))
    tiles = layout.pack(planes, weight_type(format))
    source = torch.Generator().manual_seed(m)
    x = torch.randn(*((m, k) if shared else (m, top, k)), generator=source).to(dtype)
    bias, experts = torch.randn(COUNT, n, generator=source), chosen(m, top, index)
    outputs = []
    for order in (3, 0):
        in_order(monkeypatch, order)
        y = torch.empty(m, top, n, dtype=dtype)
        rows, row = x.view(-1, k), weight_type(format)
        experts_decode.multiply(rows, tiles, experts, bias, n, row, y, GPU, early=order > 0)
        outputs.append(y)
    assert torch.equal(*outputs)
    check(outputs[0], x, planes, format, experts, bias)


@pytest.mark.parametrize(
    ("m", "top", "n", "k", "format", "shared", "index", "dtype"),
    [
        (23, 3, 136, 512, "q4_k", True, torch.int64, torch.bfloat16),
        (9, 2, 33, 288, "q8_0", False, torch.int32, torch.float16),
    ],
)
def test_prefill_on_gpus_without_wgmma(
    memory: Memory,
    monkeypatch: pytest.MonkeyPatch,
    m: int,
    top: int,
    n: int,
    k: int,
    format: str,
    shared: bool,
    index: torch.dtype,
    dtype: torch.dtype,
) -> None:
    row, on = weight_type(format), replace(GPU, arch=89)
    planes = any_type.planes(row, n, k, (COUNT,))
    source = torch.Generator().manual_seed(m)
    x = torch.randn(*((m, k) if shared else (m, top, k)), generator=source).to(dtype)
    bias, experts = torch.randn(COUNT, n, generator=source), chosen(m, top, index)
    in_order(monkeypatch, 3)
    order, begins = experts_gemm.sort(experts, COUNT, on)
    assert order.tolist() == experts.flatten().sort(stable=True).indices.tolist()
    assert begins.tolist() == [int((experts < expert).sum()) for expert in range(COUNT + 1)]
    y = torch.empty(m, top, n, dtype=dtype)
    experts_gemm.multiply(x.view(-1, k), layout.pack(planes, row), experts, bias, n, row, y, on)
    check(y, x, planes, format, experts, bias, roundings=36 * 16 * -(-k // 256) + 3)


def test_many_pairs_are_sorted(memory: Memory) -> None:
    """More than a block looks at in one round, with experts that nobody has chosen."""
    experts = torch.randint(2, 39, (1300, 7), generator=torch.Generator().manual_seed(1))
    order, begins = experts_gemm.sort(experts, 41, GPU)
    assert order.tolist() == experts.flatten().sort(stable=True).indices.tolist()
    assert begins.tolist() == [int((experts < expert).sum()) for expert in range(42)]


@pytest.mark.parametrize("row", WEIGHT_TYPES.values(), ids=lambda row: row.name)
def test_configurations_for_hopper_fit(row: WeightType) -> None:
    for config in gemm_wgmma.CONFIGS:
        shared = experts_gemm.shared_bytes(config, row)
        assert experts_gemm.stages(config, row) >= 2
        assert config.occupancy * (shared + 1024) <= gemm_wgmma.SHARED_BYTES


@pytest.mark.parametrize(("m", "bad"), [(1, -1), (1, 1 << 40), (3, COUNT), (3, -(1 << 63))])
def test_an_expert_that_does_not_exist_stops_the_kernel(memory: Memory, m: int, bad: int) -> None:
    row = weight_type("q4_1" if m > 1 else "q8_0")
    tiles = layout.pack(any_type.planes(row, 16, 256, (COUNT,)), row)
    experts = chosen(m, 2, torch.int64)
    experts[-1, 1] = bad
    y = torch.empty(m, 2, 16, dtype=torch.bfloat16)
    x = torch.zeros(m, 256, dtype=torch.bfloat16)
    with pytest.raises(cuda_emulator.EmulationError, match="trap"):
        experts_decode.multiply(x, tiles, experts, None, 16, row, y, GPU)


def test_plans_give_each_block_two_pairs_at_most() -> None:
    h200 = Device(0, 90, 132, 227 << 10, 228 << 10)
    for row in WEIGHT_TYPES.values():
        for pairs, (n, k) in ((pairs, size) for pairs in (1, 8, 64, 256) for size in ((704, 2816), (16, 512))):
            plan = experts_decode.plan(pairs, n, k, row, h200)
            assert plan is not None
            assert plan.blocks >= pairs
            assert plan.shape[2] * (plan.shared_bytes + 1024) <= h200.multiprocessor_shared_bytes
