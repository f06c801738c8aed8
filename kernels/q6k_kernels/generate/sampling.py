"""Choosing the next token on the device: the best, or a random one by its probability.

Random choices use Gumbel noise: the maximum of logit / temperature + noise is a draw from the softmax. The noise is
a function of seed, position and token only, so it is the same in eager mode, compiled and in a CUDA graph.

A model's `generation_config.suppress_tokens` are never chosen: image tokens, say, which no text may contain.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from q6k_kernels.generate.filters import Filters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOW = 0xFFFFFFFF
LOWEST = 2.0**-20
"""The lowest temperature that tokens are drawn at; below it the likeliest is taken, as nearly every draw would."""
ROWS = 512
"""Parts of the vocabulary that are searched in parallel: the greatest common divisor of this and its size."""


def settled(temperature: float) -> float:
    """Return the temperature, or 0 if it is below `LOWEST`: logits divided by it might not be finite."""
    return temperature if temperature >= LOWEST else 0.0


def suppression(model: PreTrainedModel) -> Tensor | None:
    """Return which tokens a model must not choose, bool (V up to a multiple of 8,); None if it may choose all."""
    config: Any = model.generation_config
    if not config.suppress_tokens:
        return None
    size: int = model.config.get_text_config(decoder=True).vocab_size
    found = torch.zeros(-(-size // 8) * 8, dtype=torch.bool, device=model.device)
    found[config.suppress_tokens] = True
    return found


def choose(
    logits: Tensor,
    position: Tensor,
    seed: Tensor,
    temperature: Tensor | None,
    suppressed: Tensor | None = None,
    filters: Filters | None = None,
    text: Tensor | None = None,
) -> Tensor:
    """Choose the next token.

    Args:
        logits: float32 (1, V).
        position: int64 (1,), position of the token to be chosen.
        seed: int64 (1,), 0 to 2^32 - 1.
        temperature: float32 (1,), above 0; None for the best token.
        suppressed: tokens that must not be chosen, see `suppression`; some must be left.
        filters: what else decides, or None.
        text: the tokens by position, int64 (positions,); filters that penalise need it.

    Returns:
        int64 (1,).
    """
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    if suppressed is not None:
        logits = logits.masked_fill(suppressed[: logits.shape[-1]], -math.inf)
    if filters is not None and filters.penalises and text is not None:
        logits = filters.penalised(logits, text, position)
    if temperature is not None:
        scores = logits / temperature
        if filters is not None and filters.cuts:
            scores = filters.kept(scores)
        logits = scores + gumbel_noise(tokens, position, seed)
    # `argmax` as reductions of many rows, which use the whole GPU; one long row would not. If a logit is NaN, no
    # token equals the maximum: then the last token is chosen, so that the next step stays within bounds.
    rows = math.gcd(logits.shape[-1], ROWS)
    best = logits == logits.view(rows, -1).amax(dim=-1).amax()
    chosen = torch.where(best, tokens, logits.shape[-1] - 1)
    return chosen.view(rows, -1).amin(dim=-1).amin(dim=0, keepdim=True)


def gumbel_noise(tokens: Tensor, position: Tensor, seed: Tensor) -> Tensor:
    """Return independent draws from the Gumbel distribution, float32 (V,), each made from 32 bits."""
    key = _mixed(_mixed(seed + 0x9E3779B9) ^ position)
    bits = _mixed(_mixed(tokens ^ key) + key)
    # Small values decide, and floats are precise there; 1 itself would give an infinite draw.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mixed(x: Tensor) -> Tensor:
    """Mix the bits of 32-bit numbers in int64: a bijection in which each bit depends on all."""
    x = x & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)
