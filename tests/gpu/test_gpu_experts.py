"""`q6k::experts` on a GPU: every weight type and number of rows against fp64; in graphs; with wrong experts."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import fp64
import gpu_weights
from gpu_weights import EVERY, poisoned_call, weight
from q6k_kernels.ops import grouped

pytestmark = pytest.mark.gpu

COUNT, TOP = 11, 3
MS = (1, 2, 8, 17, 64, 150)
WRONG = """
import sys, torch
from q6k_kernels.ops import grouped, schema
from q6k_kernels.formats.types import weight_type
row = weight_type("q8_0")
planes = [torch.zeros(3, 16, 256 // each.weights, device="cuda").to(dtype) for each, dtype in
          zip(row.arrays, (torch.int8, torch.float16))]
tiles = schema.pack(planes, "q8_0")
m, bad = map(int, sys.argv[1:])
experts = torch.zeros(m, 2, dtype=torch.int64, device="cuda")
experts[-1, 1] = bad
x = torch.zeros(m, 256, dtype=torch.bfloat16, device="cuda")
grouped.experts(x, tiles, experts, None, 16, "q8_0", "auto")
torch.cuda.synchronize()
"""


def chosen(m: int) -> torch.Tensor:
    """Different experts for each row; one of them is everybody's, and one nobody's."""
    source = gpu_weights.random_source(m)
    experts = torch.rand(m, COUNT - 2, device="cuda", generator=source).topk(TOP).indices + 1
    experts[:, 1] = 0
    return experts


@pytest.mark.parametrize("formula", ["int8", "bf16"])
@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize(("n", "k"), [(33, 512), (200, 768)])
def test_every_pair_meets_its_expert(n: int, k: int, format: str, formula: str) -> None:
    k = gpu_weights.width(k, format)
    w = weight("genuine", n, k, format, COUNT)
    bias = gpu_weights.bias_of(COUNT * n, torch.float32).view(COUNT, n)
    for m, dtype in ((m, dtype) for m in MS for dtype in (torch.bfloat16, torch.float16)):
        experts = chosen(m)
        x = gpu_weights.inputs(m * TOP, k, dtype).view(m, TOP, k)
        x = x if m % 2 else x[:, 0].contiguous()
        y = poisoned_call(grouped.experts, x, w.tiles, experts, bias, n, format, formula)
        again = poisoned_call(grouped.experts, x, w.tiles, experts.int(), bias, n, format, formula)
        fp64.assert_same_bits(y, again, "int32")
        rows = x if x.ndim == 3 else x[:, None].expand(m, TOP, k)
        for expert in experts.unique().tolist():
            at = experts == expert
            exact = fp64.linear(rows[at], w[expert], formula, scales_rounded=_rounded(formula, dtype))
            fp64.assert_right(y[at], exact.plus(bias[expert]), f"M={m} {dtype} expert {expert}")


def _rounded(formula: str, dtype: torch.dtype) -> bool:
    return formula == "bf16" and dtype is torch.bfloat16


@pytest.mark.parametrize("m", [1, 8, 40])
def test_a_graph_meets_the_experts_of_each_replay(m: int) -> None:
    """Written by a kernel of the same graph just before, which some copies do not wait for."""
    n, k, format = 200, 768, "q4_k"
    tiles = weight("genuine", n, k, format, COUNT).tiles
    experts, x = chosen(m), gpu_weights.inputs(m, k, torch.bfloat16)

    def product() -> torch.Tensor:
        return grouped.experts(x, tiles, experts + 0, None, n, format, "auto")

    product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product()
    for seed in range(20):
        experts.copy_(torch.randint(0, COUNT, experts.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        fp64.assert_same_bits(y, product(), f"replay {seed}")


@pytest.mark.parametrize(("m", "bad"), [(1, -1), (8, 3), (40, 1 << 40)])
def test_an_expert_that_does_not_exist_stops_the_kernel(m: int, bad: int) -> None:
    """In a process of its own, which cannot use the GPU any more."""
    done = subprocess.run(
        [sys.executable, "-c", WRONG, str(m), str(bad)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    reported = "CUDA error", "AcceleratorError", "A kernel launched earlier failed"
    assert any(each in done.stderr for each in reported)
