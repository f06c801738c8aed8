"""Compute the loss of a model on a text, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from q6k_convert.run.running import Cache

if TYPE_CHECKING:
    from q6k_kernels.tokenizer.text_tokenizer import Tokenizer

ROWS_AT_ONCE = 64
"""Tokens whose logits are converted to float32 at a time."""


def windows_of(tokenizer: Tokenizer, text: str, length: int) -> list[list[int]]:
    """Return the tokens of a text in windows; see `windows`."""
    bos = tokenizer.bos_id
    return windows([token for token in tokenizer.encode(text) if token != bos], bos, length)


def windows(ids: list[int], bos: int | None, length: int) -> list[list[int]]:
    """Return token ids in windows of `length`, each after BOS; the last may be shorter, with at least two."""
    before = [] if bos is None else [bos]
    step = length - len(before)
    found = [[*before, *ids[at : at + step]] for at in range(0, len(ids), step)]
    return [window for window in found if len(window) > 1]


@torch.no_grad()
def losses(
    model: Any,
    windows: list[list[int]],
    tell: Callable[[int, float], None] = lambda _done, _mean: None,
    cache_type: Cache = "model",
) -> Tensor:
    """Return -log of each token's probability, float64 (tokens,) on the CPU, without each window's first token.

    Args:
        model: a causal language model of transformers.
        windows: token ids, two or more in each.
        tell: called after each window with the number of windows done, and the mean so far.
        cache_type: of another than the model's numbers, what our own passes compute with such a cache.
    """
    logits_of: Callable[[list[int]], Iterable[Tensor]] = partial(_without_cache, model)
    if cache_type != "model":
        from q6k_kernels.generate.reading import Reader

        logits_of = Reader(model, max(map(len, windows)), cache_type).logits
    found, total, count = list[Tensor](), 0.0, 0
    for done, window in enumerate(windows, 1):
        wanted, at = torch.tensor(window[1:], device=model.device), 0
        for logits in logits_of(window):
            for rows in torch.split(logits[: len(wanted) - at], ROWS_AT_ONCE):
                part = torch.nn.functional.cross_entropy(
                    rows.float(), wanted[at : at + len(rows)], reduction="none"
                )
                found.append(part.double().cpu())
                at, total, count = at + len(rows), total + float(found[-1].sum()), count + len(rows)
        tell(done, total / count)
    return torch.cat(found)


def _without_cache(model: Any, window: list[int]) -> Iterable[Tensor]:
    yield model(input_ids=torch.tensor([window], device=model.device), use_cache=False).logits[0]


def perplexity_of(mean: float) -> float:
    """Return the perplexity per token for a mean loss; 1 is the least."""
    return math.exp(mean) if mean < 700 else math.inf if mean > 0 else math.nan


def summary(found: Tensor) -> dict[str, float]:
    """Return the perplexity of losses, and its standard error by their spread."""
    perplexity = perplexity_of(float(found.mean()))
    spread = float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return {"perplexity": perplexity, "perplexity_error": perplexity * spread}
