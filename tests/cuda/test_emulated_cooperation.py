"""Blocks that run side by side in the emulator: values handed on by tagged words, and waits that never end."""

from __future__ import annotations

import struct

import numpy as np
import pytest

import cuda_emulator
from cuda_emulator import EmulationError, Kernel, load_text
from ring_of_blocks import WAITS, after_ring, ring, source

pytestmark = cuda_emulator.requires_compiler


def kernel(body: str) -> Kernel:
    return load_text(source(body), "test")


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


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("wait", WAITS)
def test_values_go_round_a_ring_of_blocks(wait: str, order: int) -> None:
    wanted = kernel(ring(WAITS[wait]))
    wanted.order = order
    got = run(wanted, VALUES, 3, 3 * 32).reshape(3, 32)
    np.testing.assert_array_equal(got, after_ring(VALUES[:32], 3))


def test_blocks_of_many_warps_run_side_by_side() -> None:
    wanted = kernel(ring(WAITS["sleep"]))
    got = run(wanted, VALUES, 6, 6 * 512, threads=512, shared_bytes=232448).reshape(6, 512)
    np.testing.assert_array_equal(got, after_ring(VALUES, 6))


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
    "sleep": "while (load_one(words) != 1) rest();",
    "no sleep": "while (load_one(words) != 1) {}",
    "a lane": "while (__shfl_sync(~0u, i % 32 == 7 ? load_one(words) : 0, 7) != 1) {}",
    "a warp": "while (__shfl_sync(~0u, load_one(words), 0) != 1) { rest(); __syncwarp(); }",
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
    while (load_one(words) != 1) rest();
    store(words + 1, 7);
  } else {
    for (int j = 0; j < 30000; ++j) __syncwarp();
    store(words, 1);
  }""")
    assert run(wanted, VALUES, 2, 4)[1] == 7


def test_a_block_may_begin_when_others_have_ended() -> None:
    """So what it reads at its beginning they may have overwritten long ago."""
    wanted = kernel("""
  if (block == 1) words[2 + i] = words[0];
  for (int j = 0; j < 1000; ++j) __syncwarp();
  if (block == 0) words[0] = 5;""")
    seen = set()
    for wanted.order in range(8):
        seen |= set(run(wanted, VALUES, 2, 34)[2:].tolist())
    assert seen == {0, 5}


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
