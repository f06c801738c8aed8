#!/usr/bin/env python3
"""Time all ways of launching a kernel, to fit the tables that `plan` chooses by. Needs a GPU.

    python scripts/bench/tune_kernels.py decode --shapes 4096x4096 1024x4096 --m 1 4 8
    python scripts/bench/tune_kernels.py gemm --shapes 14336x4096 --m 16 64 256 --formats q4_k

Prints a line for each shape and M: microseconds of every plan, the fastest first, `*` after the chosen one. Times
are measured as in `bench_kernels.py`: CUDA graphs, rotated weights. Outputs are not checked; the tests do that.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import kernel_timing as timing
from q6k_kernels.cuda import decode, decode_plan, gemm_wgmma
from q6k_kernels.cuda import device as launching
from q6k_kernels.formats.types import DEFAULT, WEIGHT_TYPES, WeightType
from q6k_kernels.weights.weight import PackedWeight

Launch = Callable[[PackedWeight], None]
"""Function that multiplies with one copy of the weight."""


def _decode(
    plan: decode_plan.DecodePlan, x: Tensor, y: Tensor, device: launching.Device, weight: PackedWeight
) -> None:
    decode._launch(plan, x, weight.tiles, None, weight.n, weight.row, y, device)


def _gemm(plan: gemm_wgmma.WgmmaPlan, x: Tensor, y: Tensor, device: launching.Device, weight: PackedWeight) -> None:
    gemm_wgmma.linear(x, weight.tiles, None, weight.n, weight.row, y, device, plan)


def decode_plans(
    x: Tensor, y: Tensor, row: WeightType, device: launching.Device
) -> Iterator[tuple[str, bool, Launch]]:
    """Yield every plan that fits: its name, whether it is the chosen one, and a function that launches it."""
    (m, k), n = x.shape, y.shape[1]
    chosen = decode_plan.plan(m, n, k, row, device)
    for shape, cluster in itertools.product(
        decode_plan.SHAPES, decode_plan.CLUSTERS if device.arch >= 90 else (1,)
    ):
        kinds = itertools.product((False, True), (False, True), range(1, shape[2] + 1))
        for choice in {decode_plan.Choice.of(shape, *kind) for kind in kinds}:
            plan = decode_plan.plan(m, n, k, row, device, (cluster, choice)) if cluster <= k // 256 else None
            if plan is not None:
                how = f"{'fused' if plan.fused else 'separate'}, {'early' if plan.early else 'late'}"
                name = "{} warps, {} stages, {} blocks".format(*shape)
                name = f"{name}, {plan.ranges * cluster} in clusters of {cluster}, {how}"
                yield name, plan == chosen, partial(_decode, plan, x, y, device)


def gemm_plans(x: Tensor, y: Tensor, device: launching.Device) -> Iterator[tuple[str, bool, Launch]]:
    """Yield every configuration, with each number of blocks per multiprocessor that fits, outputs shared or not."""
    (m, k), n = x.shape, y.shape[1]
    chosen, met = gemm_wgmma.plan(m, n, k, device), set[gemm_wgmma.WgmmaPlan]()
    for config in gemm_wgmma.CONFIGS:
        for resident, share in itertools.product(range(1, config.occupancy + 1), (False, True)):
            plan = gemm_wgmma.plan_of(config, resident, share, m, n, k, device)
            if plan not in met:
                met.add(plan)
                name = f"{config.tokens} tokens x {config.rows} rows, {plan.blocks} blocks, {plan.shared} shared"
                yield name, plan == chosen, partial(_gemm, plan, x, y, device)


def tune(kernel: str, n: int, k: int, m: int, format: str, shown: int) -> str:
    """Return one line with the time of every plan."""
    device = launching.device(torch.cuda.current_device())
    copies = timing.rotated_weights(timing.random_weight(n, k, format))
    x = torch.randn(m, k, device="cuda", generator=timing.generator()).bfloat16()
    y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    plans = decode_plans(x, y, copies[0].row, device) if kernel == "decode" else gemm_plans(x, y, device)
    guess_us = max(0.8 * n * k / 4.8e6, 2 * m * n * k / 8e8)
    times: list[tuple[float, str]] = []
    for name, chosen, launch in plans:
        calls = [partial(launch, weight) for weight in copies]
        times.append((timing.time_calls(calls, guess_us, settle=not times), f"{name}{' *' if chosen else ''}"))
    fastest = "; ".join(f"{us:.2f} {name}" for us, name in sorted(times)[:shown])
    return f"{n}x{k} M={m} {format}: {fastest}"


def main() -> None:
    """Parse the options, time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("kernel", choices=("decode", "gemm"))
    add("--shapes", nargs="+", metavar="NxK", default=["4096x4096", "21504x5376"])
    add("--m", nargs="+", type=int, metavar="M")
    add("--formats", nargs="+", choices=WEIGHT_TYPES, default=[DEFAULT], metavar="NAME")
    add("--shown", type=int, default=6, help="how many of the fastest (default: 6)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_kernels: torch sees no CUDA GPU")
    ms = args.m or ([1, 2, 4, 8] if args.kernel == "decode" else [16, 32, 64, 128, 256, 512])
    if args.kernel == "gemm" and torch.cuda.get_device_capability() != (9, 0):
        sys.exit("tune_kernels: gemm needs a GPU of compute capability 9.0")
    for shape, format, m in itertools.product(args.shapes, args.formats, ms):
        n, k = map(int, shape.split("x"))
        print(tune(args.kernel, n, k, m, format, args.shown), flush=True)


if __name__ == "__main__":
    main()
