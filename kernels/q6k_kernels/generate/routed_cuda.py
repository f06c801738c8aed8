"""The launches of a mixture of experts on a GPU besides its products; `step_reference` specifies their results."""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor, nn

from q6k_kernels.cuda.device import Variant
from q6k_kernels.weights.experts import PackedExperts

ROUTE_FILE, ROUTE = "choose.cuh", "q6k_choose_experts"
COMBINE_FILE, COMBINE, COMBINE_THREADS = "step.cuh", "q6k_combine", 128
MOST_EXPERTS, MOST_CHOSEN = 512, 32
"""The most experts of a layer, and of a token; as in `cuda/choose.cuh`."""
_ROUTE, _COMBINE = struct.Struct("@PPPPii"), struct.Struct("@PPPii")

Launch = Callable[[Variant, tuple[int, int, int], int, bytes], None]
"""Launches a variant: a grid, threads of a block, arguments."""
Macros = tuple[tuple[str, int], ...]


def unsupported(module: nn.Module, experts: int, top: int, activations: tuple[str, ...]) -> str:
    """Return why the kernels do not support a mixture; "" if they do."""
    if not isinstance(module, PackedExperts):
        return "experts that are not packed"
    if module.activation not in activations or module.between % 16:
        return f"experts with {module.activation} of {module.between} values: expected a multiple of 16"
    if experts > MOST_EXPERTS or top > MOST_CHOSEN:
        return f"{top} of {experts} experts: expected up to {MOST_CHOSEN} of {MOST_EXPERTS}"
    return ""


def variants(macros: Macros) -> list[Variant]:
    """Return the kernels for the macros of a step: the dtype, and one token."""
    return [(ROUTE_FILE, ROUTE, macros[:2]), (COMBINE_FILE, COMBINE, macros)]


def route(launch: Launch, macros: Macros, logits: Tensor, scales: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
    """Launch the choice of a token's experts: int32 and float32, (1, top)."""
    chosen = torch.empty(1, top, dtype=torch.int32, device=logits.device)
    weights = torch.empty(1, top, device=logits.device)
    addresses = (
        logits.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        chosen.data_ptr(),
        weights.data_ptr(),
    )
    launch(variants(macros)[0], (1, 1, 1), 32, _ROUTE.pack(*addresses, logits.shape[-1], top))
    return chosen, weights


def combine(launch: Launch, macros: Macros, rows: Tensor, weights: Tensor) -> Tensor:
    """Launch the sum of rows, (1, top, K), each times its weight: (1, K)."""
    _, top, k = rows.shape
    out = torch.empty(1, k, dtype=rows.dtype, device=rows.device)
    given = _COMBINE.pack(rows.data_ptr(), weights.data_ptr(), out.data_ptr(), top, k)
    launch(variants(macros)[1], (-(-k // (16 * COMBINE_THREADS)), 1, 1), COMBINE_THREADS, given)
    return out
