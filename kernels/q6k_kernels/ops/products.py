"""Products on a CPU with weights of a byte each, by compiled code: the codes as int8, scales and mins as float32.

    y[m,n] = sum_g (scale[n,g] * sum_(k in g) code[n,k] * x[m,k]) - sum_g min[n,g] * sum_(k in g) x[m,k] + bias[n]

Few rows of x meet the codes themselves; for more, some weights at a time become float32, and torch multiplies. No
weight is rounded, sums are in fp32, and the result is rounded once, to x's dtype. `csrc/products.c` has the code.
It runs in torch's own threads, or in one if torch has no OpenMP. The bits are the same on every processor and with
any number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from q6k_kernels.errors import PackageMissingError
from q6k_kernels.formats.tiles import codes_and_scales
from q6k_kernels.formats.types import WeightType
from q6k_kernels.ops import reference

_EXTENSION = "q6k_kernels.ops._products"
FEW_ROWS = 4
"""The most rows of x that meet the codes themselves."""
EXPANDED = 1 << 19
"""Weights that are float32 at a time, for more rows: 2 MB, which stay in a cache and come from the heap."""
ALONE = 1 << 19
"""The most weights that one thread multiplies alone, in some 60 microseconds: starting others takes 10 or more."""


@dataclass(frozen=True, eq=False)
class Bytes:
    """Weights (N, K) of a byte each.

    Attributes:
        codes: int8 (N, K).
        scale: float32 (N, K / group), group 16 or 32.
        least: the mins, of the same form, or None.
    """

    codes: Tensor
    scale: Tensor
    least: Tensor | None

    def rows(self, part: slice) -> Bytes:
        """Return some rows, which share memory."""
        return Bytes(self.codes[part], self.scale[part], None if self.least is None else self.least[part])


class _Job(ctypes.Structure):
    """`Job` of the compiled code."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "least", "bias")),
        *((name, ctypes.c_int64) for name in ("n", "k", "group")),
        *((name, ctypes.c_void_p) for name in ("x", "sums", "y")),
        *((name, ctypes.c_int64) for name in ("m", "next")),
    ]


def installed() -> bool:
    """Return whether the compiled code is there."""
    return find_spec(_EXTENSION) is not None


def check_installed() -> str:
    """Return the file of the compiled code.

    Raises:
        PackageMissingError: it is not there.
    """
    spec = find_spec(_EXTENSION)
    if spec is None or spec.origin is None:
        raise PackageMissingError(
            f"the compiled products {_EXTENSION} are not installed",
            "Install q6k-convert from a wheel, or with a C compiler at hand.",
        )
    return spec.origin


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(check_installed())
    library.q6k_has_fast.restype = ctypes.c_int
    library.q6k_has_fast.argtypes = []
    library.q6k_run.restype = None
    library.q6k_run.argtypes = [ctypes.POINTER(_Job), ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint]
    return library


@cache
def has_fast() -> bool:
    """Return whether the compiled code has a second path that this processor supports: AVX2."""
    return bool(_library().q6k_has_fast())


@cache
def _parallel() -> int | None:
    """Return the address of the function by which torch's OpenMP runs its threads; None if torch has no OpenMP."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


def row_blocks(n: int, k: int, most: int) -> Iterator[slice]:
    """Yield slices of N rows of K weights, at most `most` weights each, or one row."""
    step = max(1, most // k)
    return (slice(at, min(at + step, n)) for at in range(0, n, step))


def of_tiles(tiles: Tensor, n: int, k: int, row: WeightType) -> Bytes:
    """Turn tiles (T, B, tile_bytes) of a weight (N, K) on the CPU into weights of a byte each, without rounding."""
    codes = torch.empty(n, k, dtype=torch.int8)
    scale = torch.empty(n, k // row.group)
    least = torch.empty_like(scale) if row.minimum else None
    for part in reference.row_blocks(n, k):
        values, scale[part], mins = codes_and_scales(tiles, part, k, row)
        codes[part] = values  # whole numbers of 8 bits
        if least is not None and mins is not None:
            least[part] = mins
    return Bytes(codes, scale, least)


def linear(x: Tensor, weight: Bytes, bias: Tensor | None = None, *, fast: bool | None = None) -> Tensor:
    """Multiply x with the transposed weights and add the bias: the formula at the top of this module.

    Args:
        x: bfloat16, float16 or float32 (..., K) on the CPU.
        weight: (N, K).
        bias: float (N,) on the CPU, or None.
        fast: whether to take the second path of the compiled code; by default where the processor supports it.

    Returns:
        New (..., N) of x's dtype.

    Raises:
        ValueError: x or the weight is not on the CPU, rows of x are not K long, the weight was cast, or x requires
            a gradient while gradients are recorded.
        PackageMissingError: the compiled code is not installed.
    """
    if fast is None:
        return _linear(x, weight.codes, weight.scale, weight.least, bias)
    return _multiplied(x, weight, bias, fast)


def _multiplied(x: Tensor, weight: Bytes, bias: Tensor | None, fast: bool) -> Tensor:
    n, k = _check(x, weight.codes)
    rows = x.detach().reshape(-1, k).float().contiguous()
    bias = None if bias is None else bias.detach().float()
    y = torch.empty(len(rows), n)
    if len(rows) <= FEW_ROWS:
        _run(weight, y, rows, bias, fast)
    else:
        for part in row_blocks(n, k, EXPANDED):
            y[:, part] = rows @ expand(weight.rows(part), fast=fast).T
        if bias is not None:
            y += bias
    return y.to(x.dtype).view(*x.shape[:-1], n)


def _check(x: Tensor, codes: Tensor) -> tuple[int, int]:
    """Check x and return N and K."""
    n, k = codes.shape
    if x.ndim == 0 or x.shape[-1] != k or x.device.type not in ("cpu", "meta"):
        raise ValueError(f"x: expected (..., {k}) on the CPU, found {tuple(x.shape)} on {x.device}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "x requires a gradient, and products with bytes have none: call them under torch.inference_mode() or "
            "torch.no_grad(); to train, keep the weights packed"
        )
    return n, k


def _linear_cpu(x: Tensor, codes: Tensor, scale: Tensor, least: Tensor | None, bias: Tensor | None) -> Tensor:
    return _multiplied(x, Bytes(codes, scale, least), bias, has_fast())


def _linear_fake(x: Tensor, codes: Tensor, _scale: Tensor, _least: Tensor | None, _bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _check(x, codes)[0]))


_Library: Any = torch.library.Library  # torch leaves its methods without types
_LIBRARY = _Library("q6k", "FRAGMENT")
_LIBRARY.define(
    "byte_linear(Tensor x, Tensor codes, Tensor scale, Tensor? least, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("byte_linear", _linear_cpu, "CPU")
torch.library.register_fake("q6k::byte_linear", _linear_fake, lib=_LIBRARY)
_linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor] = (
    torch.ops.q6k.byte_linear.default
)
"""An operation of torch, so that models can be compiled."""


def embedding(indices: Tensor, weight: Bytes, dtype: torch.dtype) -> Tensor:
    """Return the rows at indices of any shape (...), as (..., K), each weight rounded once, to `dtype`."""
    at = indices.reshape(-1)
    # Unlike indexing, it refuses negative ones.
    codes, scale = weight.codes.index_select(0, at), weight.scale.index_select(0, at)
    least = None if weight.least is None else weight.least.index_select(0, at)
    values = reference.weights(codes.float(), scale, least, dtype)
    return values.view(*indices.shape, -1)


def expand(weight: Bytes, *, fast: bool | None = None) -> Tensor:
    """Return the weights, float32 (N, K), the same as `PackedWeight.dequantize` does, to the bit."""
    y = torch.empty(weight.codes.shape)
    _run(weight, y, None, None, has_fast() if fast is None else fast)
    return y


def _run(weight: Bytes, y: Tensor, x: Tensor | None, bias: Tensor | None, fast: bool) -> None:
    """Run the compiled code on contiguous tensors: products of x into y (M, N), or without x the weights."""
    for tensor, dtype in ((weight.codes, torch.int8), (weight.scale, torch.float32), (weight.least, torch.float32)):
        if tensor is not None and (tensor.dtype, tensor.device.type) != (dtype, "cpu"):
            raise ValueError(f"weight: expected {dtype} on the CPU, found {tensor.dtype} on {tensor.device}")
    (n, k), groups = weight.codes.shape, weight.scale.shape[1]
    sums = None if x is None or weight.least is None else torch.empty(len(x), groups)

    def at(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    job = _Job(
        *(at(tensor) for tensor in (weight.codes, weight.scale, weight.least, bias)),
        *(n, k, k // groups),
        *(at(tensor) for tensor in (x, sums, y)),
        *(0 if x is None else len(x), 0),
    )
    threads = torch.get_num_threads() if n * k > ALONE else 1
    _library().q6k_run(job, x is None, fast, _parallel(), threads)
