"""Barriers in shared memory and bulk copies in the emulator: rings of tiles, and what goes wrong with them."""

from __future__ import annotations

import struct

import numpy as np
import pytest

import cuda_emulator
from cuda_emulator import EmulationError, Kernel, load_text

pytestmark = cuda_emulator.requires_compiler

TEXT = """
typedef unsigned char u8; typedef unsigned int u32; typedef unsigned long long u64;
static inline u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
static inline void make(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}
static inline void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
static inline void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
static inline void wait(u32 barrier, u32 parity) {
  u32 done = 0;
  while (!done) {
    asm volatile(
        "{\\n"
        ".reg .pred passed;\\n"
        "mbarrier.try_wait.parity.shared::cta.b64 passed, [%1], %2;\\n"
        "selp.u32 %0, 1, 0, passed;\\n"
        "}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  }
}
static inline bool test(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\\n"
      ".reg .pred passed;\\n"
      "mbarrier.test_wait.parity.shared::cta.b64 passed, [%1], %2;\\n"
      "selp.u32 %0, 1, 0, passed;\\n"
      "}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done;
}
static inline void copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
"""
DATA = np.frombuffer(np.random.default_rng(5).bytes(1 << 15), dtype=np.uint8).copy()
DATA = DATA[-DATA.ctypes.data % 16 :][: 1 << 14]


def kernel(body: str) -> Kernel:
    """A kernel (const u8* in, u8* out); its barriers are the first 64 bytes of shared memory."""
    return load_text(
        f'{TEXT}\nextern "C" __global__ void test(const u8* in, u8* out) {{\n'
        "  extern __shared__ __align__(128) u8 shared[];\n"
        f"  const u32 i = threadIdx.x, lane = i % 32, warp = i / 32, first = at(shared);\n{body}\n}}\n",
        "test",
    )


def run(wanted: Kernel, size: int, threads: int, blocks: int = 1) -> bytes:
    """Its output."""
    out = np.zeros(size, dtype=np.uint8)
    arguments = struct.pack("@PP", DATA.ctypes.data, out.ctypes.data)
    wanted.launch((blocks, 1, 1), threads, arguments, shared_bytes=4096, cooperative=True)
    return out.tobytes()


def ring(wait: str, together: str) -> Kernel:
    """Each warp reads 8 tiles of 64 bytes through two stages, as fast as they come, and turns each around."""
    return kernel(f"""
  const u32 barriers = first + 16 * warp, stages = first + 64 + 128 * warp;
  const u8* const from = in + 1024 * blockIdx.x + 512 * warp;
  auto request = [&](int tile) {{
    if (lane != 0) return;
    expect(barriers + tile % 2 * 8, 64);
    for (int half = 0; half < 64; half += 32) {{
      copy(stages + tile % 2 * 64 + half, from + tile * 64 + half, 32, barriers + tile % 2 * 8);
    }}
  }};
  if (lane < 2) make(barriers + 8 * lane, 1);
  __syncwarp();
  request(0); request(1);
  for (int tile = 0; tile < 8; ++tile) {{
    {wait}
    const u8* const stage = shared + 64 + 128 * warp + tile % 2 * 64;
    u8* const to = out + 1024 * blockIdx.x + 512 * warp + 64 * tile;
    to[lane] = stage[63 - lane], to[32 + lane] = stage[31 - lane];
    {together}
    if (tile + 2 < 8) request(tile + 2);
  }}""")


WAIT, TOGETHER = "wait(barriers + tile % 2 * 8, tile / 2 % 2);", "__syncwarp();"
TEST = "while (!__all_sync(~0u, test(barriers + tile % 2 * 8, tile / 2 % 2))) {}"
TURNED = DATA[:2048].reshape(32, 64)[:, ::-1].tobytes()


@pytest.mark.parametrize(
    ("wait", "together", "right"),
    [
        (WAIT, TOGETHER, True),
        (TEST, TOGETHER, True),
        (f"if (lane == 0) {WAIT}", TOGETHER, False),
        (WAIT, "", False),
    ],
)
def test_a_ring_of_tiles(wait: str, together: str, right: bool) -> None:
    """A lane that does not wait reads too early; one that comes late finds another tile, or waits for ever."""
    seen = list[bytes | str]()
    for order in range(8):
        tiles = ring(wait, together)
        tiles.order = order
        try:
            seen.append(run(tiles, 2048, 64, blocks=2))
        except EmulationError as error:
            seen.append(str(error))
    assert (set(seen) == {TURNED}) is right


@pytest.mark.parametrize("order", range(4))
def test_threads_arrive_as_well(order: int) -> None:
    """64 threads arrive in each phase, one of them expects bytes too: then all has come that they wrote."""
    phases = kernel("""
  if (i == 0) make(first, 64);
  __syncthreads();
  for (u32 phase = 0; phase < 5; ++phase) {
    u8* const half = shared + 64 + phase % 2 * 128;
    half[i] = in[64 * phase + i] + 1;
    if (i == 7) {
      expect(first, 64);
      copy(at(half) + 64, in + 64 * phase, 64, first);
    } else {
      arrive(first);
    }
    wait(first, phase % 2);
    out[64 * phase + i] = half[63 - i] + half[64 + i];
  }""")
    phases.order = order
    rows = DATA[: 5 * 64].reshape(5, 64)
    assert run(phases, 320, 64) == (rows[:, ::-1] + 1 + rows).tobytes()


def test_a_test_does_not_wait() -> None:
    """It may find nothing at first, and finds the bytes in the end; the clock goes on meanwhile."""
    tests = kernel("""
  u64 before, after;
  make(first, 1); expect(first, 16); copy(first + 64, in, 16, first);
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(before));
  for (int j = 0; j < 4; ++j) out[j] = test(first, 0);
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(after));
  out[4] = after > before, out[5] = test(first, 1);""")
    seen = []
    for tests.order in (0, 1):
        seen.append(list(run(tests, 6, 1)))
    assert seen == [[0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("make(first, 1); copy(first + 64, in + 8, 16, first);", "misaligned bulk copy"),
        ("make(first, 1); copy(first + 64, in, 24, first);", "misaligned bulk copy"),
        ("make(first, 1); copy(first + 72, in, 16, first);", "misaligned access to shared memory"),
        ("make(first, 1); copy(first + 4080, in, 32, first);", "access outside dynamic shared memory"),
        ("make(first + 4, 1);", "misaligned access to shared memory"),
        ("make(first, 1); make(first, 1);", "a barrier is made twice"),
        ("make(first, 0);", "a barrier for 0 arrivals"),
        ("arrive(first);", "no barrier was made there"),
        ("copy(first + 64, in, 16, first);", "no barrier was made there"),
        ("make(first, 1); expect(first, 16); arrive(first);", "more arrivals at a barrier than it was made for"),
        ("make(first, 1); expect(first, 16); copy(first + 64, in, 16, first);", "nobody has waited for its bulk"),
        ("make(first, 2); arrive(first); wait(first, 0);", r"wait for each other: block 0, 0, 0 \(1 spin"),
        (
            "make(first, 1); expect(first, 32); copy(first + 64, in, 16, first); wait(first, 0);",
            "wait for each other",
        ),
        ("make(first, 1); arrive(first); wait(first, 1);", "wait for each other"),
    ],
)
def test_mistakes_are_refused(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run(kernel(body), 64, 1)
