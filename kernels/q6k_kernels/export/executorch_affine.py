"""Weights with scales and mins as the arguments of ExecuTorch's int4 and int5 classes.

    weight = scale * (code - zero)

Codes, scales and their steps are the bundle's own; a zero is min / scale, which ExecuTorch stores as an 8-bit code
times a step of its super-block. Few mins have such a form exactly, so the zeros are encoded, and `decibels` says
what that costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q6k_kernels.weights.weight import PackedWeight

CLASSES = {
    4: "executorch.backends.cuda.coalesced_int4_tensor.CudaCoalescedInt4Tensor",
    5: "executorch.backends.cuda.dp4a_planar_int5_tensor.CudaDp4aPlanarInt5Tensor",
}
"""Bits of a code -> ExecuTorch's class."""
ROWS_AT_ONCE = 1024
CODE_MOST = 255


@dataclass(frozen=True)
class AffineArguments:
    """The arguments of one of ExecuTorch's classes, and what they lost.

    Attributes:
        by_name: the arguments, by the names of the constructor's parameters.
        decibels: ratio of the weights' squares to those of their errors; infinite if nothing is lost.
    """

    by_name: dict[str, Any]
    decibels: float


def fits(weight: PackedWeight) -> bool:
    """Check whether a class has the weight's codes and scales: a matrix with mins and steps, of 4 or 5 bits."""
    row = weight.row
    return len(weight.shape) == 2 and row.minimum and row.stepped and row.bits in CLASSES


def affine_arguments(weight: PackedWeight) -> AffineArguments:
    """Return the arguments for a weight that fits (see `fits`)."""
    row = weight.row
    planes = dict(zip(row.roles, weight.planes(), strict=True))
    per_step = planes["scale"].shape[1] // planes["steps"].shape[1]
    scale, least = (
        planes[role].double() * planes[steps].double().repeat_interleave(per_step, dim=1)
        for role, steps in (("scale", "steps"), ("min", "min_steps"))
    )
    zero, zero_step = _encoded(torch.where(scale == 0, 0, least / scale), per_step)
    # The code takes no part in the error: scale * (code - zero) - (scale * code - min).
    errors = scale * zero * zero_step.double().repeat_interleave(per_step, dim=1) - least
    noise = row.group * float(errors.square().sum())
    starts = range(0, weight.n, ROWS_AT_ONCE)
    pieces = (weight.rows(at, min(at + ROWS_AT_ONCE, weight.n)) for at in starts)
    signal = sum(float(piece.dequantize(torch.float32).double().square().sum()) for piece in pieces)
    codes = {"qdata": planes["ql"]} if row.bits == 4 else {"ql": planes["ql"], "qh": planes["qh"]}
    scales = {"scale": planes["scale"], "scale_step": planes["steps"]}
    scales |= {"zero_point": zero, "zero_point_step": zero_step}
    named = {**codes, **scales, "block_size": [1, row.group], "shape": torch.Size(weight.shape)}
    return AffineArguments(named, _decibels(signal, noise))


def _encoded(values: Tensor, per_step: int) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 like `values`, and fp16 steps, one for `per_step` values.

    All values of a step have the same sign, which the step carries.
    """
    blocks = values.view(len(values), -1, per_step)
    largest = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))
    most = torch.finfo(torch.float16).max
    steps = (largest / CODE_MOST).clamp(-most, most).half()
    wide = steps.double()
    codes = torch.where(wide == 0, 0, blocks / wide).round().clamp(0, CODE_MOST)
    return codes.to(torch.uint8).flatten(1), steps.squeeze(2)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
