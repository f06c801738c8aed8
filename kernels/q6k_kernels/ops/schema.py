"""The operations as torch ops of namespace `q6k`: schemas, argument checks, CPU, CUDA and fake implementations.

    q6k::linear(Tensor x, Tensor tiles, Tensor? bias, SymInt n, str format, str activations) -> Tensor
    q6k::embedding(Tensor indices, Tensor tiles, SymInt n, SymInt k, str format, ScalarType dtype) -> Tensor
    q6k::dequantize(Tensor tiles, SymInt n, SymInt k, str format, ScalarType dtype) -> Tensor
    q6k::pack(Tensor[] planes, str format) -> Tensor
    q6k::embedding_named(Tensor indices, Tensor tiles, SymInt n, SymInt k, str format, str dtype) -> Tensor
    q6k::dequantize_named(Tensor tiles, SymInt n, SymInt k, str format, str dtype) -> Tensor

The last two are for compiled programs (see `export`): AOTInductor of torch 2.11 changes a ScalarType to another.
`format` is the name of a weight type (see `formats.types`), `tiles` what `formats.tiles` describes, of a weight
with n rows of k weights. Tiles are 256 columns wide, so k does not follow from them; that of `linear` is x's last
dimension. `weights.weight` has functions that take all of these as one object, and compare its k with x.

Importing this module registers the ops. They work under `torch.compile`, `torch.export` and in CUDA graphs. They
have no gradient: a tensor that requires one is refused while gradients are recorded.

Defined with `torch.library.Library`, as `custom_op` would add 20 microseconds to every call of a decoding step.

The same ops as a C++ library (see `ops.library`) may be loaded before or after this module. What the library has
registered stays, and what it registers later is used from then on. The functions for fake tensors are always those
of this module.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from q6k_kernels.formats.checks import (
    FLOATS,
    Activations,
    check_activations,
    check_dtype,
    check_input,
    check_planes,
    either,
)
from q6k_kernels.formats.tiles import check_tiles, codes_and_scales, tiles_shape
from q6k_kernels.formats.tiles import pack as pack_tiles
from q6k_kernels.formats.types import weight_type
from q6k_kernels.ops import reference

DEFINED = "Q6K_OPS_DEFINED"
"""Environment variable with the id of the process in which the schemas are defined. A C++ library that is loaded
later does not define them again, which some versions of torch would complain about."""
HALVES = (torch.bfloat16, torch.float16)
"""Dtypes of activations on a GPU."""

_Library: Any = torch.library.Library  # torch leaves its methods without types
_LIBRARY = _Library("q6k", "FRAGMENT")
"""Schemas and functions for fake tensors."""
_implementations: list[Any] = []
"""The registrations that `implement` made; each lasts as long as its object."""


# Checks for every backend. They run at every call, so they build no text unless they fail.


def _check_linear(
    x: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    n: int,
    format: str,
    activations: str,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> int:
    """Check the arguments of `linear` and return K."""
    k = x.shape[-1] if x.ndim else 0
    check_input(x, n, k, bias, dtypes)
    check_tiles(tiles, n, k, weight_type(format))
    check_activations(activations)
    if x.device != tiles.device or (bias is not None and bias.device != tiles.device):
        _refuse_devices(x=x, tiles=tiles, bias=bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        name = "x" if x.requires_grad else "bias"
        raise ValueError(
            f"{name} requires a gradient, and q6k::linear has none: call it under torch.inference_mode() or "
            f"torch.no_grad(), or pass {name}.detach()"
        )
    return k


def _check_embedding(indices: Tensor, tiles: Tensor, n: int, k: int, format: str, dtype: torch.dtype) -> None:
    """Check the arguments of `embedding`."""
    check_tiles(tiles, n, k, weight_type(format))
    check_dtype(dtype)
    if indices.dtype is not torch.int64 and indices.dtype is not torch.int32:
        raise ValueError(f"indices: expected int64 or int32 of any shape, found {indices.dtype}")
    if indices.device != tiles.device:
        _refuse_devices(indices=indices, tiles=tiles)


def _check_dequantize(tiles: Tensor, n: int, k: int, format: str, dtype: torch.dtype) -> None:
    """Check the arguments of `dequantize`."""
    check_tiles(tiles, n, k, weight_type(format))
    check_dtype(dtype)


def _check_pack(planes: Sequence[Tensor], format: str) -> tuple[int, ...]:
    """Check the arguments of `pack` and return the shape of the tiles."""
    row = weight_type(format)
    shape = check_planes(planes, row, stack=True)
    if any(plane.device != planes[0].device for plane in planes):
        _refuse_devices(**dict(zip(row.roles, planes, strict=True)))
    return tiles_shape(shape, row)


def _refuse_devices(**tensors: Tensor | None) -> None:
    found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
    raise ValueError(f"expected all tensors on one device, found {found}")


# On the CPU: the formulas of `reference`, fed from tiles.


def _linear_cpu(x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, format: str, activations: str) -> Tensor:
    k, row = _check_linear(x, tiles, bias, n, format, activations), weight_type(format)

    def rows(part: slice) -> reference.Parts:
        return codes_and_scales(tiles, part, k, row)

    return reference.multiply(x, rows, n, k, bias, cast("Activations", activations))


def _embedding_cpu(indices: Tensor, tiles: Tensor, n: int, k: int, format: str, dtype: torch.dtype) -> Tensor:
    _check_embedding(indices, tiles, n, k, format, dtype)
    row = weight_type(format)
    flat = indices.reshape(-1)
    outside = (flat < 0) | (flat >= n)
    if outside.any():
        at = int(outside.nonzero()[0, 0])
        raise IndexError(f"indices: expected 0 to {n - 1}, found {int(flat[at])} at position {at} of {len(flat)}")
    result = torch.empty(len(flat), k, dtype=dtype)
    for part in reference.row_blocks(len(flat), k):
        result[part] = reference.weights(*codes_and_scales(tiles, flat[part], k, row), dtype)
    return result.view(*indices.shape, k)


def _dequantize_cpu(tiles: Tensor, n: int, k: int, format: str, dtype: torch.dtype) -> Tensor:
    _check_dequantize(tiles, n, k, format, dtype)
    row = weight_type(format)
    result = torch.empty(n, k, dtype=dtype)
    for part in reference.row_blocks(n, k):
        result[part] = reference.weights(*codes_and_scales(tiles, part, k, row), dtype)
    return result


def _pack_cpu(planes: Sequence[Tensor], format: str) -> Tensor:
    _check_pack(planes, format)
    return pack_tiles(planes, weight_type(format))


# On a GPU: kernels. They are compiled at their first use, so their module is imported then.


@cache
def _kernels() -> ModuleType:
    from q6k_kernels.cuda import dispatch

    return dispatch


def _linear_cuda(x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, format: str, activations: str) -> Tensor:
    _check_linear(x, tiles, bias, n, format, activations, HALVES)
    y: Tensor = _kernels().linear(x, tiles, bias, n, weight_type(format), activations)
    return y


def _embedding_cuda(indices: Tensor, tiles: Tensor, n: int, k: int, format: str, dtype: torch.dtype) -> Tensor:
    _check_embedding(indices, tiles, n, k, format, dtype)
    rows: Tensor = _kernels().embedding(indices, tiles, n, k, weight_type(format), dtype)
    return rows


def _dequantize_cuda(tiles: Tensor, n: int, k: int, format: str, dtype: torch.dtype) -> Tensor:
    _check_dequantize(tiles, n, k, format, dtype)
    weights: Tensor = _kernels().dequantize(tiles, n, k, weight_type(format), dtype)
    return weights


def _pack_cuda(planes: Sequence[Tensor], format: str) -> Tensor:
    _check_pack(planes, format)
    tiles: Tensor = _kernels().pack(planes, weight_type(format))
    return tiles


# Shapes and dtypes alone, for torch.compile, torch.export and the meta device.


def _linear_fake(x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, format: str, activations: str) -> Tensor:
    dtypes = HALVES if x.device.type == "cuda" else FLOATS
    _check_linear(x, tiles, bias, n, format, activations, dtypes)
    return x.new_empty((*x.shape[:-1], n))


def _embedding_fake(indices: Tensor, tiles: Tensor, n: int, k: int, format: str, dtype: torch.dtype) -> Tensor:
    _check_embedding(indices, tiles, n, k, format, dtype)
    return tiles.new_empty((*indices.shape, k), dtype=dtype)


def _dequantize_fake(tiles: Tensor, n: int, k: int, format: str, dtype: torch.dtype) -> Tensor:
    _check_dequantize(tiles, n, k, format, dtype)
    return tiles.new_empty((n, k), dtype=dtype)


def _pack_fake(planes: Sequence[Tensor], format: str) -> Tensor:
    return planes[0].new_empty(_check_pack(planes, format), dtype=torch.uint8)


def _named(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that takes the dtype's name, for example "bfloat16", in place of the dtype."""

    def call(*arguments: Any) -> Tensor:
        *others, name = arguments
        for dtype in FLOATS:
            if str(dtype) == f"torch.{name}":
                return function(*others, dtype)
        raise ValueError(f"dtype: expected {either(FLOATS)}, found {name!r}")

    return call


_OPERATIONS = (
    (
        "linear(Tensor x, Tensor tiles, Tensor? bias, SymInt n, str format, str activations) -> Tensor",
        _linear_cpu,
        _linear_cuda,
        _linear_fake,
    ),
    (
        "embedding(Tensor indices, Tensor tiles, SymInt n, SymInt k, str format, ScalarType dtype) -> Tensor",
        _embedding_cpu,
        _embedding_cuda,
        _embedding_fake,
    ),
    (
        "dequantize(Tensor tiles, SymInt n, SymInt k, str format, ScalarType dtype) -> Tensor",
        _dequantize_cpu,
        _dequantize_cuda,
        _dequantize_fake,
    ),
    ("pack(Tensor[] planes, str format) -> Tensor", _pack_cpu, _pack_cuda, _pack_fake),
    (
        "embedding_named(Tensor indices, Tensor tiles, SymInt n, SymInt k, str format, str dtype) -> Tensor",
        _named(_embedding_cpu),
        _named(_embedding_cuda),
        _named(_embedding_fake),
    ),
    (
        "dequantize_named(Tensor tiles, SymInt n, SymInt k, str format, str dtype) -> Tensor",
        _named(_dequantize_cpu),
        _named(_dequantize_cuda),
        _named(_dequantize_fake),
    ),
)


def _define() -> None:
    """Register the schemas that are not defined yet, and the functions for fake tensors."""
    for schema, _, _, fake in _OPERATIONS:
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.q6k, name):
            _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"q6k::{name}", fake, lib=_LIBRARY)
    os.environ[DEFINED] = str(os.getpid())


def implement() -> None:
    """Register this module's implementations for the CPU and CUDA where there are none."""
    library = _Library("q6k", "IMPL")
    _implementations.append(library)
    for schema, on_cpu, on_cuda, _ in _OPERATIONS:
        name = schema.partition("(")[0]
        for key, function in (("CPU", on_cpu), ("CUDA", on_cuda)):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"q6k::{name}", key):
                library.impl(name, function, key)


def withdraw() -> None:
    """Withdraw the implementations, so that others can replace them; schemas and fake functions stay."""
    while _implementations:
        _implementations.pop()._destroy()


_define()
implement()

linear: Callable[[Tensor, Tensor, Tensor | None, int, str, str], Tensor] = torch.ops.q6k.linear.default
embedding: Callable[[Tensor, Tensor, int, int, str, torch.dtype], Tensor] = torch.ops.q6k.embedding.default
dequantize: Callable[[Tensor, int, int, str, torch.dtype], Tensor] = torch.ops.q6k.dequantize.default
pack: Callable[[Sequence[Tensor], str], Tensor] = torch.ops.q6k.pack.default
