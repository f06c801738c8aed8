"""The launches of a mixture of experts for a prompt's chunk on a GPU, around the products with experts.

`mixture` specifies what they compute. Pairs of a token and an expert are sorted once for all products of a layer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda import experts_dispatch, experts_gemm
from q6k_kernels.cuda.device import Launch, Variant, pointer
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate.mixture import Mixed, Mixture
from q6k_kernels.jit.compiler import Defines
from q6k_kernels.weights.experts import PackedExperts, PackedStack

ROUTE_FILE, ROUTE, ROUTE_WARPS = "mixture.cuh", "q6k_route_rows", 4
SUM_FILE, SUM, SUM_THREADS = "chunk.cuh", "q6k_sum_experts_rows", 128
_ROUTE, _SUM = struct.Struct("@PPPPiiii"), struct.Struct("@PPPPiii")

Gate = Callable[[Tensor, Tensor], Tensor]
"""Computes the activation function of the first times the second, both (rows, K)."""


def route(launch: Launch, macros: Defines, x: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Launch the choice of tokens' experts, see `mixture.route`: int32 and float32.

    Args:
        launch: launches a kernel.
        macros: those of the dtype.
        x: what the router sees, (M, K).
        mixture: the mixture.
    """
    logits = linear(x, mixture.router, mixture.bias).float()
    (tokens, rows), top = logits.shape, mixture.top
    chosen = torch.empty(tokens, top, dtype=torch.int32, device=x.device)
    factors = torch.empty(tokens, top + rows - mixture.count, dtype=torch.float32, device=x.device)
    pointers = map(pointer, (logits, mixture.scales, chosen, factors))
    given = _ROUTE.pack(*pointers, tokens, rows, mixture.count, top)
    launch((ROUTE_FILE, ROUTE, macros), (-(-tokens // ROUTE_WARPS), 1, 1), 32 * ROUTE_WARPS, given)
    return chosen, factors


def outputs(x: Tensor, experts: PackedExperts, chosen: Tensor, gate: Gate) -> Tensor:
    """Return the outputs of the chosen experts, (M, top, K).

    Args:
        x: what they see, (M, K).
        experts: the experts.
        chosen: those of each token, int32 (M, top).
        gate: computes their gates.
    """
    device, tokens = launching.device(x.device.index), len(x)
    stacks = [each for each in (*experts.gate_up, experts.down) if isinstance(each, PackedStack)]
    together = tokens > experts_dispatch.EXPERTS_DECODE_M and all(each.activations != "int8" for each in stacks)
    placed = experts_gemm.sort(chosen, experts.down.count, device) if together else None

    def product(stack: PackedStack, rows: Tensor) -> Tensor:
        if placed is None:
            few: Tensor = stack(rows if len(rows) == tokens else rows.view(tokens, -1, rows.shape[1]), chosen)
            return few
        n, bias = stack.out_features, None if stack.bias is None else stack.bias.contiguous()
        y = torch.empty(*chosen.shape, n, dtype=x.dtype, device=x.device)
        given = rows, stack.tiles, chosen, bias, n, weight_type(stack.format), y, device
        experts_gemm.multiply(*given, placed=placed)
        return y

    both = [product(stack, x).flatten(0, 1) for stack in stacks[:-1]]
    gates, ups = both if len(both) == 2 else torch.split(both[0], experts.between, -1)
    return product(stacks[-1], gate(gates, ups))


def added(launch: Launch, macros: Defines, mixed: Mixed) -> Tensor:
    """Launch the sum of experts' outputs, (M, K), and without norms of what is beside them."""
    tokens, top, k = mixed.rows.shape
    x = torch.empty(tokens, k, dtype=mixed.rows.dtype, device=mixed.rows.device)
    beside = mixed.beside if mixed.norms is None else None
    pointers = map(pointer, (mixed.rows, mixed.factors, beside, x))
    given = _SUM.pack(*pointers, top, k, int(mixed.gated))
    launch((SUM_FILE, SUM, macros), (tokens, -(-k // (8 * SUM_THREADS)), 1), SUM_THREADS, given)
    return x


def variants(macros: Defines) -> list[Variant]:
    """Return the kernels with the macros of a dtype."""
    return [(ROUTE_FILE, ROUTE, macros), (SUM_FILE, SUM, macros)]
