"""The self-test: every operation once on this machine, with small random weights.

The operations' results are compared with those of `accuracy` on the CPU: products within its tolerance, rows bit
for bit. On a GPU the first run takes some seconds, while kernels are compiled, and later ones tenths of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from q6k_kernels.cuda import dispatch
from q6k_kernels.errors import CudaError
from q6k_kernels.formats.checks import PLANE_DTYPES
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType
from q6k_kernels.ops import (
    accuracy,
    schema,  # noqa: F401  ops registers the operations
)

N, K = 275, 512
"""Shape of the weight: rows that end within a tile, and two super-blocks."""
PRODUCTS: tuple[tuple[int, Literal["int8", "bf16"]], ...] = ((1, "int8"), (16, "bf16"), (300, "bf16"))
"""Rows of activations and how they are treated: decode, a short prefill and a long one."""
SEED = 6


@dataclass(frozen=True)
class Check:
    """One operation on one device.

    Attributes:
        name: the operation, the weight type and the sizes.
        passed: whether the result is right.
        detail: how close the result is, or what is wrong.
    """

    name: str
    passed: bool
    detail: str


def run(device: torch.device | str) -> list[Check]:
    """Run all checks on a device, `cpu` or a GPU. Any error but CudaError fails the check it occurs in.

    Raises:
        CudaError: a kernel cannot be compiled or launched; the error says what to do.
    """
    with torch.no_grad():
        return [check for row in WEIGHT_TYPES.values() for check in _run(torch.device(device), row)]


def _run(device: torch.device, row: WeightType) -> list[Check]:
    planes = random_planes(row)
    weight = accuracy.of_planes(planes, row)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(max(m for m, _ in PRODUCTS), K, generator=generator).bfloat16()
    rows = torch.randint(N, (7,), generator=generator)
    tiles = torch.empty(0)

    def pack() -> str:
        nonlocal tiles
        tiles = torch.ops.q6k.pack([plane.to(device) for plane in planes], row.name)
        return f"{tuple(tiles.shape)}"

    def dequantize() -> str:
        found = torch.ops.q6k.dequantize(tiles, N, K, row.name, torch.bfloat16)
        return _same(found, accuracy.dequantize(weight, torch.bfloat16))

    def embedding() -> str:
        found = torch.ops.q6k.embedding(rows.to(device), tiles, N, K, row.name, torch.bfloat16)
        return _same(found, accuracy.embedding(rows, weight, torch.bfloat16))

    def product(m: int, activations: Literal["int8", "bf16"]) -> str:
        y = torch.ops.q6k.linear(x[:m].to(device), tiles, None, N, row.name, activations)
        rounded = activations == "bf16" and dispatch.rounds_scales(x[:m].to(device))
        exact = accuracy.linear(x[:m], weight, activations=activations, scales_rounded=rounded)
        roundings = exact.terms + dispatch.INT8_ROUNDINGS if activations == "int8" else None
        found = accuracy.compare(y.cpu(), exact, roundings)
        if found.first is not None:
            (token, column), value, expected, _ = found.first
            raise ArithmeticError(f"y[{token}, {column}] is {value}, expected {expected:.6g}")
        return f"{found.worst:.2g} of the tolerance"

    checks = [_check(f"pack, {row.name}", pack)]
    if checks[0].passed:
        checks += [_check(f"{step.__name__}, {row.name}", step) for step in (dequantize, embedding)]
        for m, activations in PRODUCTS:
            name = f"linear, {row.name}, M={m}, {activations} activations"
            checks.append(_check(name, partial(product, m, activations)))
    return checks


def random_planes(row: WeightType) -> list[Tensor]:
    """Return the planes of a random weight (N, K): all codes, scales of both signs and zero.

    Scales that are exponents are moderate, so that no product overflows in fp32.
    """
    generator = torch.Generator().manual_seed(SEED)
    # float16 steps are subnormal, as they are in real files.
    drawn = {
        "U8": (0, 256, 1.0),
        "I8": (-128, 128, 1.0),
        "BF16": (-128, 128, 2.0**-14),
        "F16": (-1000, 1000, 2.0**-24),
    }
    planes = []
    for array in row.arrays:
        exponent = array.dtype == "U8" and not row.stepped and array in row.scales
        six_bits = array.dtype == "U8" and row.stepped and array in row.scales
        low, high, unit = (100, 140, 1.0) if exponent else (0, 64, 1.0) if six_bits else drawn[array.dtype]
        values = torch.randint(low, high, (N, K // array.weights), generator=generator) * unit
        planes.append(values.to(PLANE_DTYPES[array.dtype]))
    return planes


def _same(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ArithmeticError(
            f"expected {expected.dtype} {tuple(expected.shape)}, found {found.dtype} {tuple(found.shape)}"
        )
    different = (found.cpu() != expected).nonzero()
    if len(different):
        at = tuple(different[0].tolist())
        raise ArithmeticError(f"element {at} is {float(found[at])}, expected {float(expected[at])}")
    return "to the bit"


def _check(name: str, step: Callable[[], str]) -> Check:
    try:
        return Check(name, True, step())
    except CudaError:
        raise
    except Exception as error:  # any error is a result of the check
        return Check(name, False, f"{type(error).__name__}: {error}")
