"""The logits after every token of a text, computed by our own passes with a cache: what a perplexity is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from q6k_kernels.generate.cache_codes import CacheType
from q6k_kernels.generate.kv_cache import KeyValueCache
from q6k_kernels.generate.stepping import step_for
from q6k_kernels.models.rotary import plan_for, rotaries

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reader:
    """Reads texts with a cache, as prompts are read.

    Args:
        model: a model from `load_model`.
        capacity: tokens of the longest text.
        cache_type: see `cache_codes`.
        chunk: the most tokens in one pass.

    Raises:
        UnsupportedModelError: our passes do not support a layer of the model.
    """

    def __init__(
        self, model: PreTrainedModel, capacity: int, cache_type: CacheType = "model", chunk: int = 512
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        self._cache = KeyValueCache(config, capacity, model.device, cache_type=cache_type)
        self._rotaries, self._chunk = rotaries(model), chunk
        with plan_for(self._rotaries, capacity):
            step = step_for(model, self._cache, model.device, fused=True)
        assert step is not None  # noqa: S101 -- it had to be ours
        self._step = step

    def logits(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Yield the logits after each token of a text, float32 (M, V), a chunk of it at a time."""
        tokens = torch.tensor(ids, dtype=torch.int64, device=self._cache.device)
        self._cache.forget()
        for start in range(0, len(ids), self._chunk):
            with plan_for(self._rotaries, self._cache.capacity):
                logits = self._step.chunk(tokens[start : start + self._chunk], start, last=False, every=True)
            assert logits is not None  # noqa: S101 -- all are wanted
            yield logits
