"""The launches of a mixture of experts on a GPU, `cuda/mixture.cuh`, around the products with experts.

`mixture` specifies what they compute.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor, nn

from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda import experts_decode
from q6k_kernels.cuda.device import Variant
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate.mixture import Mixture
from q6k_kernels.weights.experts import PackedExperts, PackedStack

MIXTURE_FILE, ROUTE, GATE, ADD = "mixture.cuh", "q6k_route", "q6k_gate_experts", "q6k_add_experts"
ROUTE_WARPS, SPREAD_THREADS, MOST_EXPERTS, MOST_TOP = 4, 128, 512, 32
"""Warps and threads of blocks, the most experts and the most that are chosen, as in the kernels."""
_ROUTE, _GATE, _ADD = struct.Struct("@PPPPPPiiii"), struct.Struct("@PPPii"), struct.Struct("@PPPPii")

Launch = Callable[[Variant, tuple[int, int, int], int, bytes], None]
"""Launches a kernel: variant, grid, threads, arguments."""


def unsupported(mixture: Mixture) -> str:
    """Return why the kernels do not support a mixture; "" if they do."""
    if mixture.count > MOST_EXPERTS or mixture.top > MOST_TOP:
        most = f"expected up to {MOST_EXPERTS} and {MOST_TOP}"
        return f"{mixture.count} experts of which {mixture.top} are chosen: {most}"
    experts = mixture.experts
    if not isinstance(experts, PackedExperts):
        return "experts that are not packed"
    if experts.activation != "silu" or experts.between % 8:
        return f"experts with {experts.activation} and {experts.between} values: expected silu and a multiple of 8"
    return ""


def mixed(
    launch: Launch,
    macros: tuple[tuple[str, int], ...],
    x: Tensor,
    mixture: Mixture,
    shared: Tensor | None,
    counter: Tensor,
) -> Tensor:
    """Launch a mixture for one token, see `mixture.mixed`.

    Args:
        launch: launches a kernel.
        macros: those of the dtype.
        x: the input, (1, K).
        mixture: the mixture.
        shared: the output of the shared expert, (1, K), or None.
        counter: int32, 0.
    """
    experts, top, k = mixture.experts, mixture.top, x.shape[1]
    assert isinstance(experts, PackedExperts)  # noqa: S101 -- as `unsupported` has checked
    rows = len(mixture.router)
    logits = torch.empty(rows, device=x.device)
    factors = torch.empty(top + 1, device=x.device)
    chosen = torch.empty(1, top, dtype=torch.int32, device=x.device)
    pointers = (tensor.data_ptr() for tensor in (x, mixture.router, logits, counter, chosen, factors))
    launch(
        (MIXTURE_FILE, ROUTE, macros),
        (-(-rows // ROUTE_WARPS), 1, 1),
        32 * ROUTE_WARPS,
        _ROUTE.pack(*pointers, rows, mixture.count, top, k),
    )
    both, between = [products(stack, x, chosen, early=False)[0] for stack in experts.gate_up], experts.between
    gate, up = both if len(both) == 2 else both[0].chunk(2, -1)
    gated = torch.empty(1, top, between, dtype=x.dtype, device=x.device)
    launch(
        (MIXTURE_FILE, GATE, macros),
        (-(-between // (8 * SPREAD_THREADS)), top, 1),
        SPREAD_THREADS,
        _GATE.pack(gate.data_ptr(), up.data_ptr(), gated.data_ptr(), gate.stride(0), between),
    )
    outputs = products(experts.down, gated, chosen, early=True)
    total = torch.empty_like(x)
    pointers = (0 if each is None else each.data_ptr() for each in (outputs, factors, shared, total))
    launch(
        (MIXTURE_FILE, ADD, macros),
        (-(-k // (8 * SPREAD_THREADS)), 1, 1),
        SPREAD_THREADS,
        _ADD.pack(*pointers, top, k),
    )
    return total


def products(stack: nn.Module, x: Tensor, chosen: Tensor, *, early: bool) -> Tensor:
    """Multiply rows with the weights of the chosen experts: (1, top, N).

    Args:
        stack: a stack of the experts.
        x: (1, K) or (1, top, K), contiguous.
        chosen: int32 (1, top).
        early: whether `chosen` was written some launches ago, so that weights may be loaded at once.
    """
    assert isinstance(stack, PackedStack)  # noqa: S101 -- as those of all packed experts
    n, k, row = stack.out_features, stack.in_features, weight_type(stack.format)
    device = launching.device(x.device.index)
    if stack.activations == "bf16" or stack.bias is not None or not experts_decode.fits(n, k, row, device):
        other: Tensor = stack(x, chosen)
        return other
    y = torch.empty(1, chosen.shape[1], n, dtype=x.dtype, device=x.device)
    experts_decode.multiply(x.view(-1, k), stack.tiles, chosen, None, n, row, y, device, early=early)
    return y


def variants(macros: tuple[tuple[str, int], ...]) -> list[Variant]:
    """Return the kernels with the macros of a dtype."""
    return [(MIXTURE_FILE, kernel, macros) for kernel in (ROUTE, GATE, ADD)]
