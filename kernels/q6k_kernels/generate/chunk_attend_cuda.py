"""Attention of a prompt's chunk on a GPU: one launch that norms, rotates and places heads, and torch's attention.

Flash attention knows windows and shared keys, so it needs neither masks nor copies. Heads too large for it, soft
caps of scores, and sinks take two products for some queries at a time, with the softmax of their scores between; so
does all attention where torch was built without it.
`heads.attended` specifies the result.
"""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from q6k_kernels.cuda.device import Launch, Variant, pointer
from q6k_kernels.generate.attend_cuda import HEAD_DIMS
from q6k_kernels.generate.attention import WIDEST, product_in_fp32
from q6k_kernels.generate.heads import Cached, Heads
from q6k_kernels.jit.compiler import Defines
from q6k_kernels.models.cache_layout import ALIGNMENT, slots_beside

HEADS, PLACE, PLACE_THREADS = "chunk_heads.cuh", "q6k_place_heads", 256
EXPAND = "q6k_expand_codes"
SOFTMAX_FILE, SOFTMAX, SOFTMAX_THREADS = "chunk.cuh", "q6k_softmax_rows", 256
VECTORS = 16
"""Vectors of heads that a block places: two of each warp."""
SCORES_AT_ONCE = 1 << 24
"""Scores that are kept at a time, in fp32: 64 MB, part of which stays in the L2 cache."""
KEYS = ALIGNMENT
"""Multiple of keys in a product: 16 bytes of weights, the alignment that fast kernels want."""
_SOFTMAX, _PLACE = struct.Struct("@PPPffiiiii"), struct.Struct("@PPPqqqPqqPPPPPPPPPPPfiiiiiiiiiii")
_EXPAND = struct.Struct("@PPPPPPiiii")


def supports(heads: Heads) -> bool:
    """Check whether there are kernels for heads."""
    grows_before_norm = heads.growth is not None and heads.normed == "rotated head"
    return heads.dim in HEAD_DIMS and 2 * heads.cosines.shape[1] % 8 == 0 and not grows_before_norm


def attended(
    launch: Launch, macros: Defines, projected: tuple[Tensor, Tensor, Tensor], heads: Heads, cached: Cached
) -> Tensor:
    """Write keys and values to the cache, and attend to the cache, (M, count * dim), without gates.

    Args:
        launch: launches a kernel.
        macros: those of the dtype.
        projected: q, k and v, of two tokens or more.
        heads: the heads of the layer.
        cached: the layer's part of the cache.
    """
    q, k, v = projected
    assert cached.start is not None  # noqa: S101 -- of a chunk
    rows, group, size = len(q), heads.count // heads.key_heads, heads.dim
    if heads.normed == "projection":  # of more than a warp has, so in torch
        of_both = zip((q, k), (heads.q_norm, heads.k_norm), strict=True)
        q, k = (each if norm is None else norm(each).to(each.dtype) for each, norm in of_both)
    beside, first = _beside(launch, macros, cached, rows, q.dtype)
    flash = q.is_cuda and _has_flash() and size <= WIDEST and heads.softcap is None and heads.sinks is None
    shape = (rows, heads.key_heads, group, size) if flash else (heads.key_heads, rows, group, size)
    queries = torch.empty(shape, dtype=q.dtype, device=q.device)
    of_row, of_group = queries.stride()[:2] if flash else queries.stride()[1::-1]
    _place(launch, macros, (q, k, v), (queries, of_row, of_group), heads, cached, beside, cached.start - first)
    keys, values = (cached.keys[0], cached.values[0]) if beside is None else beside
    if beside is None:
        last = -(-(cached.start + rows) // KEYS) * KEYS
        keys, values = keys[:, first:last], values[:, first:last]
    if not flash:
        return _in_parts(launch, macros, queries, keys, values, heads, cached.start - first, cached.window)
    count = cached.start - first + rows
    return _flash(queries, keys[:, :count], values[:, :count], heads.scale, cached.window)


def _beside(
    launch: Launch, macros: Defines, cached: Cached, rows: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor] | None, int]:
    """Return memory for keys and values side by side, and the first's position; None if the cache holds them so.

    A ring may not, and codes never. What the first rows see of earlier tokens is there already.
    """
    start = cached.start
    assert start is not None  # noqa: S101 -- of a chunk
    coded = cached.scales is not None
    if not cached.window and not coded:
        return None, 0
    heads, slots, dim = cached.keys.shape[1:]
    kept = min(start, cached.window - 1) if cached.window else start
    if start + rows <= slots and not coded:
        return None, (start - kept) // KEYS * KEYS
    size = slots_beside(start, rows, cached.window)
    both = torch.empty(2, heads, size, dim, dtype=dtype, device=cached.keys.device)
    both[:, :, kept + rows :] = 0
    if coded:
        _expand(launch, macros, cached, (both[0], both[1]), start - kept, kept)
    else:
        begin = (start - kept) % slots
        until_end = min(kept, slots - begin)
        for to, ring in zip(both, (cached.keys[0], cached.values[0]), strict=True):
            for at, slot, count in ((0, begin, until_end), (until_end, 0, kept - until_end)):
                if count:
                    to[:, at : at + count] = ring[:, slot : slot + count]
    return (both[0], both[1]), start - kept


def _expand(
    launch: Launch, macros: Defines, cached: Cached, to: tuple[Tensor, Tensor], first: int, count: int
) -> None:
    """Launch the expansion of codes of `count` positions from `first` on, to the beginning of `to`."""
    if not count:
        return
    heads, slots, dim = cached.keys.shape[1:]
    held = cached.keys, cached.values, *(cached.scales or ())
    given = _EXPAND.pack(*(each.data_ptr() for each in (*held, *to)), slots, first, count, to[0].shape[1])
    grid = -(-count * dim // (16 * PLACE_THREADS)), heads, 2
    launch((HEADS, EXPAND, _of_heads(macros, dim, codes=True)), grid, PLACE_THREADS, given)


def _place(
    launch: Launch,
    macros: Defines,
    projected: tuple[Tensor, Tensor, Tensor],
    placed: tuple[Tensor, int, int],
    heads: Heads,
    cached: Cached,
    beside: tuple[Tensor, Tensor] | None,
    first: int,
) -> None:
    """Launch norms and rotation of heads, and write them where they belong.

    `placed` is memory for queries, and the values from a row, and from a head of keys, to the next; `beside` that
    in which keys and values lie side by side, or None, and `first` the place of the first new key there.
    """
    queries, of_row, of_group = placed
    norms = (None, None) if heads.normed == "projection" else (heads.q_norm, heads.k_norm)
    given = _PLACE.pack(
        *(each.data_ptr() for each in projected),
        *(each.stride(0) for each in projected),
        *(queries.data_ptr(), of_row, of_group),
        *map(pointer, (cached.keys, cached.values, *(cached.scales or (None, None)))),
        *((0, 0) if beside is None else (each.data_ptr() for each in beside)),
        *(heads.cosines.data_ptr(), heads.sines.data_ptr()),
        *(0 if norm is None else norm.weight.data_ptr() for norm in norms),
        pointer(heads.growth),
        0.0 if heads.q_norm is None else heads.q_norm.epsilon,
        *(cached.start, heads.count, heads.key_heads, cached.keys.shape[-2]),
        *(0 if beside is None else beside[0].shape[1], first),
        *(int(heads.values_normed), 2 * heads.cosines.shape[1], heads.dim * (1 + heads.gated)),
        *(int(heads.neighbours), int(heads.normed == "rotated head")),
    )
    grid = len(projected[0]), -(-(heads.count + 2 * heads.key_heads) // VECTORS), 1
    codes = cached.scales is not None
    launch((HEADS, PLACE, _of_heads(macros, heads.dim, codes=codes)), grid, PLACE_THREADS, given)


def _in_parts(
    launch: Launch,
    macros: Defines,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: Heads,
    start: int,
    window: int,
) -> Tensor:
    """Attend by two products for some queries at a time, (rows, count * dim).

    `queries` are (key heads, rows, group, dim), contiguous; `keys` and `values` (key heads, K, dim), K a multiple
    of `KEYS`, and finite where no query sees them. `start` is the first query's own key; a `window` of 0 is none.
    """
    key_heads, rows, group, dim = queries.shape
    out = torch.empty(rows, key_heads, group, dim, dtype=queries.dtype, device=queries.device)
    step = max(1, SCORES_AT_ONCE // (heads.count * keys.shape[1]))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        first = max(0, start + begin - window + 1) // KEYS * KEYS if window else 0
        last = -(-(start + end) // KEYS) * KEYS
        part = queries[:, begin:end].reshape(key_heads, -1, dim)
        scores = product_in_fp32(part, keys[:, first:last].transpose(1, 2))
        weights = torch.empty(scores.shape, dtype=queries.dtype, device=queries.device)
        given = _SOFTMAX.pack(
            *(scores.data_ptr(), weights.data_ptr(), pointer(heads.sinks)),
            *(heads.scale, heads.softcap or 0.0, last - first, first, start + begin, group, window),
        )
        launch((SOFTMAX_FILE, SOFTMAX, macros), (part.shape[1], key_heads, 1), SOFTMAX_THREADS, given)
        found = torch.bmm(weights, values[:, first:last])
        out[begin:end].copy_(found.view(key_heads, end - begin, group, dim).transpose(0, 1))
    return out.view(rows, -1)


def _flash(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    """Attend by flash attention, which aligns the last query with the last key, (rows, count * dim).

    Args:
        queries: (rows, key heads, group, dim), contiguous.
        keys: (key heads, K, dim).
        values: likewise.
        scale: factor of the scores.
        window: 0 for none.
    """
    rows, key_heads, group, dim = queries.shape
    key, value = (each.transpose(0, 1)[None] for each in (keys, values))
    # The public function has no window, and with a mask in its place none of its kernels is fast.
    out: Tensor = torch.ops.aten._flash_attention_forward.default(
        *(
            queries.view(1, rows, key_heads * group, dim),
            key,
            value,
            None,
            None,
            rows,
            key.shape[1],
            0.0,
            True,
            False,
        ),
        scale=scale,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
    )[0]
    return out.view(rows, -1)


@cache
def _has_flash() -> bool:
    """Check whether this torch was built with flash attention, as those for Windows may not be."""
    return torch.backends.cuda.is_flash_attention_available()


@cache
def _of_heads(macros: Defines, dim: int, *, codes: bool) -> Defines:
    return (*macros, ("Q6K_HEAD_DIM", dim), ("Q6K_CODES", int(codes)))


def variants(macros: Defines) -> list[Variant]:
    """Return the kernels with the macros of a dtype."""
    found = [(SOFTMAX_FILE, SOFTMAX, macros)]
    for dim in HEAD_DIMS:
        found += [(HEADS, PLACE, _of_heads(macros, dim, codes=codes)) for codes in (False, True)]
        found.append((HEADS, EXPAND, _of_heads(macros, dim, codes=True)))
    return found
