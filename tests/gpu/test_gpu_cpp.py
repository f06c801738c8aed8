"""The C++ library on a GPU: to the bit what Python launches, in graphs, streams, threads and on several GPUs.

Q6K_OPS_LIBRARY=libq6k_ops.so pytest tests/gpu/test_gpu_cpp.py -m gpu
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fp64
from gpu_weights import CORE, EVERY, bias_of, inputs, linear, poisoned_call, weight, width
from q6k_kernels.cuda import dispatch, expand, gemm_mma
from q6k_kernels.formats import tiles as layout

LIBRARY = os.environ.get("Q6K_OPS_LIBRARY", "")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not LIBRARY, reason="Q6K_OPS_LIBRARY names no library; `q6k-convert build-ops` builds one"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS = torch.ops.q6k
ROWS = (*range(1, 10), 16, 17, 64, 129, 512)
SHAPES = [(1001, 2560), (4096, 4096), (133, 768), (5376, 21504)]
KINDS = [(format, dtype) for format in CORE for dtype in (BF16, FP16)]
OTHERS = [(133, width(768, format), format, dtype) for format in EVERY[len(CORE) :] for dtype in (BF16, FP16)]


@pytest.fixture
def exported() -> Iterator[Any]:
    library = ctypes.CDLL(LIBRARY)
    yield library
    library.q6k_ops_force_gemm(0)


def test_it_is_the_library_that_runs() -> None:
    for name in ("linear", "embedding", "dequantize", "pack"):
        active = [
            line for line in torch._C._dispatch_dump(f"q6k::{name}").splitlines() if line.startswith("CUDA: ")
        ]
        assert len(active) == 1
        assert "register.cpp" in active[0]


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k", "format", "dtype"), [*((*s, *k) for s in SHAPES for k in KINDS), *OTHERS])
def test_products(m: int, n: int, k: int, format: str, dtype: torch.dtype) -> None:
    w, x = weight("genuine", n, k, format), inputs(m, k, dtype)
    for formula in ("auto", "int8", "bf16"):
        for bias in (None, bias_of(n, BF16), bias_of(n, FP32), bias_of(2 * n, FP16)[::2]):
            found = linear(x, w, bias, formula)
            fp64.assert_same_bits(
                found, dispatch.linear(x, w.tiles, bias, n, w.row, formula), f"{formula}, {bias is not None}"
            )


@pytest.mark.parametrize(("format", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("m", [1, 16, 64, 129, 300])
def test_what_other_gpus_would_take(m: int, format: str, dtype: torch.dtype, exported: Any) -> None:
    """Expanded for cuBLAS, one slice and several; and by mma.sync, where the library has that for this GPU."""
    others = [(2, expand.linear)]
    if torch.cuda.get_device_capability() != (9, 0):
        others.append((1, gemm_mma.linear))
    for n, k in ((1001, 2560), (133, 768), (14336, 4096)):
        w, x = weight("genuine", n, k, format), inputs(m, k, dtype)
        for bias in (None, bias_of(n, BF16), bias_of(n, FP32)):
            for which, python in others:
                exported.q6k_ops_force_gemm(which)
                found, right = linear(x, w, bias, "bf16"), torch.empty(m, n, dtype=dtype, device=x.device)
                python(x, w.tiles, bias, n, w.row, right)
                fp64.assert_same_bits(found, right, f"{python.__module__} {n}x{k}")


def test_rows_that_lie_anywhere() -> None:
    n, k = 133, 768
    w, x = weight("random", n, k, "q6_k_exact"), inputs(24, k, BF16).view(4, 6, k)
    wide, shifted = (
        torch.empty(4, 6, 2 * k, dtype=BF16, device="cuda"),
        torch.empty(x.numel() + 1, dtype=BF16).cuda(),
    )
    others = [wide[..., :k], shifted[1:].view_as(x), torch.empty(4, 6, k, 2, dtype=BF16, device="cuda")[..., 0]]
    for formula in ("int8", "bf16"):
        right = OPS.linear(x, w.tiles, None, n, w.format, formula)
        for other in others:
            fp64.assert_same_bits(OPS.linear(other.copy_(x), w.tiles, None, n, w.format, formula), right)
        fp64.assert_same_bits(
            OPS.linear(x.transpose(0, 1), w.tiles, None, n, w.format, formula), right.transpose(0, 1)
        )
        fp64.assert_same_bits(OPS.linear(x[:, 1:4], w.tiles, None, n, w.format, formula), right[:, 1:4])
        fp64.assert_same_bits(
            OPS.linear(x[:1].expand_as(x), w.tiles, None, n, w.format, formula), right[:1].expand_as(right)
        )
        fp64.assert_same_bits(OPS.linear(x[0, 0], w.tiles, None, n, w.format, formula), right[0, 0])
        assert OPS.linear(x[:, :0], w.tiles, None, n, w.format, formula).shape == (4, 0, n)


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize(("n", "k"), [(1, 256), (1001, 2560), (133, 768), (4096, 4096)])
def test_packing_and_rows(n: int, k: int, format: str) -> None:
    w = weight("extreme", n, k, format)
    tiles = poisoned_call(OPS.pack, w.planes, w.format)
    fp64.assert_same_bits(tiles, dispatch.pack(w.planes, w.row))
    fp64.assert_same_bits(tiles, layout.pack(w.planes, w.row))
    apart = [strided(plane) for plane in w.planes]
    fp64.assert_same_bits(poisoned_call(OPS.pack, apart, w.format), tiles)
    at = torch.randint(0, n, (7, 9), device="cuda")
    for dtype in (BF16, FP16, FP32):
        whole = poisoned_call(OPS.dequantize, tiles, n, w.k, w.format, dtype)
        fp64.assert_same_bits(whole, dispatch.dequantize(tiles, n, w.k, w.row, dtype))
        for indices in (at, at.int(), at.T, at[:0]):
            rows = poisoned_call(OPS.embedding, indices, tiles, n, w.k, w.format, dtype)
            fp64.assert_same_bits(rows, dispatch.embedding(indices, tiles, n, w.k, w.row, dtype))
            fp64.assert_same_bits(rows, whole[indices.long()])


def strided(plane: torch.Tensor) -> torch.Tensor:
    """The same, in memory of which it is every other element."""
    return torch.stack((plane, plane), dim=-1)[..., 0]


def test_stacks_and_planes_that_begin_anywhere() -> None:
    for format in EVERY:
        w = weight("random", 40, 512, format, 3)
        right = layout.pack(w.planes, w.row)
        shifted = []
        for plane in w.planes:
            room = torch.empty(plane.numel() + 1, dtype=plane.dtype, device="cuda")
            shifted.append(room[1:].view_as(plane).copy_(plane))
        fp64.assert_same_bits(OPS.pack(w.planes, w.format), right)
        fp64.assert_same_bits(OPS.pack(shifted, w.format), right)


@pytest.mark.parametrize("m", [1, 4, 8, 17, 64, 300])
def test_in_a_graph(m: int) -> None:
    w, x = weight("genuine", 1001, 2560, "q6_k"), inputs(m, 2560, BF16)
    w.tiles  # noqa: B018
    graph, still = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y = OPS.linear(still, w.tiles, None, w.n, w.format, "auto")
        rows = OPS.embedding(torch.arange(3, device="cuda"), w.tiles, w.n, w.k, w.format, BF16)
    for seed in (3, 4, 5):
        again = inputs(m, 2560, BF16, seed)
        still.copy_(again)
        y.fill_(float("nan"))
        graph.replay()
        fp64.assert_same_bits(y, dispatch.linear(again, w.tiles, None, w.n, w.row), f"seed {seed}")
    fp64.assert_same_bits(rows, OPS.dequantize(w.tiles, w.n, w.k, w.format, BF16)[:3])


FIRST_USE = """
import sys, torch
from q6k_kernels.ops import library as ops_library
ops_library.load(sys.argv[1])
tiles = torch.zeros(3, 2, 3584, dtype=torch.uint8, device="cuda")
tiles[..., :3072].random_(0, 256, generator=torch.Generator("cuda").manual_seed(0))
tiles[..., 3072:].view(torch.bfloat16).fill_(0.01)
x = torch.randn(20, 512, device="cuda", dtype=torch.bfloat16)
graph = torch.cuda.CUDAGraph()
with torch.inference_mode(), torch.cuda.graph(graph):
    found = [torch.ops.q6k.linear(x[:m], tiles, None, 40, "q6_k", "auto") for m in (1, 5, 20)]
    found.append(torch.ops.q6k.dequantize(tiles, 40, 512, "q6_k", torch.float32))
with torch.inference_mode():
    for each in found:
        each.fill_(float("nan"))
graph.replay()
for each, m in zip(found, (1, 5, 20)):
    assert torch.equal(each, torch.ops.q6k.linear(x[:m], tiles, None, 40, "q6_k", "auto")), m
    assert each.isfinite().all()
assert torch.equal(found[-1], torch.ops.q6k.dequantize(tiles, 40, 512, "q6_k", torch.float32))
print("as captured")
"""


def test_first_use_inside_a_capture() -> None:
    """In a process that has used no kernel, nor imported what Python's would need."""
    command = [sys.executable, "-c", FIRST_USE, str(Path(LIBRARY).resolve())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "as captured\n", done.stderr


@pytest.mark.parametrize("m", [1, 8, 64])
def test_the_current_stream_is_used(m: int) -> None:
    """Inputs are made in that stream right before, after much other work."""
    w, x = weight("genuine", 1001, 2560, "q6_k_exact"), inputs(m, 2560, BF16)
    right, load = dispatch.linear(x, w.tiles, None, w.n, w.row), torch.randn(8192, 8192, device="cuda", dtype=BF16)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.full_like(x, float("nan"))
        for _ in range(4):
            load @ load
        late.copy_(x)
        y = OPS.linear(late, w.tiles, None, w.n, w.format, "auto")
        late.fill_(float("nan"))
    side.synchronize()
    fp64.assert_same_bits(y, right)


def test_many_threads() -> None:
    """Threads that have never used CUDA."""
    w, x = weight("genuine", 1001, 2560, "q6_k"), inputs(40, 2560, FP16)
    rights = [dispatch.linear(x[:m], w.tiles, None, w.n, w.row) for m in (1, 8, 40)]
    found: list[Any] = []

    def run() -> None:
        with torch.inference_mode():
            found.extend(
                (m, OPS.linear(x[:m], w.tiles, None, w.n, w.format, "auto")) for _ in range(20) for m in (1, 8, 40)
            )

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 * 60
    for m, y in found:
        fp64.assert_same_bits(y, rights[(1, 8, 40).index(m)])


def test_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    w, x = weight("genuine", 1001, 2560, "q6_k"), inputs(64, 2560, BF16)
    for m in (1, 8, 64):
        y = OPS.linear(x[:m].to("cuda:1"), w.tiles.to("cuda:1"), None, w.n, w.format, "auto")
        assert y.device == torch.device("cuda:1")
        fp64.assert_same_bits(y.to("cuda:0"), dispatch.linear(x[:m], w.tiles, None, w.n, w.row))
    assert torch.cuda.current_device() == 0
