#!/usr/bin/env python3
"""Time a step's attention alone, and beside a product, for texts of several lengths; print a table.

    python scripts/bench/bench_attention.py [--heads 32 8 128] [--keys 512 2048 32768 131072] [--every-block]

One layer's launch with random keys, of bf16 and of int8, in CUDA graphs (`kernel_timing`). Keys and values are
rotated, so that none is found in the L2 cache. "alone" is one launch after the other, of which each may start
before the last has ended; "beside" is what a launch adds to a product of 6144 x 4096, Q6_K, before it. The
bound is the time of the cache's bytes at the rate of a kernel that only reads. With --every-block the blocks
are not those that `attend_cuda.block_of` chooses, but all with 4, 8 or 16 warps and rings of 1 or 2 pieces.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import kernel_timing as timing
from q6k_kernels.cuda import decode
from q6k_kernels.cuda import device as launching
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate import attend_cuda
from q6k_kernels.generate.attend_cuda import Block
from q6k_kernels.generate.cache_codes import coded
from q6k_kernels.generate.heads import Cached, Heads
from q6k_kernels.jit import loader

MACROS = (("Q6K_FP16", 0), ("Q6K_TOKENS", 1), ("Q6K_FUSED", 0))
N, K, FORMAT = 6144, 4096, "q6_k"
"""The product before attention: q, k and v of Llama 3.1 8B."""
READ_BYTES = 2 << 30
HEADING = "  keys  cache  warps  pieces      alone            beside            of the bound"


def random(*shape: int) -> Tensor:
    """Return random numbers on the GPU, bf16."""
    return torch.randn(*shape, device="cuda", generator=timing.generator()).bfloat16()


def caches(key_heads: int, dim: int, keys: int, *, codes: bool) -> list[Cached]:
    """Return caches of one text with as many slots as keys, together larger than the L2 cache."""
    both = random(2, key_heads, keys, dim)
    if not codes:
        return [Cached(each[:1], each[1:], 0) for each in timing.rotated(both)]
    parts = [coded(part) for part in both.split(1)]  # type: ignore[no-untyped-call]
    scales = torch.cat([part[1] for part in parts])
    held = timing.rotated(torch.cat([part[0] for part in parts]))
    return [Cached(each[:1], each[1:], 0, scales=(scales[:1], scales[1:])) for each in held]


def blocks(dim: int, keys: int, every: bool) -> Iterator[Block]:
    """Yield the blocks to time."""
    device = launching.device(0)
    for codes in (False, True):
        if not every:
            yield attend_cuda.block_of(dim, device, keys, codes)
            continue
        for warps, stages in itertools.product((4, 8, 16), (1, 2)):
            block = Block(dim, warps, stages, codes)
            fits = block.shared_bytes <= device.shared_bytes - attend_cuda.attend_static(dim)
            if fits and warps * dim <= attend_cuda.WARPS_TIMES_DIM:
                yield block


class Attention:
    """A layer's attention with heads and a number of keys."""

    def __init__(self, count: int, key_heads: int, dim: int, keys: int) -> None:
        angles = torch.rand(keys, dim // 2, device="cuda")
        self._heads = Heads(count, key_heads, dim, dim**-0.5, None, None, None, angles.cos(), angles.sin())
        self._given = [random(1, heads * dim) for heads in (count, key_heads, key_heads)]
        self._position = torch.tensor([keys - 1], device="cuda")
        self._out = torch.empty(count * dim, dtype=torch.bfloat16, device="cuda")
        self._grid = rows, blocks, together = attend_cuda.grid(self._heads, launching.device(0))
        partials = torch.empty(rows * blocks * together * (dim + 2), device="cuda")
        self._shared = partials, torch.zeros(rows, dtype=torch.int32, device="cuda")

    def launch(self, cached: Cached, block: Block) -> None:
        """Launch it."""
        q, k, v = self._given
        rows, blocks, together = self._grid
        outputs = self._out.data_ptr(), 0, 0
        given = attend_cuda.arguments(q, k, v, self._heads, cached, self._position, self._shared, outputs, together)
        loader.load(*attend_cuda.variant(MACROS, block, False, False), 0).launch(
            (blocks, rows, 1),
            32 * block.warps,
            given,
            stream=launching.stream(launching.device(0)),
            shared_bytes=block.shared_bytes,
            dependent=launching.device(0).arch >= 90,
        )


def products() -> list[Callable[[], object]]:
    """Return products with copies of a weight."""
    device, row = launching.device(0), weight_type(FORMAT)
    codes = decode._quantize(random(1, K), 1, device)
    y = torch.empty(1, N, dtype=torch.bfloat16, device="cuda")

    def product(tiles: Tensor) -> Callable[[], object]:
        return lambda: decode.linear_of_codes(codes, K, tiles, None, N, row, y, device)

    return [product(tiles) for tiles in timing.rotated(timing.random_weight(N, K, FORMAT).tiles)]


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time a step's attention.")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("COUNT", "KEY_HEADS", "DIM"))
    parser.add_argument("--keys", type=int, nargs="+", default=[512, 2048, 8192, 32768, 131072])
    parser.add_argument("--every-block", action="store_true")
    args = parser.parse_args(arguments)
    count, key_heads, dim = args.heads
    every = {block for keys in args.keys for block in blocks(dim, keys, args.every_block)}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda block: loader.load(*attend_cuda.variant(MACROS, block, False, False), 0), every))
    rate, before = timing.read_gb_per_s(READ_BYTES), products()
    only = timing.time_calls(before, 5, settle=True)
    print(
        f"{count} heads of {dim} values, {key_heads} of keys; {rate:.0f} GB/s; a product {only:.2f} us\n{HEADING}"
    )
    for keys in args.keys:
        attention = Attention(count, key_heads, dim, keys)
        held = {codes: caches(key_heads, dim, keys, codes=codes) for codes in (False, True)}
        for block in blocks(dim, keys, args.every_block):
            print(row(attention, held[block.codes], block, keys, before, only, rate), flush=True)


def row(
    attention: Attention,
    held: list[Cached],
    block: Block,
    keys: int,
    before: list[Callable[[], object]],
    only: float,
    rate: float,
) -> str:
    """Time a block, and return its row."""

    def launch(cached: Cached) -> Callable[[], None]:
        return lambda: attention.launch(cached, block)

    def after(product: Callable[[], object], cached: Cached) -> Callable[[], None]:
        def both() -> None:
            product()
            attention.launch(cached, block)

        return both

    tensors = held[0].keys, held[0].values, *(held[0].scales or ())
    nbytes = sum(each.nbytes for each in tensors)
    guess = nbytes / rate / 1e3
    rounds = max(len(held), len(before))
    pairs = [after(before[i % len(before)], held[i % len(held)]) for i in range(rounds)]
    alone = timing.time_calls([launch(each) for each in held], guess)
    beside = timing.time_calls(pairs, guess + only) - only
    figures = "".join(f"{us:9.2f} us {nbytes / us / 1e3:5.0f} GB/s" for us in (alone, beside))
    cache = "int8" if block.codes else "bf16"
    return f"{keys:6}  {cache}  {block.warps:5}  {block.stages:6}{figures}{guess / beside:8.0%}"


if __name__ == "__main__":
    main()
