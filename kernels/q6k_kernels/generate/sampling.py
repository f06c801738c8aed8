"""Choosing the next token on the device: the best, or a random one by its probability.

Random choices are Gumbel's: the best of logit / temperature + noise is a draw from the softmax. The noise is a
function of seed, position and token, of nothing else: the same in eager mode, compiled and in a CUDA graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
ROWS = 512
"""Parts of the vocabulary that are searched apart, if its size is a multiple; else as many as divide both."""


def choose(logits: Tensor, position: Tensor, seed: Tensor, temperature: Tensor | None) -> Tensor:
    """The next token.

    Args:
        logits: float32 (1, V).
        position: int64 (1,), of the token to be chosen.
        seed: int64 (1,), 0 to 2^32 - 1.
        temperature: float32 (1,), above 0; None for the best token.

    Returns:
        int64 (1,).
    """
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    if temperature is not None:
        logits = logits / temperature + gumbel_noise(tokens, position, seed)
    # `argmax`, as reductions of many rows, which are spread over a GPU as one is not. The last token, if none is
    # the best because some are not numbers, so that what follows stays within bounds.
    rows = math.gcd(logits.shape[-1], ROWS)
    best = logits == logits.view(rows, -1).amax(dim=-1).amax()
    chosen = torch.where(best, tokens, logits.shape[-1] - 1)
    return chosen.view(rows, -1).amin(dim=-1).amin(dim=0, keepdim=True)


def gumbel_noise(tokens: Tensor, position: Tensor, seed: Tensor) -> Tensor:
    """Independent draws of Gumbel's distribution, float32 (V,), each from 32 bits."""
    key = _mixed(_mixed(seed + 0x9E3779B9) ^ position)
    bits = _mixed(_mixed(tokens ^ key) + key)
    # Small values decide, and there floats are fine; 1 itself would be an infinite wait.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, in int64, every bit of which depends on every other."""
    x = x & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)
