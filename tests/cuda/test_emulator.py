"""The emulator is as good as what it refuses: kernels with one mistake each, and conversions against torch."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

import cuda_emulator
from cuda_emulator import EmulationError, load_text

torch = pytest.importorskip("torch")
pytestmark = cuda_emulator.requires_compiler

TYPES = "typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;\n"
ASYNC = """
static inline u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
static inline void copy(void* to, const u8* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at(to)), "l"(from) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING> static inline void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
"""


def kernel(body: str, more: str = "") -> cuda_emulator.Kernel:
    """A kernel (const u8* in, u8* out)."""
    return load_text(
        f'{TYPES}{more}\nextern "C" __global__ void test(const u8* in, u8* out) {{\n'
        f"  extern __shared__ __align__(128) u8 shared[];\n  const int i = threadIdx.x;\n{body}\n}}\n",
        "test",
    )


def run(
    wanted: cuda_emulator.Kernel, data: np.ndarray[Any, Any], size: int, threads: int = 64, **options: Any
) -> bytes:
    """Its output."""
    out = np.zeros(size, dtype=np.uint8)
    arguments = struct.pack("@PP", data.ctypes.data, out.ctypes.data)
    wanted.launch(options.pop("grid", (1, 1, 1)), threads, arguments, **{"shared_bytes": 4096, **options})
    return out.tobytes()


DATA = np.arange(4096, dtype=np.uint8)
REVERSED = DATA[:64][::-1].tobytes()


@pytest.mark.parametrize(("barrier", "right"), [("__syncthreads();", True), ("", False)])
def test_a_missing_barrier_shows(barrier: str, right: bool) -> None:
    reverse = kernel(f"shared[i] = in[i]; {barrier} out[i] = shared[63 - i];")
    results = []
    for reverse.order in (0, 1, 2):
        results.append(run(reverse, DATA, 64))
    assert (set(results) == {REVERSED}) is right


@pytest.mark.parametrize(("pending", "right"), [(0, True), (1, False)])
def test_a_copy_that_is_not_waited_for_has_not_arrived(pending: int, right: bool) -> None:
    body = f"copy(shared + 16 * i, in + 16 * i); wait<{pending}>(); out[i] = shared[16 * i + 3];"
    assert (run(kernel(body, ASYNC), DATA, 64) == DATA[3::16][:64].tobytes()) is right


@pytest.mark.parametrize(("barrier", "right"), [("__syncwarp();", True), ("", False)])
def test_a_copy_may_overwrite_what_others_still_read(barrier: str, right: bool) -> None:
    body = f"""
  for (int j = i; j < 512; j += 32) shared[j] = 1;
  __syncwarp(); out[i] = shared[(31 - i) * 16]; {barrier} copy(shared + 16 * i, in + 16); wait<0>();"""
    results = set()
    for order in (0, 1, 2, 3):
        overwrite = kernel(body, ASYNC)
        overwrite.order = order
        results.add(run(overwrite, DATA, 32, threads=32))
    assert (results == {bytes([1] * 32)}) is right


def test_groups_of_copies_arrive_in_order() -> None:
    body = """
  copy(shared + 32 * i, in + 16 * i); copy(shared + 32 * i + 16, in + 16 * i);
  wait<1>(); out[2 * i] = shared[32 * i]; out[2 * i + 1] = shared[32 * i + 16];"""
    copies = kernel(body, ASYNC)
    copies.order = 0
    found = run(copies, DATA, 128)
    assert found[::2] == DATA[::16][:64].tobytes()
    assert set(found[1::2]) == {0xFB}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (i == 5) __trap();", r"trap \(block 0, 0, 0, thread 5\)"),
        ("if (i < 40) __syncthreads(); else while (true) __syncwarp();", "all threads wait"),
        ("if (i < 8) __shfl_sync(~0u, i, 0); else __syncwarp();", "lanes of a warp meet at"),
        ("if (i == 3) return; __syncwarp();", "a thread ends|lanes have ended"),
        ("copy(shared + 8, in);", "misaligned access to shared memory"),
        ("copy(shared, in + 8);", "misaligned asynchronous copy"),
        ("copy(shared + 4096, in);", "access outside dynamic shared memory"),
        ("shared[4096] = 1;", "wrote past its dynamic shared memory"),
        ("copy(out, in);", "the address of something not shared"),
    ],
)
def test_mistakes_are_refused(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run(kernel(body, ASYNC), DATA, 64)


def test_arguments_of_a_wrong_size_are_refused() -> None:
    with pytest.raises(EmulationError, match="arguments of a wrong size"):
        kernel("out[i] = 0;").launch((1, 1, 1), 1, struct.pack("@PPi", 0, 0, 0))


def test_unknown_instructions_do_not_compile() -> None:
    with pytest.raises(AssertionError, match="bar_red_popc_u32"):
        kernel('u32 a; asm volatile("bar.red.popc.u32 %0, 1;" : "=r"(a)); out[i] = a;')


def test_a_grid_is_covered() -> None:
    body = (
        "out[((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * blockDim.x + i] = blockIdx.x + i;"
    )
    found = run(kernel(body), DATA, 3 * 2 * 4 * 40, threads=40, grid=(4, 2, 3))
    assert found == bytes(x + i for _ in range(6) for x in range(4) for i in range(40))


CLUSTER = """
static inline u32 rank() { u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
static inline float far(const void* p, u32 rank) {
  u32 to; float v;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"((u32)__cvta_generic_to_shared(p)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(to) : "memory");
  return v;
}
static inline void meet() {
  asm volatile("barrier.cluster.arrive.aligned;\\nbarrier.cluster.wait.aligned;" ::: "memory");
}
"""


@pytest.mark.parametrize(("first", "second"), [(True, True), (False, True), (True, False)])
def test_clusters_read_each_others_memory_between_barriers(first: bool, second: bool) -> None:
    body = f"""
  ((float*)shared)[i] = blockIdx.x * 100 + i; {"meet();" if first else ""}
  out[blockIdx.x * 64 + i] = (u8)far(shared + 4 * (63 - i), rank() ^ 1); {"meet();" if second else ""}"""
    exchange = kernel(body, CLUSTER)
    expected = bytes((x ^ 1) * 100 % 256 + 63 - i & 0xFF for x in range(4) for i in range(64))
    seen = []
    for exchange.order in (0, 3, 4):
        try:
            seen.append(run(exchange, DATA, 256, grid=(4, 1, 1), cluster=2))
        except EmulationError as error:
            seen.append(str(error))
    assert (set(seen) == {expected}) is (first and second), seen


def values() -> np.ndarray[Any, Any]:
    """fp32: all bf16 and fp16 values, what lies halfway between them, and a hair to either side."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    halves = bits.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    near = [bits << 16, (bits << 16) + 0x8000, halves, halves + 0x1000]
    every = np.concatenate([np.concatenate([v - 1, v, v + 1]) for v in near])
    tiny = np.ldexp(np.float32(1), np.arange(-149, -10)).view(np.uint32)
    every = np.concatenate([every, tiny, tiny + 1, tiny | 0x80000000])
    return every[: len(every) // 64 * 64].view(np.float32)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_to_16_bits_are_torchs(name: str, dtype: torch.dtype) -> None:
    body = f"""
  const float v = ((const float*)in)[blockIdx.x * 64 + i]; u32 pair;
  asm("cvt.rn.{name}x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(1.0f), "f"(v));
  ((u16*)out)[blockIdx.x * 64 + i] = (u16)pair;"""
    data = values()
    found = run(kernel(body), data, 2 * len(data), grid=(len(data) // 64, 1, 1))
    got = torch.frombuffer(bytearray(found), dtype=dtype)
    expected = torch.from_numpy(data).to(dtype)
    numbers = ~expected.isnan()
    assert torch.equal(got.isnan(), ~numbers)
    assert torch.equal(got.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])


def test_conversion_from_fp16_is_numpys() -> None:
    body = """
  float v; asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(((const u16*)in)[blockIdx.x * 64 + i]));
  ((float*)out)[blockIdx.x * 64 + i] = v;"""
    data = np.arange(1 << 16, dtype=np.uint16)
    found = np.frombuffer(run(kernel(body), data, 4 << 16, grid=(1 << 10, 1, 1)), dtype=np.float32)
    expected = data.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_bf16_products_round_once() -> None:
    body = """
  const u32* v = (const u32*)in + (blockIdx.x * 64 + i) * 3; u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(v[0]), "r"(v[1]), "r"(v[2]));
  ((u32*)out)[blockIdx.x * 64 + i] = d;"""
    rng = np.random.default_rng(2)
    parts = torch.from_numpy(rng.normal(size=(64 * 64, 3, 2)) * 2.0 ** rng.integers(-70, 8, (64 * 64, 3, 2)))
    operands = parts.bfloat16()
    found = run(kernel(body), operands.view(torch.int16).numpy().view(np.uint32), 4 * 64 * 64, grid=(64, 1, 1))
    got = torch.frombuffer(bytearray(found), dtype=torch.bfloat16).view(-1, 2)
    a, b, c = operands.double().unbind(1)
    exact = a * b + c
    # torch rounds fp64 to bf16 by way of fp32: the nearest bf16 is found by distance instead.
    bits = exact.to(torch.bfloat16).view(torch.int16)
    around = torch.stack([(bits + step).view(torch.bfloat16).double() for step in (-1, 0, 1)])
    best = (around - exact).abs().nan_to_num(torch.inf).amin(0)
    assert torch.equal((got.double() - exact).abs(), best)
