"""Kernels of products with experts on the emulated GPU against fp64, in every order of threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

import any_type
import cuda_emulator

torch = pytest.importorskip("torch")

from torch.nn.functional import gelu, silu

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


@dataclass(frozen=True)
class Case:
    """A product: `shared` tells whether all experts of a token see the same row."""

    m: int
    top: int
    n: int
    k: int
    format: str
    shared: bool
    index: torch.dtype
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.format}-{self.m}x{self.top}-{self.n}x{self.k}"

    def inputs(self) -> Inputs:
        row, source = weight_type(self.format), torch.Generator().manual_seed(self.m)
        planes = any_type.planes(row, self.n, self.k, (COUNT,))
        shape = (self.m, self.k) if self.shared else (self.m, self.top, self.k)
        x, bias = torch.randn(shape, generator=source).to(self.dtype), torch.randn(COUNT, self.n, generator=source)
        experts = chosen(self.m, self.top, self.index)
        return Inputs(self, row, planes, layout.pack(planes, row), x, bias, experts)


@dataclass(frozen=True)
class Inputs:
    """Weights, activations, biases and experts of a case."""

    case: Case
    row: WeightType
    planes: Any
    tiles: torch.Tensor
    x: torch.Tensor
    bias: torch.Tensor
    experts: torch.Tensor

    def output(self) -> torch.Tensor:
        return torch.empty(*self.experts.shape, self.case.n, dtype=self.x.dtype)

    def check(self, y: torch.Tensor, x: torch.Tensor, roundings: int = 0) -> None:
        """With activations in 8 bits, or in 16 where the roundings are given."""
        k, formula = x.shape[-1], "bf16" if roundings else "int8"
        roundings = roundings or -(-k // 256) * 8 + 3 + 2 * self.row.minimum + 8
        rounded = formula == "bf16" and x.dtype is torch.bfloat16
        for i, j in ((i, j) for i in range(len(y)) for j in range(y.shape[1])):
            own, expert = (x[i : i + 1] if x.ndim == 2 else x[i, j : j + 1]), int(self.experts[i, j])
            weight = accuracy.of_planes([plane[expert] for plane in self.planes], self.row)
            given = own, weight, self.bias[expert]
            right = accuracy.linear(*given, activations=formula, scales_rounded=rounded)
            found = accuracy.compare(y[i, j : j + 1], right, roundings)
            assert found.first is None, (i, j, found)


CASES = [
    Case(1, 3, 40, 768, "q6_k", True, torch.int64, torch.bfloat16),
    Case(1, 2, 33, 512, "q5_k", False, torch.int32, torch.float16),
    Case(3, 2, 40, 512, "q6_k_exact", True, torch.int64, torch.bfloat16),
    Case(7, 3, 37, 256, "iq4_xs", False, torch.int32, torch.float16),
    Case(5, 2, 17, 288, "q4_1", True, torch.int64, torch.bfloat16),
    Case(2, 1, 17, 544, "q8_0", True, torch.int64, torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_is_right_in_every_order_of_threads(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    given, outputs = case.inputs(), []
    for order in (3, 0):
        in_order(monkeypatch, order)
        y, rows = given.output(), given.x.view(-1, case.k)
        of_product = given.tiles, given.experts, given.bias, case.n, given.row, y, GPU
        experts_decode.multiply(rows, *of_product, early=order > 0)
        outputs.append(y)
    assert torch.equal(*outputs)
    given.check(outputs[0], given.x)


@pytest.mark.parametrize("kind", [0, 1])
def test_gates_are_computed_on_the_way(memory: Memory, kind: int) -> None:
    """In rows that lie apart, as gate and up do in the product of both."""
    case = Case(2, 2, 40, 288, "q5_0", False, torch.int32, torch.bfloat16)
    given = case.inputs()
    both = 2 * torch.randn(4, 2 * case.k, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    gate, up = both.chunk(2, -1)
    y = given.output()
    of_product = given.tiles, given.experts, given.bias, case.n, given.row, y, GPU
    experts_decode.multiply(gate, *of_product, gated=(up, kind))
    activation = (silu, partial(gelu, approximate="tanh"))[kind]
    activations = (activation(gate.float()) * up.float()).to(case.dtype)
    given.check(y, activations.view(2, 2, -1))


@pytest.mark.parametrize(
    "case",
    [
        Case(23, 3, 136, 512, "q4_k", True, torch.int64, torch.bfloat16),
        Case(9, 2, 33, 288, "q8_0", False, torch.int32, torch.float16),
    ],
    ids=str,
)
def test_prefill_on_gpus_without_wgmma(memory: Memory, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    on, given = replace(GPU, arch=89), case.inputs()
    in_order(monkeypatch, 3)
    order, begins = experts_gemm.sort(given.experts, COUNT, on)
    assert order.tolist() == given.experts.flatten().sort(stable=True).indices.tolist()
    assert begins.tolist() == [int((given.experts < expert).sum()) for expert in range(COUNT + 1)]
    y, rows = given.output(), given.x.view(-1, case.k)
    experts_gemm.multiply(rows, given.tiles, given.experts, given.bias, case.n, given.row, y, on)
    given.check(y, given.x, roundings=36 * 16 * -(-case.k // 256) + 3)


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
