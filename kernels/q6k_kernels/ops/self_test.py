"""Do the kernels compute here what the formulas say? Every operation once, on small random weights.

Codes and scales go through the operations of `ops`, and what comes out is held against fp64: `accuracy` for
products, the weights themselves, to the bit, for the rest. On a GPU that takes some seconds at first, while
kernels are compiled, and then some tenths of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from q6k_kernels.bundle.storage import Scales
from q6k_kernels.errors import CudaError
from q6k_kernels.formats import planes as planar
from q6k_kernels.formats.ggml import GROUP, SUPER_BLOCK
from q6k_kernels.ops import (
    accuracy,
    schema,  # noqa: F401  ops registers the operations
)

N, K = 275, 512
"""Of the weight: rows that end within a tile, two super-blocks."""
PRODUCTS: tuple[tuple[int, Literal["int8", "bf16"]], ...] = ((1, "int8"), (16, "bf16"), (300, "bf16"))
"""Rows of activations and how they are treated: decoding, a short prefill and a long one."""
SEED = 6


@dataclass(frozen=True)
class Check:
    """One operation on one device.

    Attributes:
        name: the operation, with what scales and sizes.
        passed: whether it was right.
        detail: how right, or what went wrong.
    """

    name: str
    passed: bool
    detail: str


def run(device: torch.device | str) -> list[Check]:
    """Runs all checks on a device: `cpu` or a GPU. Other errors of an operation are its check's result.

    Raises:
        CudaError: a kernel cannot be compiled or launched, and the error says what to do about it.
    """
    with torch.no_grad():
        return [check for scales in ("bf16", "exact") for check in _run(torch.device(device), scales)]


def _run(device: torch.device, scales: Scales) -> list[Check]:
    planes = random_planes(scales)
    q = planar.unpack(planes[0].numpy(), planes[1].numpy()).astype(np.float64)
    s: npt.NDArray[np.float64] = planes[2].double().numpy()
    if planes[3] is not None:
        s = s * np.repeat(planes[3].double().numpy(), SUPER_BLOCK // GROUP, axis=1)
    weights = torch.from_numpy((q * np.repeat(s, GROUP, axis=1)).astype(np.float32)).bfloat16()
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(max(m for m, _ in PRODUCTS), K, generator=generator).bfloat16()
    rows = torch.randint(N, (7,), generator=generator)
    tiles = torch.empty(0)

    def pack() -> str:
        nonlocal tiles
        tiles = torch.ops.q6k.pack(*(None if plane is None else plane.to(device) for plane in planes))
        return f"{tuple(tiles.shape)}"

    def dequantize() -> str:
        return _same(torch.ops.q6k.dequantize(tiles, N, torch.bfloat16), weights)

    def embedding() -> str:
        return _same(torch.ops.q6k.embedding(rows.to(device), tiles, N, torch.bfloat16), weights[rows])

    def product(m: int, activations: Literal["int8", "bf16"]) -> str:
        y = torch.ops.q6k.linear(x[:m].to(device), tiles, None, N, activations)
        exact, magnitude = accuracy.linear_fp64(x[:m], *planes, activations=activations)
        errors = accuracy.error_in_tolerances(y, exact, accuracy.tolerance(exact, magnitude, K, y.dtype))
        if (errors > 1).any():
            row, column = map(int, np.argwhere(errors > 1)[0])
            raise ArithmeticError(
                f"y[{row}, {column}] is {float(y[row, column])}, expected {exact[row, column]:.6g}"
            )
        return f"{errors.max():.2g} of the tolerance"

    checks = [_check(f"pack, {scales} scales", pack)]
    if checks[0].passed:
        checks += [_check(f"{step.__name__}, {scales} scales", step) for step in (dequantize, embedding)]
        for m, activations in PRODUCTS:
            name = f"linear, {scales} scales, M={m}, {activations} activations"
            checks.append(_check(name, partial(product, m, activations)))
    return checks


def random_planes(scales: Scales) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """ql, qh, scale and steps of a random weight (N, K): all codes, scales of both signs and zero."""
    generator = torch.Generator().manual_seed(SEED)

    def integers(low: int, high: int, columns: int) -> Tensor:
        return torch.randint(low, high, (N, columns), generator=generator)

    ql, qh = integers(0, 256, K // 2).to(torch.uint8), integers(0, 256, K // 4).to(torch.uint8)
    scale = integers(-128, 128, K // GROUP)
    if scales == "bf16":
        return ql, qh, (scale * 2.0**-14).bfloat16(), None
    # Subnormal, as they are in real files.
    return ql, qh, scale.to(torch.int8), (integers(-1000, 1000, K // SUPER_BLOCK) * 2.0**-24).half()


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
    except Exception as error:  # whatever it is, it is the result
        return Check(name, False, f"{type(error).__name__}: {error}")
