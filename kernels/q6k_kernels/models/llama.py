"""Llama 1 to 3.x, Mistral and similar models: transformers' llama, mistral and ministral3.

llama.cpp writes Mistral models as `llama`; one with a sliding window in its metadata becomes transformers' mistral.
`mistral3` is Mistral Small 3.1, which is a llama, and Ministral 3, whose queries grow with their position.
The rows of q and k are not in transformers' order (see `stored`); Llama 3.1 and later have `rope_freqs.weight`.
"""

from __future__ import annotations

from dataclasses import replace

from q6k_kernels.models.architecture import Architecture, Values, biases
from q6k_kernels.models.hyperparameters import (
    TEMPERATURE,
    WINDOW,
    YARN_SCALE,
    Keys,
    Shapes,
    original_context,
    scaled_rope,
)
from q6k_kernels.models.stored import INTERLEAVED_HEADS


def _describe(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    values: Values = {"rope_parameters": scaled_rope(keys)}
    if window := keys.integer(WINDOW, 0, 1 << 31, 0):
        return "mistral", values | {"sliding_window": window}
    return "llama", values | biases(shapes) | {"mlp_bias": "blk.0.ffn_up.bias" in shapes}


def _mistral3(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    growth = keys.real(TEMPERATURE, 0.0, 1e3, 0.0)
    rope = scaled_rope(keys)
    if rope["rope_type"] == "yarn" and (scale := keys.real(YARN_SCALE, 0.0, 1e3, 0.0)):
        rope |= {"mscale": 1.0, "mscale_all_dim": scale}
    if not growth:
        kind, more = _describe(keys, shapes, values)
        return kind, more | {"rope_parameters": rope}
    rope |= {"llama_4_scaling_beta": growth, "original_max_position_embeddings": original_context(keys)}
    return "ministral3", {"rope_parameters": rope}


_LLAMA = Architecture(
    "llama",
    _describe,
    used=frozenset({WINDOW}),
    stored=INTERLEAVED_HEADS,
    frequency_factors=True,
)
ROWS = (
    _LLAMA,
    replace(_LLAMA, name="mistral", tensor_names="llama"),
    replace(
        _LLAMA,
        name="mistral3",
        describe=_mistral3,
        used=frozenset({TEMPERATURE, YARN_SCALE}),
        growing_queries=True,
    ),
)
