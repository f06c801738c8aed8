"""Products with a choice of weights for each row, as a mixture of experts needs them: a torch op.

    q6k::experts(Tensor x, Tensor tiles, Tensor experts, Tensor? bias, SymInt n, str format, str activations)
        -> Tensor

    y[i, j] = x[i] or x[i, j], times the transposed weight of experts[i, j], plus its bias

`tiles` is a packed stack (E, N, K), see `formats.tiles`. Nothing waits for the GPU, so the op can be captured in a
CUDA graph, and no weight is expanded or copied. Formulas, dtypes and tolerances are those of `q6k::linear`.

The C++ library (`ops.library`) has no such op: it serves exported programs, and models with experts are not
exported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from q6k_kernels.formats.checks import FLOATS, Activations, check_activations, either, found
from q6k_kernels.formats.tiles import check_tiles, codes_and_scales
from q6k_kernels.formats.types import weight_type
from q6k_kernels.ops import reference
from q6k_kernels.ops.schema import HALVES

_Library: Any = torch.library.Library  # torch leaves its methods without types
_LIBRARY = _Library("q6k", "FRAGMENT")


def _check(
    x: Tensor,
    tiles: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    n: int,
    format: str,
    activations: str,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Check the arguments; nothing here reads what tensors hold."""
    if experts.ndim != 2 or experts.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"experts: expected int64 or int32 (M, top), found {found(experts)}")
    m, top = experts.shape
    k = x.shape[-1] if x.ndim else 0
    if x.ndim not in (2, 3) or x.dtype not in dtypes or x.shape[:-1] != experts.shape[: x.ndim - 1]:
        raise ValueError(f"x: expected {either(dtypes)} ({m}, K) or ({m}, {top}, K), found {found(x)}")
    if tiles.ndim != 4:
        raise ValueError(f"tiles: expected those of a stack, uint8 (E, T, B, tile_bytes), found {found(tiles)}")
    check_tiles(tiles, n, k, weight_type(format), stack=True)
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (len(tiles), n)):
        raise ValueError(f"bias: expected {either(FLOATS)} ({len(tiles)}, {n}), found {found(bias)}")
    check_activations(activations)
    others = (("tiles", tiles), ("experts", experts), *((("bias", bias),) if bias is not None else ()))
    for name, tensor in others:
        if tensor.device != x.device:
            raise ValueError(
                f"expected all tensors on one device, found x on {x.device}, {name} on {tensor.device}"
            )
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        name = "x" if x.requires_grad else "bias"
        raise ValueError(
            f"{name} requires a gradient, and q6k::experts has none: call it under torch.inference_mode() or "
            f"torch.no_grad(), or pass {name}.detach()"
        )


def _experts_cpu(
    x: Tensor, tiles: Tensor, experts: Tensor, bias: Tensor | None, n: int, format: str, activations: str
) -> Tensor:
    _check(x, tiles, experts, bias, n, format, activations)
    row, k, top = weight_type(format), x.shape[-1], experts.shape[1]
    chosen = experts.reshape(-1)
    outside = (chosen < 0) | (chosen >= len(tiles))
    if outside.any():
        at = divmod(int(outside.nonzero()[0, 0]), top)
        raise IndexError(f"experts: expected 0 to {len(tiles) - 1}, found {int(experts[at])} at {at}")
    rows_of_x = x.reshape(-1, k)
    y = torch.empty(len(chosen), n, dtype=x.dtype)
    for expert in sorted(set(chosen.tolist())):
        pairs = (chosen == expert).nonzero()[:, 0]
        rows = rows_of_x[pairs if x.ndim == 3 else pairs // top]

        def parts(part: slice, of_expert: Tensor = tiles[expert]) -> reference.Parts:
            return codes_and_scales(of_expert, part, k, row)

        own_bias = None if bias is None else bias[expert]
        y[pairs] = reference.multiply(rows, parts, n, k, own_bias, cast("Activations", activations))
    return y.view(*experts.shape, n)


@cache
def _kernels() -> ModuleType:
    from q6k_kernels.cuda import experts_dispatch

    return experts_dispatch


def _experts_cuda(
    x: Tensor, tiles: Tensor, experts: Tensor, bias: Tensor | None, n: int, format: str, activations: str
) -> Tensor:
    _check(x, tiles, experts, bias, n, format, activations, HALVES)
    y: Tensor = _kernels().experts(x, tiles, experts, bias, n, weight_type(format), activations)
    return y


def _experts_fake(
    x: Tensor, tiles: Tensor, experts: Tensor, bias: Tensor | None, n: int, format: str, activations: str
) -> Tensor:
    dtypes = HALVES if x.device.type == "cuda" else FLOATS
    _check(x, tiles, experts, bias, n, format, activations, dtypes)
    return x.new_empty((*experts.shape, n))


_LIBRARY.define(
    "experts(Tensor x, Tensor tiles, Tensor experts, Tensor? bias, SymInt n, str format, str activations) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("experts", _experts_cpu, "CPU")
_LIBRARY.impl("experts", _experts_cuda, "CUDA")
torch.library.register_fake("q6k::experts", _experts_fake, lib=_LIBRARY)

experts: Callable[[Tensor, Tensor, Tensor, Tensor | None, int, str, str], Tensor] = torch.ops.q6k.experts.default
