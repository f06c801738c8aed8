"""Weights for GPU tests: codes and scales that tests know, and planes and tiles made from them.

Codes and scales are the truth. Planes are made from them here, by the format's text, and
tests/ops/test_fp64.py compares them with `oracles`. Tiles are made from planes by the operation under test.
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

from q6k_kernels.formats.blocks import decode
from q6k_kernels.formats.checks import PLANE_DTYPES
from q6k_kernels.formats.ggml import GGMLType
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType
from q6k_kernels.ops import accuracy, schema

DEVICE = "cuda"
Kind = Literal["genuine", "random", "extreme"]
GENUINE_WEIGHTS = 1 << 21
"""Weights to quantise for "genuine"; further rows repeat them."""
EVERY = list(WEIGHT_TYPES)
"""Names of all weight types."""
CORE = EVERY[:5]
"""Names of the most common ones."""
KINDS_OF_ROWS = [EVERY[0], EVERY[2], "q5_0", "q4_1", "q8_0", "iq4_nl", "mxfp4"]
"""A weight type of each kind of code and scale."""


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
    """A weight (N, K), or a stack (E, N, K), of any weight type.

    Attributes:
        stored: stored codes, uint8 (..., N, K).
        arrays: the arrays of scales by role, (..., N, K / weights).
        row: row of the weight type.
    """

    stored: Tensor
    arrays: dict[str, Tensor]
    row: WeightType

    def __getitem__(self, rows: Any) -> Weight:
        """Return some rows, or one weight of a stack."""
        return Weight(self.stored[rows], {role: array[rows] for role, array in self.arrays.items()}, self.row)

    @property
    def format(self) -> str:
        """Name of the weight type."""
        return self.row.name

    @property
    def n(self) -> int:
        """Rows of each matrix."""
        return self.stored.shape[-2]

    @property
    def k(self) -> int:
        """Columns."""
        return self.stored.shape[-1]

    @cached_property
    def q(self) -> Tensor:
        """Codes, int8: stored ones minus the offset, or looked up."""
        if self.row.book:
            return torch.tensor(self.row.book, dtype=torch.int8, device=self.stored.device)[self.stored.int()]
        if self.row.bits == 8:
            return self.stored.view(torch.int8)
        return self.stored.view(torch.int8) - self.row.offset

    @cached_property
    def scale(self) -> Tensor:
        """Scales, float32 (..., N, K/group)."""
        if self.row.scales[0].dtype == "U8" and not self.row.stepped:
            return torch.exp2(self.arrays["scale"].double() - 128).float()
        return self._times("scale", "steps")

    @cached_property
    def least(self) -> Tensor | None:
        """Mins, float32 (..., N, K/group), or None."""
        return self._times("min", "min_steps") if self.row.minimum else None

    def _times(self, role: str, steps: str) -> Tensor:
        values = self.arrays[role].float()
        if not self.row.stepped:
            return values
        return values * self.arrays[steps].float().repeat_interleave(256 // self.row.group, -1)

    @property
    def s(self) -> Tensor:
        """`scale` in float64."""
        return self.scale.double()

    @property
    def exact(self) -> accuracy.Weight:
        """The weight for `accuracy`."""
        return accuracy.Weight(self.q, self.s, None if self.least is None else self.least.double())

    @cached_property
    def planes(self) -> list[Tensor]:
        """The arrays of a bundle, in its order."""
        return [*planes_of(self.stored, self.row), *(self.arrays[array.role] for array in self.row.scales)]

    @cached_property
    def tiles(self) -> Tensor:
        """Tiles, packed on the device of the planes."""
        return schema.pack(self.planes, self.format)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Return the weights (..., N, K): scale * code - min in fp32, then rounded."""
        groups = self.q.view(*self.scale.shape, self.row.group).float() * self.scale.unsqueeze(-1)
        if self.least is not None:
            groups = groups - self.least.unsqueeze(-1)
        return groups.flatten(-2).to(dtype)


def planes_of(u: Tensor, row: WeightType) -> list[Tensor]:
    """Pack stored codes (..., K) into the code planes of a weight type."""
    if row.bits == 8:
        return [u.view(torch.int8)]
    low, high = u & 15, u >> 4
    planes = [low[..., 0::2] | low[..., 1::2] << 4]
    if row.bits == 6:
        # (chunk, w, position, parity): weight 32c + 8w + 2 position + parity
        pairs = high.unflatten(-1, (-1, 4, 4, 2))
        byte = pairs[..., 0, :] | pairs[..., 1, :] << 2 | pairs[..., 2, :] << 4 | pairs[..., 3, :] << 6
        planes.append(byte.transpose(-1, -2).flatten(-3))
    if row.bits == 5:
        bits = high.unflatten(-1, (-1, 4, 2))  # (byte, position, parity)
        four = bits[..., 0, :] | bits[..., 1, :] << 1 | bits[..., 2, :] << 2 | bits[..., 3, :] << 3
        planes.append(four[..., 0] | four[..., 1] << 4)
    return planes


def random_source(seed: int = 0) -> torch.Generator:
    """Return a random generator on the tests' device."""
    return torch.Generator(DEVICE).manual_seed(seed)


@lru_cache(maxsize=2)
def weight(kind: Kind, n: int, k: int, format: str, stack: int | None = None) -> Weight:
    """Return a weight of random content, the same for the same arguments."""
    row = WEIGHT_TYPES[format]
    stored, arrays = _parts(kind, n * (stack or 1), k, row)
    if stack is not None:
        stored = stored.view(stack, n, -1)
        arrays = {role: array.view(stack, n, -1) for role, array in arrays.items()}
    return Weight(stored, arrays, row)


Parts = tuple[Tensor, dict[str, Tensor]]


@lru_cache(maxsize=1)
def _parts(kind: Kind, n: int, k: int, row: WeightType) -> Parts:
    """Return stored codes and the arrays of scales."""
    return {"genuine": _genuine, "random": _random, "extreme": _extreme}[kind](n, k, row)


def _genuine(n: int, k: int, row: WeightType) -> Parts:
    """Return normal weights, quantised by ggml's own code."""
    import libgguf

    base = min(n, max(16, GENUINE_WEIGHTS // k))
    values = np.random.default_rng(n + k).normal(size=(base, k)).astype(np.float32) * np.float32(0.02)
    raw = libgguf.quantize_rows(values, int(GGMLType[row.ggml]))
    codes, arrays = decode(np.frombuffer(raw, dtype=np.uint8).reshape(base, -1), row)
    source = random_source(n)
    at = torch.cat(
        (
            torch.arange(base, device=DEVICE),
            torch.randint(base, (n - base,), device=DEVICE, generator=source),
        )
    )

    def placed(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        flat = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).copy()).view(dtype)
        return flat.view(base, -1).to(DEVICE)[at]

    return placed(codes, torch.uint8), {
        each.role: placed(arrays[each.role], PLANE_DTYPES[each.dtype]) for each in row.scales
    }


def _random(n: int, k: int, row: WeightType) -> Parts:
    """Return equally likely codes and sub-scales, with scales of a real model's size, steps mostly subnormal."""
    source = random_source(n * k)
    stored = torch.randint(0, 1 << row.bits, (n, k), device=DEVICE, generator=source).to(torch.uint8)
    arrays = {}
    for each in row.scales:
        shape = n, k // each.weights
        if each.dtype == "F16" or each.dtype == "BF16":
            size = 2e-5 if row.stepped else 2e-3
            values = torch.randn(shape, device=DEVICE, generator=source) * size
        else:
            values = torch.randint(*limits(row, each.dtype), shape, device=DEVICE, generator=source)
        arrays[each.role] = values.to(PLANE_DTYPES[each.dtype])
    return stored, arrays


def limits(row: WeightType, dtype: str) -> tuple[int, int]:
    """Return the least integer scale and one more than the largest, of exponents those of a real model."""
    if dtype == "I8":
        return (-128, 128) if row.group == 16 else (-32, 32)
    return (0, 64) if row.stepped else (110, 124)


def _extreme(n: int, k: int, row: WeightType) -> Parts:
    """Return rows of one code, extreme sub-scales, and scales zero of either sign, subnormal, large, negative.

    Scales and mins of a row are different ones of these. Exponents are 0 and 1, whose scales are subnormal, and in
    one group of some rows 254, whose weights are infinite or next to it.
    """
    stored, arrays = _random(n, k, row)
    at = torch.arange(n, device=DEVICE)
    stored[at % 4 == 0] = 0 if row.bits < 8 else 128
    stored[at % 4 == 1] = (1 << row.bits) - 1 if row.bits < 8 else 127
    stored[at % 8 == 2] = row.offset
    halves = torch.tensor([0.0, 5.96e-8, -5.96e-8, 6.09e-5, -6.1e-5, 0.015, -3e-6, -0.0], device=DEVICE)
    for turn, each in enumerate(row.scales):
        array = arrays[each.role]
        if each.dtype in ("F16", "BF16"):
            array.copy_(halves[((at + 3 * turn) % 8).unsqueeze(-1).expand_as(array)])
            continue
        low, high = limits(row, each.dtype)
        exponents = each.dtype == "U8" and not row.stepped
        edges = [0, 1, high - 1, low] if exponents else [low, 0, high - 1, low]
        pattern = torch.tensor(edges, device=DEVICE).to(array.dtype).roll(turn)
        array[at % 3 == 0] = pattern.repeat(-(-array.shape[1] // 4))[: array.shape[1]]
        array[at % 5 == 4] = pattern[0]
        if exponents:
            array[at % 16 == 7, -1] = 254
    return stored, arrays


def inputs(m: int, k: int, dtype: torch.dtype, seed: int = 3) -> Tensor:
    """Return activations (m, k) like a model's: normal, with outliers."""
    x = torch.randn(m, k, device=DEVICE, generator=random_source(seed))
    x[:, 5::97] *= 30
    return x.to(dtype)


def width(k: int, format: str) -> int:
    """Return k, a multiple of 256, or 32 less where rows may end within a super-block."""
    return k - 32 if WEIGHT_TYPES[format].block == 32 else k


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
