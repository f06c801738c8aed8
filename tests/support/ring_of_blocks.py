"""CUDA C++ of blocks that run at the same time and hand values round a ring, by words with tags."""

from __future__ import annotations

import numpy as np

WORDS = """
typedef unsigned char u8; typedef unsigned int u32; typedef unsigned long long u64;
struct Four { u32 a[4]; };
__device__ static inline Four load(const u32* from) {
  Four v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.a[0]), "=r"(v.a[1]), "=r"(v.a[2]), "=r"(v.a[3]) : "l"(from) : "memory");
  return v;
}
__device__ static inline bool ready(const Four& v, u32 tag) {
  return v.a[0] >> 16 == tag && v.a[1] >> 16 == tag && v.a[2] >> 16 == tag && v.a[3] >> 16 == tag;
}
__device__ static inline u64 load_pair(const u32* from) {
  u64 v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
  return v;
}
__device__ static inline u32 load_one(const u32* from) { return (u32)load_pair(from); }
__device__ static inline void store(u32* to, u32 value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ static inline void store_pair(u32* to, float value, u32 tag) {
  const u64 pair = (u64)tag << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(pair) : "memory");
}
__device__ static inline void rest() { asm volatile("nanosleep.u32 20;"); }
__device__ static inline void rest(u32 ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }
"""
WAITS = {
    "sleep": "while (true) { v = load(from); if (ready(v, tag)) break; rest(); }",
    "sleep for": "do { v = load(from); rest(i); } while (!ready(v, tag));",
    "no sleep": "do v = load(from); while (!ready(v, tag));",
    "a warp": """
      while (true) {
        v = load(from);
        bool all = ready(v, tag);
        for (int bit = 1; bit < 32; bit *= 2) all &= __shfl_xor_sync(~0u, (int)all, bit);
        if (all) break;
        rest();
      }""",
}
"""Ways to wait for four words; in the last a warp waits as one."""

STEPS = 5
_RING = """
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  for (u32 step = 1; step <= STEPS; ++step) {
    const u32 tag = block ? step : step - 1;
    u32 value = in[i];
    if (tag) {
      const u32* const from = words + (block + blocks - 1) % blocks * width + 4 * (i % (width / 4));
      Four v;
      WAIT
      for (u32 j = 0; j < 4; ++j) shared[4 * (i % (width / 4)) + j] = v.a[j] & 0xFFFF;
      __syncthreads();
      value = shared[width - 1 - i];
      __syncthreads();
    }
    store(words + block * width + i, (value + 1) | step << 16);
  }"""


def source(body: str) -> str:
    """Return the text of a kernel `test` (const u32* in, u32* words), both in one structure."""
    return (
        f"{WORDS}\nstruct Given {{ const u32* in; u32* words; }};\n"
        'extern "C" __global__ void test(const Given given) {\n'
        "  const u32* const in = given.in;\n  u32* const words = given.words;\n"
        "  extern __shared__ __align__(128) u32 shared[];\n"
        f"  const u32 i = threadIdx.x, block = blockIdx.x, blocks = gridDim.x, width = blockDim.x;\n{body}\n}}\n"
    )


def ring(wait: str) -> str:
    """Return a body: `STEPS` times each block turns what the one before it wrote, adds 1, and hands it on."""
    return _RING.replace("STEPS", str(STEPS)).replace("WAIT", wait)


def after_ring(values: np.ndarray, blocks: int) -> np.ndarray:
    """Return the words that a ring ends with, (blocks, values)."""
    turns = STEPS * blocks - blocks + np.arange(blocks)[:, None]
    return np.where(turns % 2, values[::-1], values) + turns + 1 | STEPS << 16
