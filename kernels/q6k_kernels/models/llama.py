"""Llama 1 to 3.x, Mistral and similar models: transformers' llama and mistral.

llama.cpp writes Mistral models as `llama`; one with a sliding window in its metadata becomes transformers' mistral.
The rows of q and k are not in transformers' order (see `stored`); Llama 3.1 and later have `rope_freqs.weight`.
"""

from __future__ import annotations

from dataclasses import replace

from q6k_kernels.models.architecture import Architecture, Values, biases
from q6k_kernels.models.hyperparameters import WINDOW, Keys, Shapes, scaled_rope
from q6k_kernels.models.stored import INTERLEAVED


def _describe(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    values: Values = {"rope_parameters": scaled_rope(keys)}
    if window := keys.integer(WINDOW, 0, 1 << 31, 0):
        return "mistral", values | {"sliding_window": window}
    return "llama", values | biases(shapes) | {"mlp_bias": "blk.0.ffn_up.bias" in shapes}


_LLAMA = Architecture(
    "llama",
    _describe,
    used=frozenset({WINDOW}),
    stored={f"attn_{each}.{kind}": INTERLEAVED for each in "qk" for kind in ("weight", "bias")},
    frequency_factors=True,
)
ROWS = (_LLAMA, replace(_LLAMA, name="mistral", tensor_names="llama"))
