"""Qwen 2, 2.5 and 3 without mixtures of experts: transformers' qwen2 and qwen3."""

from __future__ import annotations

from q6k_kernels.models.architecture import Architecture, Values, biases
from q6k_kernels.models.hyperparameters import Keys, Shapes, scaled_rope


def _qwen2(keys: Keys, _shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "qwen2", {"rope_parameters": scaled_rope(keys)}


def _qwen3(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "qwen3", {"rope_parameters": scaled_rope(keys)} | biases(shapes)


ROWS = (Architecture("qwen2", _qwen2), Architecture("qwen3", _qwen3, head_norms=True))
