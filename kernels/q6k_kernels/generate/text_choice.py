"""The choice of the next tokens of several texts, each with settings of its own, in plain torch.

A text's tokens are those that `sampling.choose` finds for it alone from the same logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from q6k_kernels.generate.filters import FiltersOfTexts
from q6k_kernels.generate.sampling import gumbel_noise


@dataclass(frozen=True)
class TextsChoice:
    """The tensors of the choice, by place but for `places`.

    Attributes:
        places: of which texts tokens are chosen, int64 (M,), all different.
        advances: 1 in places with a text that goes on, 0 in others, int64 (P,).
        position: positions of the last tokens, int64 (P,); advanced to those of the chosen tokens.
        token: the last tokens, int64 (P,); replaced by the chosen ones.
        chosen: the tokens by position, int64 (P, positions).
        seed: seeds of random choices, int64 (P,).
        temperature: float32 (P,), 0 for the best token; None if that is so of all.
        suppressed: tokens that must not be chosen, bool (P, V up to a multiple of 8), or None.
        filters: what else decides, of all places, or None.
    """

    places: Tensor
    advances: Tensor
    position: Tensor
    token: Tensor
    chosen: Tensor
    seed: Tensor
    temperature: Tensor | None
    suppressed: Tensor | None = None
    filters: FiltersOfTexts | None = None


def choose(logits: Tensor, choice: TextsChoice) -> None:
    """Choose the next tokens, and write them to the tensors of `choice`.

    Args:
        logits: float32 (M, V).
        choice: the tensors.
    """
    places = choice.places
    size, following = logits.shape[-1], (choice.position + choice.advances)[places]
    if choice.suppressed is not None:
        logits = logits.masked_fill(choice.suppressed[places, :size], -math.inf)
    filters = None if choice.filters is None else choice.filters.of(places)
    if filters is not None:
        logits = filters.penalised(logits, choice.chosen[places], following)
    tokens = torch.arange(size, device=logits.device)
    if choice.temperature is not None:
        temperature = choice.temperature[places, None]
        drawn = temperature > 0
        scores = logits / torch.where(drawn, temperature, 1)
        if filters is not None:
            scores = filters.kept(scores)
        noise = gumbel_noise(tokens, following[:, None], choice.seed[places, None])
        logits = torch.where(drawn, scores + noise, logits)
    # If a logit is NaN, no token equals the maximum: then the last token is chosen, as in `sampling.choose`.
    best = logits == logits.amax(dim=-1, keepdim=True)
    token = torch.where(best, tokens, size - 1).amin(dim=-1)
    choice.chosen[places, following] = token
    choice.token[places] = token
    choice.position[places] = following
