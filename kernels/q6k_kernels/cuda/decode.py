"""Decode with activations in 8 bits: `cuda/decode.cuh`, launched as `cuda.decode_plan` chooses."""

from __future__ import annotations

import struct
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

import torch

from q6k_kernels.cuda.decode_kernels import reached
from q6k_kernels.cuda.decode_plan import MOST_TOKENS, TOKENS, DecodePlan, Kernel, code_bytes, plan
from q6k_kernels.cuda.device import Device, Variant, bias_arguments, common_macros, stream
from q6k_kernels.formats.ggml import SUPER_BLOCK, super_blocks
from q6k_kernels.formats.types import WEIGHT_TYPES, WeightType
from q6k_kernels.jit import loader

if TYPE_CHECKING:
    from torch import Tensor

KERNEL, QUANTIZE = "q6k_decode", "q6k_quantize"
QUANTIZE_THREADS = 128
_ARGUMENTS = struct.Struct("@PPPPqiiiiii")
_QUANTIZE_ARGUMENTS = struct.Struct("@PPPqii")


def linear(
    x: Tensor, tiles: Tensor, bias: Tensor | None, n: int, row: WeightType, y: Tensor, device: Device
) -> None:
    """Launch the product y = x Wᵀ (+ bias); `cuda.dispatch.linear` has checked the arguments.

    Args:
        x: bf16 or fp16 (M, K), rows 16-byte aligned; any M, up to 8 rows a launch.
        tiles: uint8 (T, ceil(K/256), tile_bytes).
        bias: (n,) or None.
        n: rows of the weight.
        row: the weight type.
        y: x's dtype (M, n), contiguous.
        device: the GPU of all tensors.

    Raises:
        ValueError: not even one row of activations fits in the GPU's shared memory.
    """
    k, at = x.shape[1], 0
    while at < len(x):
        m = min(MOST_TOKENS, len(x) - at)
        while (chosen := plan(m, n, k, row, device)) is None:
            if m == 1:
                raise ValueError(
                    f"activations int8: rows of K = {k} do not fit in the {device.shared_bytes} bytes of shared "
                    f"memory of this GPU's blocks; use activations='bf16'"
                )
            m //= 2
        _launch(chosen, x[at : at + m], tiles, bias, n, row, y[at : at + m], device)
        at += m


def linear_of_codes(
    codes: Tensor,
    k: int,
    tiles: Tensor,
    bias: Tensor | None,
    n: int,
    row: WeightType,
    y: Tensor,
    device: Device,
) -> None:
    """Launch the product of up to 8 rows of activations that another kernel has quantised.

    Args:
        codes: uint8, the rows of k as `q6k_quantize` writes them, of the size that `decode_plan.code_bytes` gives.
        k: K of both.
        tiles: uint8 (T, ceil(K/256), tile_bytes).
        bias: (n,) or None.
        n: rows of the weight; `decode_plan.fits` has accepted its size for as many rows.
        row: the weight type.
        y: bf16 or fp16 (M, n), contiguous.
        device: the GPU of all tensors.
    """
    chosen = plan(len(y), n, k, row, device, quantized=True)
    if chosen is None:
        raise ValueError(f"{len(y)} rows of K = {k} do not fit in shared memory")
    _multiply(chosen, codes, 0, k, tiles, bias, n, row, y, device)


def _launch(
    chosen: DecodePlan,
    x: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    n: int,
    row: WeightType,
    y: Tensor,
    device: Device,
) -> None:
    stride, k = x.stride(0), x.shape[1]
    if not chosen.fused:
        x = _quantize(x, chosen.tokens, device)
    _multiply(chosen, x, stride, k, tiles, bias, n, row, y, device)


def _multiply(
    chosen: DecodePlan,
    x: Tensor,
    stride: int,
    k: int,
    tiles: Tensor,
    bias: Tensor | None,
    n: int,
    row: WeightType,
    y: Tensor,
    device: Device,
) -> None:
    kernel = loader.load(*_variant_of(chosen, row, y.dtype), device.index)
    bias_at, bias_kind = bias_arguments(bias)
    arguments = _ARGUMENTS.pack(
        tiles.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        bias_at,
        stride,
        bias_kind,
        len(y),
        n,
        k,
        tiles.shape[0],
        chosen.early,
    )
    kernel.launch(
        (chosen.ranges * chosen.cluster, 1, 1),
        chosen.warps * 32,
        arguments,
        stream=stream(device),
        shared_bytes=chosen.shared_bytes,
        cluster=chosen.cluster,
        dependent=device.arch >= 90,
    )


def _quantize(x: Tensor, tokens: int, device: Device) -> Tensor:
    """Quantise the rows x (M, K) to 8 bits, in the order in which a decode kernel for `tokens` rows reads them."""
    m, k = x.shape
    codes, steps = code_bytes(k, tokens)
    quantized = torch.empty(codes + steps, dtype=torch.uint8, device=x.device)
    arguments = _QUANTIZE_ARGUMENTS.pack(
        x.data_ptr(), quantized.data_ptr(), quantized.data_ptr() + codes, x.stride(0), m, k
    )
    kernel = loader.load(*_quantize_variant(tokens, x.dtype == torch.float16), device.index)
    blocks = -(-(tokens * super_blocks(k) * SUPER_BLOCK // 16) // QUANTIZE_THREADS)
    kernel.launch((blocks, 1, 1), QUANTIZE_THREADS, arguments, stream=stream(device), dependent=device.arch >= 90)
    return quantized


def _variant_of(chosen: DecodePlan, row: WeightType, dtype: torch.dtype) -> Variant:
    return _variant(chosen.kernel, chosen.cluster > 1, row, dtype == torch.float16)


@cache
def _variant(kernel: Kernel, split: bool, row: WeightType, fp16: bool) -> Variant:
    names = ("Q6K_TOKENS", "Q6K_FUSED", "Q6K_WARPS", "Q6K_STAGES", "Q6K_OCCUPANCY", "Q6K_SPLIT")
    macros = zip(names, map(int, (*kernel, split)), strict=True)
    return "decode.cuh", KERNEL, (*common_macros(row, fp16), *macros)


@cache
def _quantize_variant(tokens: int, fp16: bool) -> Variant:
    return "quantize_rows.cuh", QUANTIZE, (("Q6K_FP16", int(fp16)), ("Q6K_TOKENS", tokens), ("Q6K_FUSED", 0))


def variants(device: Device) -> list[Variant]:
    """Return every variant that `linear` and `linear_of_codes` load on a GPU for some size."""
    return [
        *(
            _variant(kernel, split, row, fp16)
            for row, fp16 in product(WEIGHT_TYPES.values(), (False, True))
            for kernel, split in reached(row, device)
        ),
        *(_quantize_variant(tokens, fp16) for tokens, fp16 in product(TOKENS, (False, True))),
    ]
