"""The launch of a gated delta net on a GPU, `cuda/delta.cuh`; `delta` specifies what it computes."""

from __future__ import annotations

import struct

from torch import Tensor

from q6k_kernels.cuda.device import Variant
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.jit.compiler import Defines

DELTA_FILE, DELTA = "delta.cuh", "q6k_delta"
STATE_DIM, CONVOLVED, THREADS = 128, 4, 512
"""Size of keys and values, tokens of the convolution and threads of a block, as in the kernel."""
_DELTA = struct.Struct("@PPPPPPPPPPPPPPfii")


def unsupported(heads: DeltaHeads) -> str:
    """Return why the kernel does not support a layer's sizes; "" if it does."""
    if (heads.key_dim, heads.value_dim) != (STATE_DIM, STATE_DIM):
        return f"delta nets with heads of {heads.key_dim} and {heads.value_dim}: expected {STATE_DIM}"
    if heads.convolution.shape[1] != CONVOLVED:
        return f"a convolution over {heads.convolution.shape[1]} tokens: expected {CONVOLVED}"
    return ""


def variant(macros: Defines) -> Variant:
    """Return the kernel for the macros of a step: the dtype, and one token."""
    return DELTA_FILE, DELTA, macros


def arguments(
    mixed: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    heads: DeltaHeads,
    states: tuple[Tensor, Tensor],
    counters: Tensor,
    outputs: tuple[int, int, int],
) -> bytes:
    """Return the kernel's arguments.

    Args:
        mixed: see `delta.delta_net`, as are the next ones.
        z: gates.
        b: rates.
        a: decays.
        heads: the heads of the layer.
        states: its states.
        counters: int32, 0, one or more for each key head.
        outputs: addresses of the 16-bit values, codes and scales; 0 for what is absent.
    """
    return _DELTA.pack(
        *(tensor.data_ptr() for tensor in (mixed, z, b, a, *states)),
        *(tensor.data_ptr() for tensor in (heads.convolution, heads.decays, heads.biases, heads.norm, counters)),
        *outputs,
        heads.epsilon,
        heads.key_heads,
        int(heads.tiled),
    )
