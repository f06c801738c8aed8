"""The launches of a mixture of experts on a GPU: routes, `cuda/mixture.cuh`, and products with experts.

`mixture` specifies what they compute. The outputs of experts are added up by the residual sum after them.
"""

from __future__ import annotations

import struct
from collections.abc import Container

import torch
from torch import Tensor

from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda import experts_decode
from q6k_kernels.cuda.device import Device, Launch, Variant, pointer
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate import norm_cuda
from q6k_kernels.generate.mixture import Mixture
from q6k_kernels.jit.compiler import Defines
from q6k_kernels.weights.experts import PackedExperts, PackedStack

ROUTE_FILE, ROUTE = "mixture.cuh", "q6k_route"
ROUTE_WARPS, MOST_EXPERTS, MOST_TOP = 4, 512, 32
"""Warps of a block, the most experts and the most that are chosen, as in the kernel."""
_ROUTE = struct.Struct("@PPPPPPPPiiii")


def unsupported(mixture: Mixture, activations: Container[str]) -> str:
    """Return why the kernels do not support a mixture; "" if they do.

    Args:
        mixture: the mixture.
        activations: names of the activation functions that they have.
    """
    if mixture.count > MOST_EXPERTS or mixture.top > MOST_TOP:
        most = f"expected up to {MOST_EXPERTS} and {MOST_TOP}"
        return f"{mixture.count} experts of which {mixture.top} are chosen: {most}"
    if (size := mixture.router.shape[1]) > norm_cuda.MOST_MIXED:
        return f"experts of {size} values: expected up to {norm_cuda.MOST_MIXED}"
    experts = mixture.experts
    if not isinstance(experts, PackedExperts):
        return "experts that are not packed"
    if experts.activation not in activations or experts.between % 16:
        return f"experts with {experts.activation} of {experts.between} values: expected a multiple of 16"
    return ""


def route(launch: Launch, macros: Defines, x: Tensor, mixture: Mixture, counter: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the choice of a token's experts, see `mixture.route`: int32 and float32.

    Args:
        launch: launches a kernel.
        macros: those of the dtype.
        x: what the router sees, (1, K).
        mixture: the mixture.
        counter: int32, 0.
    """
    rows, top = len(mixture.router), mixture.top
    logits = torch.empty(rows, device=x.device)
    factors = torch.empty(1, top + rows - mixture.count, device=x.device)
    chosen = torch.empty(1, top, dtype=torch.int32, device=x.device)
    given = (x, mixture.router, mixture.bias, mixture.scales, logits, counter, chosen, factors)
    launch(
        (ROUTE_FILE, ROUTE, macros),
        (-(-rows // ROUTE_WARPS), 1, 1),
        32 * ROUTE_WARPS,
        _ROUTE.pack(*map(pointer, given), rows, mixture.count, top, x.shape[1]),
    )
    return chosen, factors


def takes_codes(stack: PackedStack, device: Device) -> bool:
    """Check whether products with a stack are those of `experts_decode`."""
    fits = experts_decode.fits(stack.out_features, stack.in_features, weight_type(stack.format), device)
    return stack.activations != "bf16" and fits


def products(
    stack: PackedStack, x: Tensor, chosen: Tensor, *, early: bool, gated: tuple[Tensor, int] | None = None
) -> Tensor:
    """Multiply rows with the weights of the chosen experts: (1, top, N).

    Args:
        stack: a stack of the experts.
        x: (1, K) or (top, K).
        chosen: int32 (1, top).
        early: whether `chosen` was written some launches ago, so that weights may be loaded at once.
        gated: see `experts_decode.multiply`; only where `takes_codes`.
    """
    n, row, device = stack.out_features, weight_type(stack.format), launching.device(x.device.index)
    if not takes_codes(stack, device):
        other: Tensor = stack(x if len(x) == 1 else x[None], chosen)
        return other
    y = torch.empty(1, chosen.shape[1], n, dtype=x.dtype, device=x.device)
    given = x, stack.tiles, chosen, stack.bias, n, row, y, device
    experts_decode.multiply(*given, early=early, gated=gated)
    return y


def variants(macros: Defines) -> list[Variant]:
    """Return the kernels with the macros of a dtype."""
    return [(ROUTE_FILE, ROUTE, macros)]
