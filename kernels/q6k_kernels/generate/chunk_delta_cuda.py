"""The launches of a gated delta net for a prompt's chunk, `cuda/chunk_delta.cuh`; `delta` specifies the result."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from q6k_kernels.cuda.device import Launch, Variant
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.jit.compiler import Defines

FILE, INPUTS, TOKENS, OUTPUTS = "chunk_delta.cuh", "q6k_delta_inputs", "q6k_delta_tokens", "q6k_delta_outputs"
WARPS, RUN, COLUMNS, COLUMN_THREADS = 8, 8, 32, 128
"""Warps of a block, tokens of a warp, columns of a state in a block and its threads, as in the kernels."""
_INPUTS, _TOKENS = struct.Struct("@PPPqqqPPPPPPPPiii"), struct.Struct("@PPPPPPii")
_OUTPUTS = struct.Struct("@PPqPPfiii")


def computed(
    launch: Launch,
    macros: Defines,
    projected: tuple[Tensor, Tensor, Tensor, Tensor],
    heads: DeltaHeads,
    states: tuple[Tensor, Tensor],
) -> Tensor:
    """Launch a gated delta net of a chunk: (M, value heads * value_dim).

    Args:
        launch: launches a kernel.
        macros: those of the dtype.
        projected: mixed, z, b and a, see `delta.delta_net`.
        heads: the heads, of sizes that `delta_cuda` supports.
        states: the layer's states, which are updated.
    """
    mixed, z, b, a = projected
    inputs, matrices = states
    tokens, (keys, values, dim) = len(mixed), (heads.key_heads, heads.value_heads, heads.key_dim)
    dtype, device = mixed.dtype, mixed.device
    both = torch.empty(2, keys, tokens, dim, dtype=torch.float32, device=device)
    v = torch.empty(values, tokens, dim, dtype=dtype, device=device)
    gates = torch.empty(values, tokens, 4, dtype=torch.float32, device=device)
    out, x = (torch.empty(tokens, values * dim, dtype=dtype, device=device) for _ in range(2))
    made = [each.data_ptr() for each in (both[0], both[1], v, gates)]
    launch(
        (FILE, INPUTS, macros),
        (-(-tokens // RUN), -(-(keys + values) // WARPS), 1),
        32 * WARPS,
        _INPUTS.pack(
            *(each.data_ptr() for each in (mixed, b, a)),
            *(each.stride(0) for each in (mixed, b, a)),
            *(each.data_ptr() for each in (inputs, heads.convolution, heads.decays, heads.biases)),
            *(*made, tokens, keys, values),
        ),
    )
    size = inputs.shape[-1]
    kept = mixed[-size:].T if tokens >= size else torch.cat([inputs[0, :, tokens:], mixed.T], 1)
    inputs[0].copy_(kept)
    launch(
        (FILE, TOKENS, macros),
        (values, dim // COLUMNS, 1),
        COLUMN_THREADS,
        _TOKENS.pack(*made, matrices.data_ptr(), out.data_ptr(), tokens, keys),
    )
    launch(
        (FILE, OUTPUTS, macros),
        (tokens, -(-values // WARPS), 1),
        32 * WARPS,
        _OUTPUTS.pack(
            *(out.data_ptr(), z.data_ptr(), z.stride(0), heads.norm.data_ptr(), x.data_ptr()),
            *(heads.epsilon, values, keys, int(heads.tiled)),
        ),
    )
    return x


def variants(macros: Defines) -> list[Variant]:
    """Return the kernels with the macros of a dtype."""
    return [(FILE, kernel, macros) for kernel in (INPUTS, TOKENS, OUTPUTS)]
