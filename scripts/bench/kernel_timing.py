"""Time calls on a GPU with CUDA graphs and rotated data; measure the machine's ceilings; make random weights.

Work is captured once and replayed, so times contain neither Python nor launching. Weights are rotated: a
graph uses as many copies as exceed four times the L2, so that no copy is found in the L2.
"""

from __future__ import annotations

import itertools
import math
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from q6k_kernels.formats.checks import PLANE_DTYPES
from q6k_kernels.formats.tiles import codes_and_scales
from q6k_kernels.formats.types import WeightType, weight_type
from q6k_kernels.jit import loader
from q6k_kernels.weights.weight import PackedWeight

REPLAYS = 7
WARM_UP = 2
SETTLE_SECONDS = 0.02
"""Seconds of replays before the first of several figures, until the GPU's clock has settled."""
GRAPH_MICROSECONDS = 1500
"""Least length of a graph in microseconds, so that its own launch does not count."""
MOST_CALLS = 400
L2_PASSES = 4
READ_BYTES = 4 << 30
STEP_SIZE, SCALE_SIZE = 3e-5, 1e-3
"""Standard deviations of a super-block's steps, and of scales without steps."""
CODE_PLANES = {"ql": (0, 256), "qh": (0, 256), "q": (-128, 128)}
"""Code plane -> its least element, and the first that is too large."""
EXPONENTS = (112, 122)
"""The same of scales that are powers of two."""
READ_ALL = """
extern "C" __global__ void read_all(const uint4* data, u64 count, u32* out) {
  const u64 stride = (u64)gridDim.x * blockDim.x;
  u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  u32 sum = 0;
  for (; at + (UNROLL - 1) * stride < count; at += UNROLL * stride) {
    uint4 v[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[i].x), "=r"(v[i].y), "=r"(v[i].z), "=r"(v[i].w)
                   : "l"(data + at + i * stride));
    }
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) sum += v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  for (; at < count; at += stride) sum += data[at].x ^ data[at].y ^ data[at].z ^ data[at].w;
  if (sum == 0xDEADBEEF) *out = sum;  // hardly ever; but the compiler cannot know
}
"""


def generator() -> torch.Generator:
    """Return the one source of random numbers, with the same seed in every run."""
    return torch.Generator("cuda").manual_seed(0)


def random_weight(n: int, k: int, format: str) -> PackedWeight:
    """Return a weight (N, K) on the GPU with random codes, and scales of a real model's size.

    Args:
        n: rows.
        k: columns, a multiple of the type's block.
        format: name of the weight type.
    """
    return PackedWeight.from_planes(random_planes(n, k, weight_type(format), generator()), format)


def random_planes(n: int, k: int, row: WeightType, random: torch.Generator) -> list[Tensor]:
    """Return the planes of a weight (N, K): codes and integer scales equally likely, the others normal.

    Args:
        n: rows.
        k: columns, a multiple of the type's block.
        row: the weight type.
        random: source of the numbers; its device is that of the planes.
    """
    middle = (1 << row.bits) / 2 if row.minimum else 0
    planes = []
    for array in row.arrays:
        shape, dtype = (n, k // array.weights), PLANE_DTYPES[array.dtype]
        if dtype.is_floating_point:
            size = STEP_SIZE if row.stepped else SCALE_SIZE
            # Mins of such a size take away the mean that codes without a sign give.
            size *= middle if array.role.startswith("min") else 1
            plane = torch.randn(shape, device=random.device, generator=random).mul_(size)
        else:
            least, most = _range(array.role, row)
            plane = torch.randint(least, most, shape, device=random.device, generator=random, dtype=torch.int16)
        planes.append(plane.to(dtype))
    return planes


def _range(role: str, row: WeightType) -> tuple[int, int]:
    """Return the least value of the integers of an array, and the first that is too large."""
    if role in CODE_PLANES:
        return CODE_PLANES[role]
    scale = next(array for array in row.scales if array.role == role)
    if scale.dtype == "I8":
        return (-128, 128) if scale.weights == 16 else (-32, 32)
    return (0, 64) if row.stepped else EXPONENTS


def dense(weight: PackedWeight) -> Tensor:
    """Return the weights in bf16 (N, K), by plain torch, for a quick check."""
    parts = []
    for at in range(0, weight.n, 2048):
        rows = slice(at, min(at + 2048, weight.n))
        codes, scale, least = codes_and_scales(weight.tiles, rows, weight.k, weight.row)
        values = codes.view(*scale.shape, -1) * scale.unsqueeze(-1)
        if least is not None:
            values -= least.unsqueeze(-1)
        parts.append(values.flatten(1).bfloat16())
    return torch.cat(parts)


def rotated(tensor: Tensor) -> list[Tensor]:
    """Return a tensor and copies of it, at least two in all, that together exceed `L2_PASSES` times the L2."""
    l2: int = torch.cuda.get_device_properties(tensor.device).L2_cache_size
    count = max(2, math.ceil(L2_PASSES * l2 / tensor.nbytes))
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def rotated_weights(weight: PackedWeight) -> list[PackedWeight]:
    """Return copies of a weight as `rotated` makes them of its tiles."""
    return [PackedWeight(tiles, weight.shape, weight.format) for tiles in rotated(weight.tiles)]


def time_calls(
    calls: Sequence[Callable[[], object]], guess_us: float, *, keep: bool = False, settle: bool = False
) -> float:
    """Return the microseconds of one call: the median replay of a graph that makes all calls in turn.

    Args:
        calls: calls to time, one for each copy of the data; a graph makes whole rounds of them.
        guess_us: least time of one call in microseconds; decides how many rounds a graph makes.
        keep: keep all results until the end of the graph, so that each has its own memory.
        settle: replay for `SETTLE_SECONDS` first, as before the first of several figures.
    """
    rounds = max(1, math.ceil(min(GRAPH_MICROSECONDS / guess_us, MOST_CALLS) / len(calls)))
    sequence = list(itertools.chain.from_iterable([calls] * (1 if keep else rounds)))
    torch.cuda.synchronize()
    with torch.cuda.stream(_stream()):
        calls[0]()
        calls[-1]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            kept = []
            for call in sequence:
                result = call()
                if keep:
                    kept.append(result)
        finally:
            graph.capture_end()
        marks = [_mark() for _ in range(WARM_UP + REPLAYS + 1)]
        settled = time.perf_counter() + (SETTLE_SECONDS if settle else 0)
        while time.perf_counter() < settled:
            graph.replay()
            torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)][WARM_UP:]
    del kept
    graph.reset()
    return float(statistics.median(times)) * 1000 / len(sequence)


@cache
def _stream() -> torch.cuda.Stream:
    """Return the one stream for all timing, because cuBLAS takes a workspace for each stream."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def scratch_bytes(call: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the bytes that a call takes from torch's allocator beside its result: at its peak, and for good."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    most, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    return most - before - result.nbytes, after - before - result.nbytes


def read_gb_per_s(nbytes: int) -> float:
    """Return the GB/s of a kernel that only reads: the best of some launch shapes, each the median of its runs."""
    data = torch.randint(0, 1 << 31, (nbytes // 8,), dtype=torch.int64, device="cuda", generator=generator())
    out = torch.empty(1, dtype=torch.int32, device="cuda")
    arguments = struct.pack("QQQ", data.data_ptr(), data.nbytes // 16, out.data_ptr())
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    times = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "common.cuh").write_text("typedef unsigned int u32; typedef unsigned long long u64;\n")
        Path(folder, "read_all.cuh").write_text(READ_ALL)
        for unroll, threads, blocks in itertools.product((4, 8), (512, 1024), (1, 2)):
            defines = (("UNROLL", unroll),)
            kernel = loader.load(
                "read_all.cuh", "read_all", defines, torch.cuda.current_device(), sources=Path(folder)
            )
            grid = (processors * blocks * 1024 // threads, 1, 1)

            def call(
                kernel: loader.Kernel = kernel, grid: tuple[int, int, int] = grid, threads: int = threads
            ) -> None:
                kernel.launch(grid, threads, arguments, stream=torch.cuda.current_stream().cuda_stream)

            times.append(time_calls([call], nbytes / 5e6))
    return data.nbytes / min(times) / 1e3


def copy_gb_per_s(nbytes: int) -> float:
    """Return the GB/s of a copy on the device, counting bytes read and bytes written."""
    source = torch.randint(0, 1 << 31, (nbytes // 8,), dtype=torch.int64, device="cuda", generator=generator())
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_calls([lambda: target.copy_(source)], nbytes / 2e6) / 1e3


def matmul_tflops(size: int) -> float:
    """Return the TFLOP/s of cuBLAS in a square product of random bf16."""
    a, b = (torch.randn(size, size, device="cuda", generator=generator()).bfloat16() for _ in range(2))
    return 2 * size**3 / time_calls([lambda: a @ b.T] * 10, 2 * size**3 / 1e9) / 1e6
