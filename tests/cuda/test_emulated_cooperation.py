"""Blocks that run side by side in the emulator: values handed on by tagged words, and waits that never end."""

from __future__ import annotations

import struct

import numpy as np
import pytest

import cuda_emulator
from cuda_emulator import EmulationError, Kernel, load_text

pytestmark = cuda_emulator.requires_compiler

WORDS = """
typedef unsigned char u8; typedef unsigned int u32; typedef unsigned long long u64;
struct Four { u32 a[4]; };
static inline Four load(const u32* from) {
  Four v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.a[0]), "=r"(v.a[1]), "=r"(v.a[2]), "=r"(v.a[3]) : "l"(from) : "memory");
  return v;
}
static inline u64 load_pair(const u32* from) {
  u64 v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
  return v;
}
static inline u32 load_one(const u32* from) { return (u32)load_pair(from); }
static inline void store(u32* to, u32 value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
static inline void store_pair(u32* to, float value, u32 tag) {
  const u64 pair = (u64)tag << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(pair) : "memory");
}
static inline void sleep() { asm volatile("nanosleep.u32 20;"); }
static inline void sleep(u32 ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }
"""
WAITS = {
    "sleep": "while (true) { v = load(from); if (READY(v)) break; sleep(); }",
    "sleep for": "do { v = load(from); sleep(i); } while (!READY(v));",
    "no sleep": "do v = load(from); while (!READY(v));",
    "a warp": """
      while (true) {
        v = load(from);
        int all = READY(v);
        for (int bit = 1; bit < 32; bit *= 2) all &= __shfl_xor_sync(~0u, all, bit);
        if (all) break;
        sleep();
      }""",
}
"""Ways to wait for four words; in the last a warp waits as one."""
STEPS = 5


def kernel(body: str) -> Kernel:
    """A kernel (const u32* in, u32* words)."""
    return load_text(
        f'{WORDS}\nextern "C" __global__ void test(const u32* in, u32* words) {{\n'
        "  extern __shared__ __align__(128) u32 shared[];\n"
        f"  const u32 i = threadIdx.x, block = blockIdx.x, blocks = gridDim.x, width = blockDim.x;\n{body}\n}}\n",
        "test",
    )


def run(
    wanted: Kernel, values: np.ndarray, blocks: int, words: int, threads: int = 32, **options: bool | int
) -> np.ndarray:
    """Its words, which are 0 before."""
    out = np.zeros(words + 4, dtype=np.uint32)
    out = out[-out.ctypes.data % 16 // 4 :][:words]
    arguments = struct.pack("@PP", values.ctypes.data, out.ctypes.data)
    wanted.launch((blocks, 1, 1), threads, arguments, **{"shared_bytes": 4096, "cooperative": True, **options})
    return out


VALUES = np.arange(512, dtype=np.uint32) * 3


def ring(wait: str) -> Kernel:
    """Every block, step after step, takes what the block before it wrote, and hands it on reversed and one more."""
    return kernel(f"""
#define READY(v) ((v.a[0] >> 16 == tag) & (v.a[1] >> 16 == tag) & (v.a[2] >> 16 == tag) & (v.a[3] >> 16 == tag))
  for (u32 step = 1; step <= {STEPS}; ++step) {{
    const u32 tag = block ? step : step - 1;
    u32 value = in[i];
    if (tag) {{
      const u32* const from = words + (block + blocks - 1) % blocks * width + 4 * (i % (width / 4));
      Four v;
      {wait}
      for (u32 j = 0; j < 4; ++j) shared[4 * (i % (width / 4)) + j] = v.a[j] & 0xFFFF;
      __syncthreads();
      value = shared[width - 1 - i];
      __syncthreads();
    }}
    store(words + block * width + i, (value + 1) | step << 16);
  }}""")


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("wait", WAITS)
def test_values_go_round_a_ring_of_blocks(wait: str, order: int) -> None:
    wanted = ring(WAITS[wait])
    wanted.order = order
    got = run(wanted, VALUES, 3, 3 * 32).reshape(3, 32)
    for block in range(3):
        turns = 3 * (STEPS - 1) + block
        expected = (VALUES[:32] if turns % 2 == 0 else VALUES[:32][::-1]) + turns + 1
        np.testing.assert_array_equal(got[block], expected | STEPS << 16)


def test_blocks_of_many_warps_run_side_by_side() -> None:
    got = run(ring(WAITS["sleep"]), VALUES, 6, 6 * 512, threads=512, shared_bytes=232448)
    turns = 6 * (STEPS - 1) + 5
    np.testing.assert_array_equal(got[5 * 512 :], (VALUES[::-1] + turns + 1) | STEPS << 16)


def test_fp32_comes_with_a_tag_of_its_own() -> None:
    wanted = kernel("""
  if (block == 0) {
    Four v;
    do v = load(words + 4 * i); while (v.a[1] != 9 || v.a[3] != 9);
    words[128 + i] = __float_as_uint(__uint_as_float(v.a[0]) - __uint_as_float(v.a[2]));
  } else {
    for (u32 j = i; j < 64; j += 32) store_pair(words + 2 * j, 0.25f * in[j] * in[j], 9);
  }""")
    squares = 0.25 * VALUES[:64].astype(np.float64) ** 2
    for wanted.order in (0, 1, 2):
        got = run(wanted, VALUES, 2, 160)[128:].view(np.float32)
        np.testing.assert_array_equal(got, squares[::2] - squares[1::2])


FOREVER = {
    "sleep": "while (load_one(words) != 1) sleep();",
    "no sleep": "while (load_one(words) != 1) {}",
    "a warp": "while (__shfl_sync(~0u, load_one(words), 0) != 1) { sleep(); __syncwarp(); }",
}


@pytest.mark.parametrize("loop", FOREVER)
def test_threads_that_wait_for_each_other_are_named(loop: str) -> None:
    body = f"if (block == 1) return; if (i < 32) {{ {FOREVER[loop]} }} __syncthreads();"
    with pytest.raises(EmulationError) as caught:
        run(kernel(body), VALUES, 3, 4, threads=64)
    assert str(caught.value) == (
        "test: threads wait for each other: block 0, 0, 0 (32 spin, from thread 0 on, 32 at __syncthreads) "
        "block 2, 0, 0 (32 spin, from thread 0 on, 32 at __syncthreads)"
    )


def test_a_wait_for_a_block_that_has_not_begun_is_found() -> None:
    with pytest.raises(EmulationError, match=r"block 0, 0, 0 \(1 spin, from thread 3 on, 31 at"):
        run(kernel(f"if (i == 3 && block == 0) {{ {FOREVER['sleep']} }} __syncthreads(); store(words, 1);"),
            VALUES, 2, 4, cooperative=False)  # fmt: skip


def test_a_long_wait_for_work_is_no_deadlock() -> None:
    wanted = kernel("""
  if (block == 0) {
    while (load_one(words) != 1) sleep();
    store(words + 1, 7);
  } else {
    for (int j = 0; j < 30000; ++j) __syncwarp();
    store(words, 1);
  }""")
    assert run(wanted, VALUES, 2, 4)[1] == 7


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        (
            "__shared__ u32 s[32]; s[i] = i; __syncthreads(); words[i] = s[31 - i];",
            {},
            "static shared memory of blocks",
        ),
        ("words[0] = 1;", {"cluster": 2}, "cooperative launches have no clusters"),
        ('u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); words[0] = r;', {}, "clusters of a cooperative"),
        ('u32 r; asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); words[0] = r;', {}, "clusters of a cooperative"),
        ('asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");', {}, "clusters of a cooperative"),
        ("words[0] = load(words + 2).a[0];", {}, "misaligned load of what another block writes"),
        ("store_pair(words + 1, 1, 1);", {}, "misaligned store of what another block reads"),
    ],
)
def test_mistakes_are_refused(body: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run(kernel(body), VALUES, 4, 64, **options)
