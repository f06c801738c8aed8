"""OLMo 2 and 3, and EXAONE 4: transformers' olmo2, olmo3 and exaone4. Norms come after each part, none before.

GGUF calls both OLMo olmo2; OLMo 3 has sliding windows. Its norms of q and k are of all heads together.
"""

from __future__ import annotations

from typing import Any

from q6k_kernels.models.architecture import FULL, SLIDING, Architecture, Values, biases
from q6k_kernels.models.hyperparameters import WINDOW, Keys, Shapes, rope, scaled_rope
from q6k_kernels.models.layer import NORMS_AFTER, HeadNorms, Rotation
from q6k_kernels.models.windows import windows

_LAYERS_OF_32B = 64
"""Only the model of as many layers has windows, as in llama.cpp; its global layers have no rotary embeddings."""


def _olmo2(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    whole = scaled_rope(keys)
    if not keys.integer(WINDOW, 0, 1 << 31, 0):
        return "olmo2", {"rope_parameters": whole, **biases(shapes)}
    # Only layers that see the whole context have scaled positions.
    base = {**rope(keys), "rope_theta": keys.real("rope.freq_base_swa", 1.0, 1e12, whole["rope_theta"])}
    return "olmo3", {
        "rope_parameters": {FULL: whole, SLIDING: base},
        **windows(keys, values, period=4, window=0),
        **biases(shapes),
    }


def _exaone4(keys: Keys, _: Shapes, values: Values) -> tuple[str, Values]:
    if values["num_hidden_layers"] == _LAYERS_OF_32B:
        slides = windows(keys, values, period=4, window=4096)
    else:
        keys.integer(WINDOW, 0, 1 << 31, 0)
        slides = {"sliding_window": None, "layer_types": [FULL] * values["num_hidden_layers"]}
    return "exaone4", {"rope_parameters": scaled_rope(keys), **slides}


def _rotates(attention: Any) -> bool:
    return attention.sliding_window is None or attention.is_sliding


ROWS = (
    Architecture(
        "olmo2",
        _olmo2,
        used=frozenset({WINDOW}),
        norms=NORMS_AFTER,
        head_norms=HeadNorms(part="projection"),
    ),
    Architecture(
        "exaone4",
        _exaone4,
        used=frozenset({WINDOW}),
        frequency_factors=True,
        norms=NORMS_AFTER,
        head_norms=HeadNorms(),
        rotation=Rotation(rotates=_rotates),
    ),
)
