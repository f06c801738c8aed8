"""Measure products with experts for bench_kernels.py: shares of the read bandwidth, and a dense grouped product.

Each call has its own choice of experts, so that weights do not sit in the L2 cache. The bytes that count are those
of the experts that a call meets, once each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import bench_kernels_rows as rows_of
import kernel_timing as timing
from bench_kernels_rows import Row
from q6k_kernels.formats.types import weight_type
from q6k_kernels.ops import grouped, schema

FORMAT, TOP = "q4_k", 8
SHAPES = ((128, 704, 2816), (256, 512, 2048), (128, 768, 2048))
"""Experts, N and K of Gemma 4 26B-A4B, Qwen 3.6 35B-A3B and Qwen 3 30B-A3B."""
MS = (1, 2, 4, 8, 64, 512)
DENSE_FROM = 64
"""Rows of activations from which a dense product is timed, too."""
MOST_ERROR = 0.02
MET_BYTES = 400 << 20
"""Least bytes of experts that all calls of a series meet together, where there are so many."""
MOST_CHOICES = 24
READ, DENSE = ("70% of read", 0.70), ("0.8x dense", 0.8)
"""Targets with M = 1 and M = 512: their words, and their bounds."""


def rows(only: re.Pattern[str]) -> Iterator[Row]:
    """Yield the rows to measure, without figures."""
    for count, n, k in SHAPES:
        for m in MS:
            row: Row = {"operation": "experts", "count": count, "n": n, "k": k, "m": m, "format": FORMAT}
            if only.search(rows_of.label(row)):
                yield row


def measure(row: Row, read_gb_per_s: float) -> None:
    """Check and time a row, and add its figures."""
    count, n, k, m = (row[key] for key in ("count", "n", "k", "m"))
    tiles, weights = _stack(count, n, k)
    random = timing.generator()
    x = torch.randn(m, k, device="cuda", generator=random).bfloat16()
    each = tiles[0].numel()
    choices = [_chosen(m, count, random) for _ in range(max(2, min(MOST_CHOICES, MET_BYTES // (each * m * TOP))))]
    _check(grouped.experts(x, tiles, choices[0], None, n, FORMAT, "auto"), x, weights, choices[0])
    met = sum(len(set(each.flatten().tolist())) for each in choices) / len(choices)
    calls = [partial(grouped.experts, x, tiles, chosen, None, n, FORMAT, "auto") for chosen in choices]
    us = timing.time_calls(calls, max(4.0, 0.8 * met * each / 4.8e6), settle=True)
    gb_per_s = met * each / us / 1e3
    row |= {"us": round(us, 2), "gb_per_s": round(gb_per_s), "read_share": round(gb_per_s / read_gb_per_s, 4)}
    if m >= DENSE_FROM:
        row["dense_us"] = round(_dense_us(x, weights, choices[0]), 2)
        row["times_dense"] = round(row["dense_us"] / us, 3)


def judge(row: Row) -> None:
    """Add to a row the targets that apply to it, and whether each is met."""
    found = {1: (READ, row.get("read_share")), 512: (DENSE, row.get("times_dense"))}.get(row["m"])
    row["targets"] = []
    if found is not None:
        (words, bound), value = found
        row["targets"] = [{"target": words, "met": value is not None and value >= bound}]


def line(row: Row) -> str:
    """Return a row of the table."""
    figures = ""
    if "us" in row:
        figures = f"{row['us']} us, {row['read_share']:.0%} of read"
    if "times_dense" in row:
        figures += f", dense {row['dense_us']} us, {row['times_dense']:.2f}x dense"
    return f"  {rows_of.label(row)}: {figures}  {rows_of.verdict(row)}".rstrip()


def _stack(count: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Return the tiles of experts, all copies of one, and their dense weights in bf16 (count, n, k)."""
    row = weight_type(FORMAT)
    planes = timing.random_planes(n, k, row, timing.generator())
    tiles = schema.pack([torch.stack([plane] * count) for plane in planes], FORMAT)
    one = schema.dequantize(tiles[0], n, k, FORMAT, torch.bfloat16)
    return tiles, one.repeat(count, 1, 1)


def _chosen(m: int, count: int, random: torch.Generator) -> Tensor:
    """Return different experts for each row, equally likely, int64 (m, TOP)."""
    return torch.rand(m, count, device="cuda", generator=random).topk(TOP).indices


def _check(y: Tensor, x: Tensor, weights: Tensor, chosen: Tensor) -> None:
    expected = (x @ weights[0].T).float()[:, None].expand(y.shape)  # all experts are equal here
    error = float((y.float() - expected).norm() / expected.norm())
    if not error <= MOST_ERROR:
        raise ArithmeticError(
            f"relative L2 error {error:.3g} of {chosen.numel()} rows, right is at most {MOST_ERROR}"
        )


def _dense_us(x: Tensor, weights: Tensor, chosen: Tensor) -> float:
    """Return the microseconds of torch's grouped product of the same rows in bf16, put into order beforehand."""
    order = chosen.flatten().argsort(stable=True)
    rows, ends = x[order // TOP], torch.bincount(chosen.flatten(), minlength=len(weights)).cumsum(0).int()
    call = partial(torch._grouped_mm, rows, weights.mT, offs=ends)
    return timing.time_calls([call] * 2, 50.0, settle=True)
