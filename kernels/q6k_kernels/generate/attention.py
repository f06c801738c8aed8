"""Attention for `generate` and `export`, registered with transformers under our own names.

    plain  decodes with two products and a softmax in fp32
    sdpa   decodes with torch's scaled_dot_product_attention, which exported programs call as one operation

Prefill uses SDPA. In decode, query heads that share keys become rows of one query, so that the keys are read once.
The number of valid keys is known only on the device, so a mask states it. With a mask SDPA has no kernel that
splits the keys, while the products of `plain` use more of the GPU. SDPA has no soft cap of scores (Gemma 2), so
those go through the two products in prefill too; so do, in `plain`, heads too large for SDPA's fast kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDEST = 256
"""Size of the largest heads that SDPA has fast kernels for. Beyond, it multiplies in fp32, without tensor cores."""
SCORES_AT_ONCE = 1 << 26
"""Scores that a prompt's attention keeps at a time, in fp32: 256 MB."""


def implementation(attention: Literal["plain", "sdpa"]) -> str:
    """Register an attention with transformers, and return its name there."""
    from transformers import AttentionInterface

    name = f"q6k_{attention}"
    forms: dict[str, Callable[..., tuple[Tensor, None]]] = {"sdpa": _sdpa, "plain": _plain}
    AttentionInterface.register(name, forms[attention])
    return name


@contextmanager
def lent(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Give a model an implementation inside the context only, since the model belongs to the caller."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _sdpa(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend by SDPA.

    Args:
        _module: not used.
        query: (1, H, Q, D).
        key: (1, H / n, K, D).
        value: (1, H / n, K, D).
        attention_mask: (1, 1, Q, K); None for causal attention.
        scaling: factor of the scores; None for D ** -0.5.
        softcap: soft cap of the scores, or None.
        s_aux: each head's sink, a score of no key that takes its part of the weights, (H,), or None.

    Returns:
        (1, Q, H, D), and None in place of the attention weights.
    """
    if softcap is not None or s_aux is not None:
        return _products(query, key, value, attention_mask, scaling, softcap, s_aux), None
    heads, length = query.shape[1:3]
    repeats = heads // key.shape[1]
    if length == 1:
        rows = _rows(query, repeats)
        out = scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)
        return out.reshape(1, 1, heads, -1), None
    if attention_mask is None:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=repeats > 1)
    else:
        # With a mask and shared keys SDPA falls back to its slowest form, which stores all scores.
        key, value = (shared.repeat_interleave(repeats, dim=1) for shared in (key, value))
        out = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _plain(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if query.shape[2] > 1 and (query.shape[3] > WIDEST or s_aux is not None) and softcap is None:
        return _in_parts(query, key, value, attention_mask, scaling, s_aux), None
    if query.shape[2] > 1:
        return _sdpa(module, query, key, value, attention_mask, scaling, softcap, s_aux)
    return _products(query, key, value, attention_mask, scaling, softcap, s_aux), None


def _in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend by two products for some queries at a time, with scores in fp32; see `_sdpa`."""
    heads, length, size = query.shape[1:]
    key_heads, keys = key.shape[1:3]
    together = query.reshape(key_heads, heads // key_heads, length, size)
    out = query.new_empty(1, length, heads, size)
    count = max(1, SCORES_AT_ONCE // (heads * keys))
    for begin in range(0, length, count):
        end = min(begin + count, length)
        if attention_mask is None:  # causal, with as many keys as queries
            seen = torch.ones(end - begin, end, dtype=torch.bool, device=query.device).tril(begin)
        else:
            seen = attention_mask[0, 0, begin:end]
        last = seen.shape[1]
        rows = together[:, :, begin:end].reshape(key_heads, -1, size)
        scores = product_in_fp32(rows, key[0, :, :last].transpose(1, 2))
        scores = scores.mul_(size**-0.5 if scaling is None else scaling).view(heads, end - begin, last)
        of_heads = None if sinks is None else sinks.view(-1, 1, 1)
        weights = softmax_beside(scores.masked_fill_(~seen, -torch.inf), of_heads).to(value.dtype)
        part = weights.view(key_heads, -1, last) @ value[0, :, :last]
        out[0, begin:end] = part.view(heads, end - begin, size).transpose(0, 1)
    return out


def product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices, with a result in fp32."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    heads, length, size = query.shape[1:]
    key_heads = key.shape[1]
    # Heads that share keys become rows of one query.
    rows = query.reshape(1, key_heads, -1, size)
    scores = (rows @ key.transpose(2, 3)).float() * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None and length > 1:
        attention_mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    scores = scores.view(1, key_heads, heads // key_heads, length, -1)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[:, :, None], -torch.inf)
    of_heads = None if sinks is None else sinks.view(1, key_heads, -1, 1, 1)
    weights = softmax_beside(scores, of_heads).to(value.dtype).view(1, key_heads, rows.shape[2], -1)
    return (weights @ value).view(1, heads, length, -1).transpose(1, 2).contiguous()


def softmax_beside(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax of scores, (…, Q, K) in fp32, beside sinks that can be expanded to (…, Q, 1)."""
    if sinks is None:
        return scores.softmax(dim=-1)
    both = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    return both.softmax(dim=-1)[..., :-1]


def _rows(query: Tensor, repeats: int) -> Tensor:
    """Reshape (1, H, 1, D) to (1, H / repeats, repeats, D): heads that share keys become rows of one query."""
    return query.reshape(1, query.shape[1] // repeats, repeats, query.shape[3])
