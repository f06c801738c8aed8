"""Checks of what a model is given and returns, and their errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from q6k_kernels.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CapacityError(ValueError):
    """The text would be longer than the cache."""


class NotFiniteError(ModelError):
    """The model's logits are infinite or NaN."""


def check_ids(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Check that there are ids, and that the model knows them.

    Raises:
        ValueError: no ids, or one outside the vocabulary.
    """
    embedding: Any = model.get_input_embeddings()
    size = embedding.num_embeddings
    if not ids or min(ids) < 0 or max(ids) >= size:
        found = f"{min(ids)} to {max(ids)}" if ids else "none"
        raise ValueError(f"ids: expected one or more of 0 to {size - 1}, found {found}")


def check_room(length: int, capacity: int) -> None:
    """Check that a text fits into the cache.

    Raises:
        CapacityError: it does not.
    """
    if length > capacity:
        raise CapacityError(f"{length} tokens, and the cache holds {capacity}: make it with more capacity")


def check_finite(logits: Tensor, dtype: torch.dtype) -> None:
    """Check logits of a model of a dtype; waits for the device.

    Raises:
        NotFiniteError: some are infinite or NaN.
    """
    if not bool(torch.isfinite(logits).all()):
        raise NotFiniteError(
            f"the model's logits are infinite or not numbers in {dtype}",
            "Take bfloat16 or float32 if this is float16, which is too narrow for some models; else verify the "
            "bundle.",
        )
