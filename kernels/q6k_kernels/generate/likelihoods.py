"""How likely the model itself finds the tokens of its answer.

The steps note it on the device, by position; the host reads it when the answer is complete.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Likelihood:
    """How likely the model found a token of the text, before penalties, temperature and filters.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        likeliest: ids and logarithms of the likeliest tokens in its place, the likeliest first.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


class Likelihoods:
    """The likelihoods of all chosen tokens, by position, written by the steps.

    Args:
        positions: number of positions.
        likeliest: number of likeliest tokens to note for each, 0 to the size of the vocabulary.
        device: device of the steps.
    """

    def __init__(self, positions: int, likeliest: int, device: torch.device) -> None:
        self._count = likeliest
        self._chosen = torch.zeros(positions, device=device)
        self._best = torch.zeros(positions, likeliest, device=device)
        self._best_ids = torch.zeros(positions, likeliest, dtype=torch.int64, device=device)

    def note(self, logits: Tensor, token: Tensor, position: Tensor) -> None:
        """Note the likelihood of a chosen token, int64 (1,), at its position, int64 (1,); `logits` are (1, V)."""
        logs = logits.float().log_softmax(dim=-1)
        self._chosen.index_copy_(0, position, logs[0].index_select(0, token))
        if self._count:
            best = logs.topk(self._count, dim=-1)
            self._best.index_copy_(0, position, best.values)
            self._best_ids.index_copy_(0, position, best.indices)

    def read(self, start: int, tokens: list[int]) -> list[Likelihood]:
        """Return the likelihoods of tokens, the first of which is at the position `start`; waits for the device."""
        rows = slice(start, start + len(tokens))
        logs, best, ids = (each[rows].tolist() for each in (self._chosen, self._best, self._best_ids))
        return [
            Likelihood(token, log, tuple(zip(row_ids, row, strict=True)))
            for token, log, row, row_ids in zip(tokens, logs, best, ids, strict=True)
        ]
