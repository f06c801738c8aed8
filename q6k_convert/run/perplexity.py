"""Compute the loss of a model on a text, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS_AT_ONCE = 64
"""Tokens whose logits are converted to float32 at a time."""


def losses(model: Any, windows: list[list[int]]) -> Tensor:
    """Return -log of each token's probability, float64 (tokens,) on the CPU, without each window's first token."""
    found = []
    for window in windows:
        ids = torch.tensor([window], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        for at in range(0, len(logits), ROWS_AT_ONCE):
            rows = logits[at : at + ROWS_AT_ONCE].float()
            wanted = ids[0, at + 1 : at + 1 + len(rows)]
            found.append(torch.nn.functional.cross_entropy(rows, wanted, reduction="none").double().cpu())
    return torch.cat(found)
