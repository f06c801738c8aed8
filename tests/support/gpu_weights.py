"""Weights for GPU tests: codes and scales that tests know, and planes and tiles made from them.

Codes and scales are the truth. Planes are made from them here, by the format's text; test_gpu_fp64.py compares them
with `oracles`. Tiles are made from planes by the operation under test.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from q6k_kernels.formats.blocks import BLOCK_BYTES, D_AT, SCALES_AT, decode
from q6k_kernels.formats.types import WeightType, row_of
from q6k_kernels.ops import schema

DEVICE = "cuda"
Kind = Literal["genuine", "random", "extreme"]
GENUINE_WEIGHTS = 1 << 21
"""Weights to quantise for "genuine"; further rows repeat them with random signs of d."""
Q6_K = 14


@contextmanager
def made_on_the_cpu() -> Iterator[None]:
    """Make weights and tiles on the CPU inside the block, and forget them afterwards."""
    global DEVICE
    before, DEVICE = DEVICE, "cpu"
    _forget()
    try:
        yield
    finally:
        DEVICE = before
        _forget()


def _forget() -> None:
    weight.cache_clear()
    _parts.cache_clear()


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight (N, K), or a stack (E, N, K).

    Attributes:
        q: int8 (..., N, K), -32..31.
        sub_scales: int8 (..., N, K/16).
        d: float16 (..., N, K/256).
        scales: format of the scales in planes and tiles, "bf16" or "exact".
    """

    q: Tensor
    sub_scales: Tensor
    d: Tensor
    scales: Literal["bf16", "exact"]

    @property
    def row(self) -> WeightType:
        """Row of the weight type."""
        return row_of("Q6_K", self.scales)

    @property
    def format(self) -> str:
        """Name of the weight type."""
        return self.row.name

    @property
    def n(self) -> int:
        """Rows of each matrix."""
        return self.q.shape[-2]

    @property
    def k(self) -> int:
        """Columns."""
        return self.q.shape[-1]

    @cached_property
    def scale(self) -> Tensor:
        """Scales, float32 (..., N, K/16): d times the sub-scale, exact or rounded to bf16."""
        product = self.d.float().repeat_interleave(16, -1) * self.sub_scales.float()
        return product if self.scales == "exact" else product.bfloat16().float()

    @property
    def s(self) -> Tensor:
        """`scale` in float64."""
        return self.scale.double()

    @cached_property
    def planes(self) -> list[Tensor]:
        """The arrays of a bundle, in its order."""
        scales = [self.sub_scales, self.d] if self.scales == "exact" else [self.scale.bfloat16()]
        return [*planes_of(self.q), *scales]

    @cached_property
    def tiles(self) -> Tensor:
        """Tiles, packed on the device of the planes."""
        return schema.pack(self.planes, self.format)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Return the weights (..., N, K), rounded once from fp32, which holds the products exactly."""
        groups = self.q.view(*self.scale.shape, 16).float() * self.scale.unsqueeze(-1)
        return groups.flatten(-2).to(dtype)


def planes_of(q: Tensor) -> tuple[Tensor, Tensor]:
    """Pack codes -32..31 (..., K) to ql (..., K/2) and qh (..., K/4)."""
    u = (q + 32).to(torch.uint8)
    low, high = u & 15, u >> 4
    ql = low[..., 0::2] | low[..., 1::2] << 4
    pairs = high.unflatten(-1, (-1, 4, 4, 2))  # (chunk, w, position, parity): weight 32c + 8w + 2 position + parity
    byte = pairs[..., 0, :] | pairs[..., 1, :] << 2 | pairs[..., 2, :] << 4 | pairs[..., 3, :] << 6
    return ql, byte.transpose(-1, -2).flatten(-3)


def random_source(seed: int = 0) -> torch.Generator:
    """Return a random generator on the tests' device."""
    return torch.Generator(DEVICE).manual_seed(seed)


@lru_cache(maxsize=2)
def weight(kind: Kind, n: int, k: int, scales: Literal["bf16", "exact"], stack: int | None = None) -> Weight:
    """Return a weight of random content, the same for the same arguments."""
    parts = _parts(kind, n * (stack or 1), k)
    if stack is not None:
        parts = [part.view(stack, n, -1) for part in parts]
    return Weight(*parts, scales)


@lru_cache(maxsize=1)
def _parts(kind: Kind, n: int, k: int) -> list[Tensor]:
    """Return q, sub-scales and d, the same for both scale formats."""
    return {"genuine": _genuine, "random": _random, "extreme": _extreme}[kind](n, k)


def _genuine(n: int, k: int) -> list[Tensor]:
    """Return normal weights, quantised by ggml's own code."""
    import libgguf

    base = min(n, max(16, GENUINE_WEIGHTS // k))
    values = np.random.default_rng(n + k).normal(size=(base, k)).astype(np.float32) * np.float32(0.02)
    blocks = np.frombuffer(libgguf.quantize_rows(values, Q6_K), dtype=np.uint8).reshape(base, -1)
    codes, _ = decode(blocks)
    each = blocks.reshape(base, k // 256, BLOCK_BYTES)
    sub_scales = np.ascontiguousarray(each[:, :, SCALES_AT:D_AT]).view(np.int8).reshape(base, -1)
    d = np.ascontiguousarray(each[:, :, D_AT:]).view(np.float16).reshape(base, -1)
    source = random_source(n)
    at = torch.cat(
        (
            torch.arange(base, device=DEVICE),
            torch.randint(base, (n - base,), device=DEVICE, generator=source),
        )
    )
    parts = [torch.from_numpy(part).to(DEVICE)[at] for part in (codes, sub_scales, d)]
    signs = torch.randint(0, 2, parts[2].shape, device=DEVICE, generator=source) * 2 - 1
    signs[:base] = 1
    return [*parts[:2], parts[2] * signs.half()]


def _random(n: int, k: int) -> list[Tensor]:
    """Return equally likely codes and sub-scales, with d of a real model's size, mostly subnormal."""
    source = random_source(n * k)
    q = torch.randint(-32, 32, (n, k), dtype=torch.int8, device=DEVICE, generator=source)
    sub_scales = torch.randint(-128, 128, (n, k // 16), dtype=torch.int8, device=DEVICE, generator=source)
    d = torch.randn(n, k // 256, device=DEVICE, generator=source) * 2e-5
    return [q, sub_scales, d.half()]


def _extreme(n: int, k: int) -> list[Tensor]:
    """Return rows of one code, extreme sub-scales, and d zero of either sign, subnormal, large, negative."""
    q, sub_scales, d = _random(n, k)
    row = torch.arange(n, device=DEVICE)
    q[row % 4 == 0] = -32
    q[row % 4 == 1] = 31
    pattern = torch.tensor([-128, 0, 127, -1], dtype=torch.int8, device=DEVICE)
    sub_scales[row % 3 == 0] = pattern.repeat(k // 64)
    sub_scales[row % 5 == 4] = -128
    steps = torch.tensor([0.0, 5.96e-8, -5.96e-8, 6.09e-5, -6.1e-5, 0.015, -3e-6, -0.0], device=DEVICE)
    d.copy_(steps[(row % 8).unsqueeze(-1).expand_as(d)])
    q[row % 7 == 6] = 0
    return [q, sub_scales, d]


def inputs(m: int, k: int, dtype: torch.dtype, seed: int = 3) -> Tensor:
    """Return activations (m, k) like a model's: normal, with outliers."""
    x = torch.randn(m, k, device=DEVICE, generator=random_source(seed))
    x[:, 5::97] *= 30
    return x.to(dtype)


def bias_of(n: int, dtype: torch.dtype) -> Tensor:
    """Return a bias (n,) of the size of an output."""
    return (torch.randn(n, device=DEVICE, generator=random_source(n)) * 2).to(dtype)


@contextmanager
def poisoned() -> Iterator[None]:
    """Make torch.empty return NaN (or bytes of 255) inside the block, so that unwritten values show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, activations: str = "auto") -> Tensor:
    """Call `q6k::linear` with poisoned memory."""
    with poisoned():
        return schema.linear(x, weight.tiles, bias, weight.n, weight.format, activations)


def poisoned_call(operation: Any, *arguments: Any) -> Tensor:
    """Call any operation with poisoned memory."""
    with poisoned():
        result: Tensor = operation(*arguments)
    return result
