"""The decode kernel on the emulated GPU against fp64: every count of tokens, clusters, all orders of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import any_type
import cuda_emulator

torch = pytest.importorskip("torch")

from cuda_emulator.memory import Memory, emulate
from q6k_kernels.cuda import decode, decode_plan
from q6k_kernels.cuda.device import Device
from q6k_kernels.formats import tiles as layout
from q6k_kernels.formats.types import WEIGHT_TYPES, weight_type
from q6k_kernels.jit import loader
from q6k_kernels.ops import accuracy

pytestmark = cuda_emulator.requires_compiler
SHORT = [name for name, row in WEIGHT_TYPES.items() if row.block == 32]
"""Weight types whose rows may end within a tile."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    memory = emulate(monkeypatch, device(90, 3))
    monkeypatch.setattr(decode, "stream", lambda on: 0)
    yield memory
    memory.check()


def device(arch: int, multiprocessors: int) -> Device:
    """With few of them blocks have many row tiles, which begin and end anywhere in a warp's share."""
    shared = 227 if arch == 90 else 163
    return Device(0, arch, multiprocessors, shared << 10, (shared + 1) << 10)


CASES = [
    # m, n, k, format, dtype, cluster, multiprocessors
    (1, 16, 256, "q6_k", torch.bfloat16, 1, 100),
    (1, 200, 1536, "q6_k_exact", torch.bfloat16, 1, 2),
    (2, 37, 768, "q6_k_exact", torch.float16, 1, 2),
    (3, 150, 768, "q6_k", torch.float16, 1, 3),
    (4, 77, 1024, "q4_k", torch.bfloat16, 4, 5),
    (7, 65, 1280, "q6_k_exact", torch.float16, 2, 3),
    (8, 130, 512, "q5_k", torch.bfloat16, 1, 3),
    (8, 200, 2304, "q6_k_exact", torch.bfloat16, 8, 16),
    (11, 33, 768, "q6_k", torch.float16, 2, 4),
    *((1 + at % 8, 37, 544, name, torch.bfloat16, 1, 2) for at, name in enumerate(SHORT)),
    *((m, 33, 512, name, torch.float16, 1, 2) for m, name in ((1, "q5_k"), (2, "q4_k"), (3, "iq4_xs"))),
]


@pytest.mark.parametrize(("m", "n", "k", "format", "dtype", "cluster", "multiprocessors"), CASES)
def test_products_are_right_in_every_order_of_threads(
    gpu: Memory,
    monkeypatch: pytest.MonkeyPatch,
    m: int,
    n: int,
    k: int,
    format: str,
    dtype: torch.dtype,
    cluster: int,
    multiprocessors: int,
) -> None:
    on = device(90, multiprocessors)
    plan, plans = decode_plan.plan, []

    def forced(*sizes: int | bool | Device) -> decode_plan.DecodePlan | None:
        # Two rows are quantised by a kernel of their own.
        fused = sizes[0] <= decode_plan.FUSED_TOKENS and sizes[0] != 2
        choice = decode_plan.Choice.of(decode_plan.SHAPES[-1], fused, early=cluster > 1)
        plans.append(plan(*sizes, forced=(cluster, choice)))
        return plans[-1]

    monkeypatch.setattr(decode, "plan", forced)
    x = torch.randn(m, k + 8, generator=torch.Generator().manual_seed(m)).to(dtype)[:, :k]
    row = weight_type(format)
    weight = any_type.planes(row, n, k)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1))
    tiles = layout.pack(weight, row)

    def multiply(order: int) -> torch.Tensor:
        kernels: list[cuda_emulator.Kernel] = []

        def load(*variant: str | int | tuple[tuple[str, int], ...]) -> cuda_emulator.Kernel:
            kernels.append(cuda_emulator.load(*variant))
            kernels[-1].order = order
            return kernels[-1]

        monkeypatch.setattr(loader, "load", load)
        y = torch.empty(m, n, dtype=dtype)
        decode.linear(x, tiles, bias, n, row, y, on)
        assert kernels
        return y

    outputs = [multiply(order) for order in (3, 2, 0)]
    assert all(found is not None and found.cluster == cluster for found in plans)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    right = accuracy.linear(x, accuracy.of_planes(weight, row), bias, activations="int8")
    # As cuda/decode.cuh counts them.
    roundings = -(-k // 256) * 8 + 3 + 2 * row.minimum + decode_plan.SHAPES[-1][0] * cluster
    found = accuracy.compare(outputs[0], right, roundings)
    assert found.first is None, found
