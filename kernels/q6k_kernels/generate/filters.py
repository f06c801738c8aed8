"""What tokens are left to draw from.

The order is that of transformers: penalty, temperature, then the likeliest `top_k`, of these the likeliest that
have `top_p` together, of these all that have `min_p` of the best. llama.cpp divides by the temperature last.

Each filter is a lowest score, so tokens of the same score stay or go together, and the result does not depend on
how a sort orders them. Probabilities are summed as whole numbers, whose sum is the same in any order. All
shapes are fixed and nothing waits for the device, so a CUDA graph can record it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LIMIT = 2.0**20
"""The most that a logit may be divided by or multiplied with, so that none becomes infinite."""
MOST_POSITIONS = 1 << 62
"""More positions than any text has."""
_ONE = 2.0**40
"""Whole number that stands for the likeliest token's weight. The sum of 2^20 such fits 64 bits."""


@dataclass(frozen=True)
class Filters:
    """Settings that change which tokens can be drawn; by default none.

    Attributes:
        top_k: draw from so many likeliest tokens; 0 for all.
        top_p: draw from the likeliest tokens that together have this share of the probability, 0 to 1.
        min_p: draw from tokens that are at least this share as likely as the likeliest, 0 to 1.
        repeat_penalty: divide the positive logits of tokens that the text has, and multiply the negative ones, by
            this number, 2^-20 to 2^20.
        repeat_last: penalise only tokens among so many last ones; None for the whole text.

    Raises:
        ValueError: a setting is out of its range.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last: int | None = None

    def __post_init__(self) -> None:
        penalty, last = self.repeat_penalty, self.repeat_last
        shares = 0 <= self.top_p <= 1 and 0 <= self.min_p <= 1
        if self.top_k < 0 or not shares or not 1 / LIMIT <= penalty <= LIMIT or (last is not None and last < 0):
            raise ValueError(
                f"expected top_k and repeat_last of 0 or more, top_p and min_p of 0 to 1 and a penalty of "
                f"2^-20 to 2^20; found {self}"
            )

    @property
    def penalises(self) -> bool:
        """Whether tokens of the text become less likely, or more."""
        return self.repeat_penalty != 1.0 and self.repeat_last != 0

    @property
    def cuts(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def matter(self, temperature: float) -> bool:
        """Check whether the settings change any choice; without a temperature, no cut does."""
        return self.penalises or (self.cuts and temperature > 0)

    def penalised(self, logits: Tensor, text: Tensor, position: Tensor) -> Tensor:
        """Return the logits after the penalty.

        Args:
            logits: float32 (1, V).
            text: the tokens by position, int64 (positions,).
            position: int64 (1,), position of the token to be chosen.
        """
        penalty = torch.full((1, 1), self.repeat_penalty, device=logits.device)
        last = len(text) if self.repeat_last is None else min(self.repeat_last, len(text))
        return _penalised(logits, text[None], position[:, None], penalty, last)

    def kept(self, scores: Tensor) -> Tensor:
        """Return the scores with -inf for tokens that cannot be drawn.

        Args:
            scores: logits divided by the temperature, float32 (1, V).
        """
        return torch.where(scores >= self._lowest(scores), scores, -math.inf)

    def cut(self, logits: Tensor, temperature: float, suppressed: Tensor | None) -> Tensor:
        """Return which tokens cannot be drawn, bool (V up to a multiple of 8,), for the kernel that draws.

        Args:
            logits: float32 (1, V).
            temperature: above 0.
            suppressed: tokens that must not be chosen in any case, bool (V or more,), or None.
        """
        size = logits.shape[-1]
        hidden = None if suppressed is None else suppressed[:size]
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        scores = logits / torch.full((1,), temperature, device=logits.device)
        found = (scores < self._lowest(scores))[0]
        return pad(found if hidden is None else found | hidden, (0, -size % 8))

    def _lowest(self, scores: Tensor) -> Tensor:
        """Return the lowest score of a token that can be drawn, (1, 1)."""
        best = scores.amax(dim=-1, keepdim=True)
        lowest = torch.full_like(best, -math.inf)
        if self.top_k or self.top_p < 1:
            ordered = self._ordered(scores)
            if self.top_k:
                lowest = ordered[:, -1:]
            if self.top_p < 1:
                lowest = _lowest_of_share(scores, ordered, best, lowest, self.top_p)
        if self.min_p:
            lowest = torch.maximum(lowest, best + math.log(self.min_p))
        return lowest

    def _ordered(self, scores: Tensor) -> Tensor:
        """Return the scores from the highest on, as many as can matter."""
        if 0 < self.top_k < scores.shape[-1]:
            return scores.topk(self.top_k, dim=-1).values
        return scores.sort(dim=-1, descending=True).values


@dataclass(frozen=True)
class FiltersOfTexts:
    """The settings of `Filters` of several texts, a number for each, on one device.

    Attributes:
        top_k: int64 (M,).
        top_p: float64 (M,).
        min_p: natural logarithms of the shares, float32 (M,).
        repeat_penalty: float32 (M,).
        repeat_last: int64 (M,); for the whole text the most positions.
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repeat_penalty: Tensor
    repeat_last: Tensor

    @classmethod
    def none(cls, count: int, device: torch.device) -> FiltersOfTexts:
        """Return settings that change nothing."""
        whole = torch.zeros(2, count, dtype=torch.int64, device=device)
        parts = torch.zeros(2, count, device=device)
        top_p = torch.zeros(count, dtype=torch.float64, device=device)
        found = FiltersOfTexts(whole[0], top_p, parts[0], parts[1], whole[1])
        for at in range(count):
            found.put(at, Filters())
        return found

    def put(self, at: int, filters: Filters) -> None:
        """Replace the settings of one text."""
        self.top_k[at] = filters.top_k
        self.top_p[at] = filters.top_p
        self.min_p[at] = math.log(filters.min_p) if filters.min_p else -math.inf
        self.repeat_penalty[at] = filters.repeat_penalty
        self.repeat_last[at] = MOST_POSITIONS if filters.repeat_last is None else filters.repeat_last

    def of(self, texts: Tensor) -> FiltersOfTexts:
        """Return the settings of some texts, int64 (n,)."""
        every = self.top_k, self.top_p, self.min_p, self.repeat_penalty, self.repeat_last
        return FiltersOfTexts(*(each[texts] for each in every))

    def penalised(self, logits: Tensor, texts: Tensor, position: Tensor) -> Tensor:
        """Return the logits after the penalties.

        Args:
            logits: float32 (M, V).
            texts: the tokens by position, int64 (M, positions).
            position: int64 (M,), positions of the tokens to be chosen.
        """
        penalty, last = self.repeat_penalty[:, None], self.repeat_last[:, None]
        return _penalised(logits, texts, position[:, None], penalty, last)

    def kept(self, scores: Tensor) -> Tensor:
        """Return the scores, float32 (M, V), with -inf for tokens that cannot be drawn; see `Filters.kept`."""
        best, ordered = scores.amax(dim=-1, keepdim=True), scores.sort(dim=-1, descending=True).values
        size, top_k, top_p = scores.shape[-1], self.top_k[:, None], self.top_p[:, None]
        lowest = ordered.gather(1, torch.where(top_k > 0, top_k, size).clamp(max=size) - 1)
        of_share = _lowest_of_share(scores, ordered, best, lowest, top_p)
        lowest = torch.where(top_p < 1, of_share, lowest)
        lowest = torch.maximum(lowest, best + self.min_p[:, None])
        return torch.where(scores >= lowest, scores, -math.inf)


def _penalised(logits: Tensor, texts: Tensor, position: Tensor, penalty: Tensor, last: Tensor | int) -> Tensor:
    """Return the logits after the penalties.

    Args:
        logits: float32 (M, V).
        texts: the tokens by position, int64 (M, positions).
        position: int64 (M, 1), positions of the tokens to be chosen.
        penalty: float32 (M, 1).
        last: int64 (M, 1), or one number for all: so many last tokens count.
    """
    size, at = logits.shape[-1], torch.arange(texts.shape[1], device=texts.device)
    counted = (at < position) & (at >= position - last)
    seen = torch.zeros(len(texts), size + 1, dtype=torch.bool, device=texts.device)
    # What does not count goes to a place behind the vocabulary.
    seen.scatter_(1, torch.where(counted, texts, size).clamp(max=size), True)
    return torch.where(seen[:, :size], torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _lowest_of_share(
    scores: Tensor, ordered: Tensor, best: Tensor, lowest: Tensor, top_p: float | Tensor
) -> Tensor:
    """Return the lowest score of the likeliest tokens that together have a share of the probability, (M, 1).

    Args:
        scores: float32 (M, V).
        ordered: the scores from the highest on, as many as can matter.
        best: the highest scores, (M, 1).
        lowest: lowest scores of tokens that count, (M, 1).
        top_p: the share, or those of the rows, float64 (M, 1).
    """
    total = torch.where(scores >= lowest, _weights(scores, best), 0).sum(dim=-1, keepdim=True)
    weights = _weights(ordered, best)
    before = weights.cumsum(dim=-1) - weights
    count = (before.double() < top_p * total.double()).sum(dim=-1, keepdim=True)
    return ordered.gather(1, (count - 1).clamp(min=0))


def _weights(scores: Tensor, best: Tensor) -> Tensor:
    """Return probabilities as whole numbers, int64, of which `_ONE` is that of the best."""
    return (torch.exp(scores - best).double() * _ONE).long()
