"""Launches of residual sums and their norms on a GPU, `cuda/step.cuh`; `step_reference` specifies the results."""

from __future__ import annotations

import struct
from functools import cache

from torch import Tensor

from q6k_kernels.cuda.device import Variant, pointer
from q6k_kernels.generate.heads import Norm
from q6k_kernels.generate.mixture import Mixed
from q6k_kernels.jit.compiler import Defines

FILE, ADD_NORM, ADD_NORMS, ADD_MIXTURE = "step.cuh", "q6k_add_norm", "q6k_add_norms", "q6k_add_mixture"
THREADS, GROUPS = 256, (1, 2, 3)
MOST_K = 16 * THREADS * GROUPS[-1]
MOST_MIXED = 8192
"""The most values of a row with further norms, or with the sum of a mixture."""
CENTRED = (ADD_NORM,)
"""Kernels whose norms may be centred: no architecture that centres its norms has a mixture of experts."""
_COMMON = "@PPPPPPPPfffi"
_ADD_NORM, _ADD_NORMS, _ADD_MIXTURE = (struct.Struct(_COMMON + more) for more in ("i", "PPPP", "PPPPii"))


def kernel_and_arguments(
    hidden: Tensor,
    delta: Tensor | Mixed | None,
    after: Norm | None,
    norm: Norm | None,
    total: Tensor,
    outputs: tuple[int, int, int],
    factor: float,
    scale: float,
    further: tuple[tuple[Norm, Tensor], ...],
) -> tuple[str, bool, bytes]:
    """Return the kernel of a residual sum, whether its norms are centred, and its arguments.

    Args:
        hidden: see `step_reference`.
        delta: as above.
        after: as above.
        norm: as above.
        total: where the sum goes; unless it is `hidden`.
        outputs: pointers to the norm's 16-bit values, codes and scales, or 0.
        factor: see `step_reference`.
        scale: as above.
        further: two further norms and where they go, or none.
    """
    norms = [each for each in (norm, after, *_norms(delta), *(each for each, _ in further)) if each is not None]
    given = (
        hidden.data_ptr(),
        pointer(delta.rows if isinstance(delta, Mixed) else delta),
        _weight(after),
        _weight(norm),
        0 if delta is None else total.data_ptr(),
        *outputs,
        factor,
        1.0 if delta is None else scale,
        norms[0].epsilon if norms else 0.0,  # which all norms of a model share
        hidden.shape[-1],
    )
    centred = any(each.centred for each in norms)
    if isinstance(delta, Mixed):
        assert not further  # noqa: S101 -- as `step_reference` says
        return (
            ADD_MIXTURE,
            centred,
            _ADD_MIXTURE.pack(
                *given,
                delta.factors.data_ptr(),
                pointer(delta.beside),
                *map(_weight, _norms(delta)),
                delta.rows.shape[1],
                int(delta.gated),
            ),
        )
    if further:
        pointers = [each.data_ptr() for norm, out in further for each in (norm.weight, out)]
        return ADD_NORMS, centred, _ADD_NORMS.pack(*given, *pointers)
    return ADD_NORM, centred, _ADD_NORM.pack(*given, len(hidden))


def _norms(delta: Tensor | Mixed | None) -> tuple[Norm | None, Norm | None]:
    """Return the norms of a mixture's experts and of what is beside them."""
    norms = delta.norms if isinstance(delta, Mixed) else None
    return (None, None) if norms is None else (norms.after_experts, norms.after_beside)


def _weight(norm: Norm | None) -> int:
    return 0 if norm is None else norm.weight.data_ptr()


@cache
def variant(kernel: str, macros: Defines, k: int, centred: bool) -> Variant:
    """Return the variant of a kernel for rows of k values and for norms that are centred or not, see `CENTRED`."""
    groups = next(count for count in GROUPS if k <= 16 * THREADS * count)
    return FILE, kernel, (*macros, ("Q6K_NORM_GROUPS", groups), ("Q6K_CENTRED", int(centred)))


def variants(macros: Defines) -> list[Variant]:
    """Return the kernels with the macros of a step."""
    sizes = [16 * THREADS * groups for groups in GROUPS]
    rows = [(ADD_NORM, k) for k in sizes]
    rows += [(kernel, k) for kernel in (ADD_NORMS, ADD_MIXTURE) for k in sizes if k <= MOST_MIXED]
    return [
        variant(kernel, macros, k, centred)
        for kernel, k in rows
        for centred in ((False, True) if kernel in CENTRED else (False,))
    ]
