"""The operations of a chunk of a prompt on a GPU: launches of `cuda/chunk.cuh` and `cuda/chunk_heads.cuh`, products
by the kernels for many rows, and attention by torch's flash attention.

`step_reference` specifies the operations, in plain torch. What has no kernel here is computed by it: delta nets,
the choice of experts and the sum of their outputs, and heads of other sizes than `HEAD_DIMS`. Flash attention
knows windows and shared keys, so it needs neither masks nor copies. Heads too large for it, and scores with a soft
cap, take two products for some queries at a time, with the softmax of their scores between.

Nothing here waits for the GPU.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from q6k_kernels.cuda import device as launching
from q6k_kernels.cuda import dispatch
from q6k_kernels.cuda.device import Variant
from q6k_kernels.formats.types import weight_type
from q6k_kernels.generate.attention import WIDEST, product_in_fp32
from q6k_kernels.generate.heads import Cached, Heads, Norm
from q6k_kernels.generate.mixture import Mixed
from q6k_kernels.generate.norm_cuda import pointer
from q6k_kernels.generate.step_cuda import Kernels
from q6k_kernels.generate.step_reference import ProductInput, TorchOperations
from q6k_kernels.jit import loader
from q6k_kernels.models.layer import Activation
from q6k_kernels.weights.layers import PackedLinear

CHUNK, ADD_NORM, GATE, SOFTMAX = "chunk.cuh", "q6k_add_norm_rows", "q6k_gate_rows", "q6k_softmax_rows"
HEADS, PLACE = "chunk_heads.cuh", "q6k_place_heads"
HEAD_DIMS = (64, 96, 128, 256, 512)
NORM_THREADS, GATE_THREADS, SOFTMAX_THREADS, PLACE_THREADS = 256, 128, 256, 256
NORM_PARTS = (1, 2, 3, 4)
MOST_NORM = 8 * NORM_THREADS * NORM_PARTS[-1]
VECTORS = 16
"""Vectors of heads that a block places: two of each warp."""
GATES = {"silu": 0, "gelu_tanh": 1, "relu_squared": 2}
LOGISTIC = 3
"""Activation -> its number in the enum `Gate` of `cuda/chunk.cuh`; and that of gates of attention."""
SCORES_AT_ONCE = 1 << 24
"""Scores that are kept at a time, in fp32: 64 MB, part of which stays in the L2 cache."""
KEYS = 8
"""Multiple of keys in a product: 16 bytes of weights, the alignment that fast kernels want."""
_ADD_NORM, _GATE = struct.Struct("@PPPPPPfffii"), struct.Struct("@PPPqqiiii")
_SOFTMAX, _PLACE = struct.Struct("@PPPffiiiii"), struct.Struct("@PPPqqqPqqPPPPPPPPPfiiiiiiiiiii")


class ChunkKernels(TorchOperations):
    """The operations of a chunk on one GPU, in one dtype.

    Args:
        device: a GPU.
        dtype: dtype of activations, bfloat16 or float16.
        of_steps: the operations of a step, for attention of a single token.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, of_steps: Kernels) -> None:
        self._device = launching.device(torch.cuda.current_device() if device.index is None else device.index)
        self._torch_device, self._dtype, self._of_steps = device, dtype, of_steps
        self._fp16 = int(dtype is torch.float16)

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
            delta = delta.sum(self._normed)
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
            (rows, 1),
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

    def _normed(self, norm: Norm, x: Tensor) -> Tensor:
        return self.add_norm(torch.zeros_like(x), x, norm, None, [])[0]

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
        rows = len(q)
        if rows == 1:
            return self._of_steps.attend(q, k, v, heads, cached, position, [_HALVES])
        if not _placed(heads):
            return super().attend(q, k, v, heads, cached, position, users)
        assert k is not None  # noqa: S101 -- only the last token is left where keys are shared
        assert v is not None  # noqa: S101 -- as above
        assert cached.start is not None  # noqa: S101 -- of a chunk
        more, first = self._joined(cached, cached.start, rows)
        if heads.normed == "projection":  # of more than a warp has, so in torch
            of_both = zip((q, k), (heads.q_norm, heads.k_norm), strict=True)
            q, k = (each if norm is None else norm(each).to(each.dtype) for each, norm in of_both)
        flash = q.is_cuda and heads.dim <= WIDEST and heads.softcap is None and heads.sinks is None
        group, size = heads.count // heads.key_heads, heads.dim
        shape = (1, rows, heads.count, size) if flash else (heads.key_heads, rows, group, size)
        queries = torch.empty(shape, dtype=self._dtype, device=self._torch_device)
        of_group = group * size if flash else rows * group * size
        self._place((q, k, v), queries, of_group, heads, cached, more, cached.start - first)
        keys, values = (cached.keys[0], cached.values[0]) if more is None else more
        if more is None:
            last = -(-(cached.start + rows) // KEYS) * KEYS
            keys, values = keys[:, first:last], values[:, first:last]
        ends = cached.start - first + rows
        if flash:
            out = _flash(queries, keys[:, :ends], values[:, :ends], heads.scale, cached.window)
        else:
            out = self._in_parts(queries, keys, values, heads, cached.start - first, cached.window)
        out = out.view(rows, heads.count * size)
        if heads.gated:
            gates = q[:, size:]
            return self._gated(gates, out, LOGISTIC, size, 2 * size, out.shape[1])
        return ProductInput(out, None, heads.count * size)

    def multiply(self, module: nn.Module, activations: ProductInput) -> Tensor:
        """Compute a product, (M, N)."""
        x = activations.halves
        assert x is not None  # noqa: S101 -- all operations here return them
        if not isinstance(module, PackedLinear):
            y: Tensor = module(x)
            return y
        # Not by the op, whose dispatch and checks take longer than the launch.
        row = weight_type(module.format)
        return dispatch.linear(x, module.tiles, module.bias, module.out_features, row, module.activations)

    def _gated(self, gate: Tensor, up: Tensor | None, kind: int, piece: int, apart: int, k: int) -> ProductInput:
        """Launch a gate of k values; a row's gates are in pieces that are `apart`."""
        rows = len(gate)
        x = torch.empty(rows, k, dtype=self._dtype, device=self._torch_device)
        of_up = (0, 0) if up is None else (up.data_ptr(), up.stride(0))
        given = _GATE.pack(gate.data_ptr(), of_up[0], x.data_ptr(), gate.stride(0), of_up[1], kind, k, piece, apart)
        grid = rows, -(-k // (8 * GATE_THREADS))
        self._launch((CHUNK, GATE, _MACROS[self._fp16]), grid, GATE_THREADS, given)
        return ProductInput(x, None, k)

    def _joined(self, cached: Cached, start: int, rows: int) -> tuple[tuple[Tensor, Tensor] | None, int]:
        """Return memory for keys and values side by side, if a ring will not hold them so, and the first position.

        What the first rows see of earlier tokens is there already.
        """
        if not cached.window:
            return None, 0
        slots = cached.keys.shape[-2]
        kept = min(start, cached.window - 1)
        if start + rows <= slots:
            return None, (start - kept) // KEYS * KEYS
        size = -(-(kept + rows) // KEYS) * KEYS
        heads, _, dim = cached.keys.shape[1:]
        both = torch.empty(2, heads, size, dim, dtype=self._dtype, device=self._torch_device)
        both[:, :, kept + rows :] = 0
        begin = (start - kept) % slots
        until_end = min(kept, slots - begin)
        for to, ring in zip(both, (cached.keys[0], cached.values[0]), strict=True):
            for at, slot, count in ((0, begin, until_end), (until_end, 0, kept - until_end)):
                if count:
                    to[:, at : at + count] = ring[:, slot : slot + count]
        return (both[0], both[1]), start - kept

    def _place(
        self,
        projected: tuple[Tensor, Tensor, Tensor],
        queries: Tensor,
        of_group: int,
        heads: Heads,
        cached: Cached,
        more: tuple[Tensor, Tensor] | None,
        more_first: int,
    ) -> None:
        rows, group = len(projected[0]), heads.count // heads.key_heads
        norms = (None, None) if heads.normed == "projection" else (heads.q_norm, heads.k_norm)
        flash = queries.shape[0] == 1 and of_group == group * heads.dim
        given = _PLACE.pack(
            *(each.data_ptr() for each in projected),
            *(each.stride(0) for each in projected),
            queries.data_ptr(),
            (heads.count if flash else group) * heads.dim,
            of_group,
            *map(pointer, (cached.keys, cached.values)),
            *((0, 0) if more is None else (each.data_ptr() for each in more)),
            *map(pointer, (heads.cosines, heads.sines)),
            *(0 if norm is None else norm.weight.data_ptr() for norm in norms),
            0 if heads.growth is None else heads.growth.data_ptr(),
            0.0 if heads.q_norm is None else heads.q_norm.epsilon,
            cached.start,
            heads.count,
            heads.key_heads,
            cached.keys.shape[-2],
            0 if more is None else more[0].shape[1],
            more_first,
            int(heads.values_normed),
            2 * heads.cosines.shape[1],
            heads.dim * (1 + heads.gated),
            int(heads.neighbours),
            int(heads.normed == "rotated head"),
        )
        grid = rows, -(-(heads.count + 2 * heads.key_heads) // VECTORS)
        self._launch(_place_variant(self._fp16, heads.dim), grid, PLACE_THREADS, given)

    def _in_parts(
        self, queries: Tensor, keys: Tensor, values: Tensor, heads: Heads, start: int, window: int
    ) -> Tensor:
        """Attend by two products for some queries at a time.

        Args:
            queries: (key heads, rows, group, dim), contiguous.
            keys: (key heads, K, dim), K a multiple of `KEYS`; what no query sees must be finite.
            values: likewise.
            heads: the heads.
            start: the first query's own key.
            window: 0 for none.

        Returns:
            (rows, key heads, group, dim).
        """
        key_heads, rows, group, dim = queries.shape
        out = torch.empty(rows, key_heads, group, dim, dtype=self._dtype, device=self._torch_device)
        step = max(1, SCORES_AT_ONCE // (heads.count * keys.shape[1]))
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            first = max(0, start + begin - window + 1) // KEYS * KEYS if window else 0
            last = -(-(start + end) // KEYS) * KEYS
            part = queries[:, begin:end].reshape(key_heads, -1, dim)
            scores = product_in_fp32(part, keys[:, first:last].transpose(1, 2))
            weights = torch.empty(scores.shape, dtype=self._dtype, device=self._torch_device)
            given = _SOFTMAX.pack(
                *(scores.data_ptr(), weights.data_ptr(), 0 if heads.sinks is None else heads.sinks.data_ptr()),
                *(heads.scale, heads.softcap or 0.0),
                *(last - first, first, start + begin, group, window),
            )
            variant = CHUNK, SOFTMAX, _MACROS[self._fp16]
            self._launch(variant, (part.shape[1], key_heads), SOFTMAX_THREADS, given)
            found = torch.bmm(weights, values[:, first:last])
            out[begin:end].copy_(found.view(key_heads, end - begin, group, dim).transpose(0, 1))
        return out

    def _launch(self, variant: Variant, grid: tuple[int, int], threads: int, arguments: bytes) -> None:
        loader.load(*variant, self._device.index).launch(
            (*grid, 1),
            threads,
            arguments,
            stream=launching.stream(self._device),
            dependent=self._device.arch >= 90,
        )


_HALVES = nn.Identity()
"""A user of activations in 16 bits."""
_MACROS = tuple((("Q6K_FP16", fp16),) for fp16 in (0, 1))


def _placed(heads: Heads) -> bool:
    """Check whether there are kernels for heads."""
    grows_before_norm = heads.growth is not None and heads.normed == "rotated head"
    return heads.dim in HEAD_DIMS and 2 * heads.cosines.shape[1] % 8 == 0 and not grows_before_norm


def _flash(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    """Attend by flash attention, which aligns the last query with the last key.

    Args:
        queries: (1, M, heads, dim).
        keys: (key heads, K, dim).
        values: likewise.
        scale: factor of the scores.
        window: 0 for none.
    """
    key, value = (each.transpose(0, 1)[None] for each in (keys, values))
    # The public function has no window, and with a mask in its place none of its kernels is fast.
    out: Tensor = torch.ops.aten._flash_attention_forward(
        *(queries, key, value, None, None, queries.shape[1], key.shape[1], 0.0, True, False),
        scale=scale,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
    )[0]
    return out


@cache
def _norm_variant(fp16: int, k: int) -> Variant:
    parts = next(count for count in NORM_PARTS if k <= 8 * NORM_THREADS * count)
    return CHUNK, ADD_NORM, (("Q6K_FP16", fp16), ("Q6K_NORM_PARTS", parts))


@cache
def _place_variant(fp16: int, dim: int) -> Variant:
    return HEADS, PLACE, (("Q6K_FP16", fp16), ("Q6K_HEAD_DIM", dim))


def variants() -> list[Variant]:
    """Return all kernels that a chunk may load on a GPU."""
    found = list[Variant]()
    for fp16, macros in enumerate(_MACROS):
        found += [(CHUNK, kernel, macros) for kernel in (GATE, SOFTMAX)]
        found += [_norm_variant(fp16, 8 * NORM_THREADS * parts) for parts in NORM_PARTS]
        found += [_place_variant(fp16, dim) for dim in HEAD_DIMS]
    return found
