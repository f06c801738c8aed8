"""The operations of a chunk of a prompt on a GPU: launches of `cuda/chunk.cuh`, products by the kernels for many
rows, attention (`chunk_attend_cuda`), gated delta nets (`chunk_delta_cuda`) and mixtures (`chunk_mixture_cuda`).

`step_reference` specifies the operations, in plain torch. It computes heads of the sizes and forms that
`chunk_attend_cuda.supports` leaves out. A single token, which may be all that is left of a chunk, goes through the
attention of a step.

Nothing here waits for the GPU.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda import dispatch, gemm_wgmma
from q6k_kernels.cuda.device import Variant, pointer
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate import chunk_attend_cuda, chunk_delta_cuda, chunk_mixture_cuda
from q6k_kernels.generate.delta import DeltaHeads
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.mixture import Mixed, Mixture
from q6k_kernels.generate.step_cuda import GATES, Kernels
from q6k_kernels.generate.step_reference import ProductInput, TorchOperations
from q6k_kernels.jit import loader
from q6k_kernels.models.layer import Activation
from q6k_kernels.weights.experts import PackedExperts
from q6k_kernels.weights.layers import PackedLinear

CHUNK, ADD_NORM, GATE = "chunk.cuh", "q6k_add_norm_rows", "q6k_gate_rows"
NORM_THREADS, GATE_THREADS = 256, 128
NORM_PARTS = (1, 2, 3, 4, 5, 6)
"""Pieces of a row that is normed: up to `step_cuda.MOST_NORM` values."""
LOGISTIC = 4
"""The number of gates of attention in the enum `Gate` of `cuda/gates.cuh`, behind those of `step_cuda.GATES`."""
MOST_PRODUCTS = 4096
"""Prepared products that are kept: those of chunks of a few lengths."""
_ADD_NORM, _GATE = struct.Struct("@PPPPPPfffii"), struct.Struct("@PPPqqiiii")


class ChunkKernels(TorchOperations):
    """The operations of a chunk on one GPU, in one dtype.

    Attributes:
        on_hopper: whether products are those of `gemm_wgmma`, which expand no weight in memory.

    Args:
        device: a GPU.
        dtype: dtype of activations, bfloat16 or float16.
        of_steps: the operations of a step, for attention of a single token.
        recorded: whether launches are recorded. Then products share no scratch memory, as what they share is freed
            when one of them needs more, and a graph would go on using it.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, of_steps: Kernels, *, recorded: bool = False
    ) -> None:
        self._device = launching.device(torch.cuda.current_device() if device.index is None else device.index)
        self._torch_device, self._dtype, self._of_steps = device, dtype, of_steps
        self._fp16 = int(dtype is torch.float16)
        self._products = dict[tuple[nn.Module, int], gemm_wgmma.Product]()
        self.on_hopper = self._device.arch == gemm_wgmma.ARCH
        self._scratch = None if recorded else torch.empty(0, dtype=torch.uint8, device=device)

    def add_norm(
        self,
        hidden: Tensor,
        delta: Tensor | Mixed | None,
        after: Norm | None,
        norm: Norm | None,
        users: list[nn.Module],
        factor: float = 1.0,
        scale: float = 1.0,
        further: tuple[Norm, Norm] | None = None,
    ) -> tuple[Tensor, ProductInput]:
        """Launch the residual sum and its norms, see `step_reference`."""
        if isinstance(delta, Mixed):
            delta = self._added(delta)
        if further is not None:
            total, normed = self.add_norm(hidden, delta, after, norm, users, factor, scale)
            return total, replace(normed, further=tuple(self._normed(each, total) for each in further))
        rows, k = hidden.shape
        if delta is None and norm is None:
            return hidden, ProductInput(hidden, None, k)
        total = hidden if delta is None else torch.empty_like(hidden)
        x = total if norm is None else torch.empty_like(hidden)
        self._launch(
            _norm_variant(self._fp16, k),
            (rows, 1, 1),
            NORM_THREADS,
            _ADD_NORM.pack(
                *map(pointer, (hidden, delta)),
                *(pointer(None if each is None else each.weight) for each in (after, norm)),
                *(0 if each is None else out.data_ptr() for each, out in ((delta, total), (norm, x))),
                factor,
                1.0 if delta is None else scale,
                next((each.epsilon for each in (norm, after) if each is not None), 0.0),
                k,
                int(any(each.centred for each in (norm, after) if each is not None)),
            ),
        )
        return total, ProductInput(x, None, k)

    def _added(self, mixed: Mixed) -> Tensor:
        total, norms = chunk_mixture_cuda.added(self._launch, _MACROS[self._fp16], mixed), mixed.norms
        if norms is None:
            return total
        if mixed.beside is None:
            return self._normed(norms.after_experts, total)
        return self.add_norm(self._normed(norms.after_beside, mixed.beside), total, norms.after_experts, None, [])[
            0
        ]

    def _normed(self, norm: Norm, x: Tensor) -> Tensor:
        halves = self.add_norm(x, None, None, norm, [])[1].halves
        assert halves is not None  # noqa: S101 -- all operations here return them
        return halves

    def gate(self, gate: Tensor, up: Tensor | None, activation: Activation, users: list[nn.Module]) -> ProductInput:
        """Launch the activation function of `gate` times `up`, see `step_reference`."""
        del users
        return self._gated(gate, up, GATES[activation], gate.shape[1], 0, gate.shape[1])

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        heads: Heads,
        cached: Cached,
        position: Tensor,
        users: list[nn.Module],
    ) -> ProductInput:
        """Launch norms, rotation, cache write and attention, see `step_reference`."""
        if len(q) == 1:
            return self._of_steps.attend(q, k, v, heads, cached, position, [_HALVES])
        if not chunk_attend_cuda.supports(heads):
            return super().attend(q, k, v, heads, cached, position, users)
        assert k is not None  # noqa: S101 -- only the last token is left where keys are shared
        assert v is not None  # noqa: S101 -- as above
        out = chunk_attend_cuda.attended(self._launch, _MACROS[self._fp16], (q, k, v), heads, cached)
        if heads.gated:
            return self._gated(q[:, heads.dim :], out, LOGISTIC, heads.dim, 2 * heads.dim, out.shape[1])
        return ProductInput(out, None, out.shape[1])

    def delta(
        self,
        mixed: Tensor,
        z: Tensor,
        b: Tensor,
        a: Tensor,
        heads: DeltaHeads,
        states: tuple[Tensor, Tensor],
        users: list[nn.Module],
    ) -> ProductInput:
        """Launch a gated delta net, see `delta`."""
        del users
        if len(mixed) == 1:
            return self._of_steps.delta(mixed, z, b, a, heads, states, [_HALVES])
        x = chunk_delta_cuda.computed(self._launch, _MACROS[self._fp16], (mixed, z, b, a), heads, states)
        return ProductInput(x, None, x.shape[1])

    def route(self, x: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
        """Launch the choice of experts, see `mixture.route`."""
        return chunk_mixture_cuda.route(self._launch, _MACROS[self._fp16], x, mixture)

    def mix(self, x: Tensor, mixture: Mixture, chosen: Tensor, factors: Tensor, beside: Tensor | None) -> Mixed:
        """Launch the products of a mixture, see `mixture.mix`."""
        experts = mixture.experts
        assert isinstance(experts, PackedExperts)  # noqa: S101 -- the kernels of steps have checked

        def gate(gates: Tensor, ups: Tensor) -> Tensor:
            halves = self._gated(gates, ups, GATES[experts.activation], gates.shape[1], 0, gates.shape[1]).halves
            assert halves is not None  # noqa: S101 -- all operations here return them
            return halves

        rows = chunk_mixture_cuda.outputs(x, experts, chosen, gate)
        return Mixed(rows, factors, beside, mixture.norms)

    def multiply(self, module: nn.Module, activations: ProductInput) -> Tensor:
        """Compute a product, (M, N)."""
        x = activations.halves
        assert x is not None  # noqa: S101 -- all operations here return them
        if not isinstance(module, PackedLinear):
            y: Tensor = module.forward(x)
            return y
        (m, k), n, tiles, row = x.shape, module.out_features, module.tiles, weight_type(module.format)
        # Not by the op, whose dispatch and checks take longer than the launch.
        if (product := self._products.get((module, m))) is None or product.tiles is not tiles:
            given = tiles, module.bias, n, row, module.activations
            product = dispatch.prepared(m, k, bool(self._fp16), *given, self._device.index)
            if product is None:
                return dispatch.linear(x, *given)
            if len(self._products) >= MOST_PRODUCTS:
                self._products.clear()
            self._products[module, m] = product
        if self._scratch is not None and product.scratch_bytes > len(self._scratch):
            self._scratch = torch.empty(product.scratch_bytes, dtype=torch.uint8, device=self._torch_device)
        y = torch.empty(m, n, dtype=self._dtype, device=self._torch_device)
        product(x, y, self._scratch)
        return y

    def _gated(self, gate: Tensor, up: Tensor | None, kind: int, piece: int, apart: int, k: int) -> ProductInput:
        """Launch a gate of k values; a row's gates are in pieces that are `apart`."""
        rows = len(gate)
        x = torch.empty(rows, k, dtype=self._dtype, device=self._torch_device)
        of_up = (0, 0) if up is None else (up.data_ptr(), up.stride(0))
        given = _GATE.pack(gate.data_ptr(), of_up[0], x.data_ptr(), gate.stride(0), of_up[1], kind, k, piece, apart)
        grid = rows, -(-k // (8 * GATE_THREADS)), 1
        self._launch((CHUNK, GATE, _MACROS[self._fp16]), grid, GATE_THREADS, given)
        return ProductInput(x, None, k)

    def _launch(self, variant: Variant, grid: tuple[int, int, int], threads: int, arguments: bytes) -> None:
        loader.load(*variant, self._device.index).launch(
            grid,
            threads,
            arguments,
            stream=launching.stream(self._device),
            dependent=self._device.arch >= 90,
        )


_HALVES = nn.Identity()
"""A user of activations in 16 bits."""
_MACROS = tuple((("Q6K_FP16", fp16),) for fp16 in (0, 1))


@cache
def _norm_variant(fp16: int, k: int) -> Variant:
    parts = next(count for count in NORM_PARTS if k <= 8 * NORM_THREADS * count)
    return CHUNK, ADD_NORM, (("Q6K_FP16", fp16), ("Q6K_NORM_PARTS", parts))


def variants() -> list[Variant]:
    """Return all kernels that a chunk may load on a GPU."""
    found = list[Variant]()
    for fp16, macros in enumerate(_MACROS):
        found += [(CHUNK, GATE, macros), *chunk_attend_cuda.variants(macros), *chunk_delta_cuda.variants(macros)]
        found += chunk_mixture_cuda.variants(macros)
        found += [_norm_variant(fp16, 8 * NORM_THREADS * parts) for parts in NORM_PARTS]
    return found
