"""Layers with sliding windows, by llama.cpp's rules: which they are, and the size of their window."""

from __future__ import annotations

from q6k_kernels.models.architecture import FULL, SLIDING, Values
from q6k_kernels.models.hyperparameters import WINDOW, WINDOW_PATTERN, Keys


def windows(keys: Keys, values: Values, period: int, window: int) -> Values:
    """Return the window and the kind of each layer: all but the last of each `period` have a window.

    Args:
        keys: the keys; they may state the window, and the period or the layers.
        values: the common values.
        period: the period by default.
        window: positions of a window by default; 0 for none.
    """
    layers = values["num_hidden_layers"]
    window = keys.integer(WINDOW, 0, 1 << 31, window)
    if isinstance(keys.value(WINDOW_PATTERN), list):
        slides = keys.flags_of_layers(WINDOW_PATTERN) or []
    else:
        period = keys.integer(WINDOW_PATTERN, 0, 1 << 16, period)
        # In llama.cpp 0 means no period: all layers slide.
        slides = [period == 0 or (layer + 1) % period != 0 for layer in range(layers)]
    slides = [slide and window > 0 for slide in slides]
    return {
        # transformers wants a window even if no layer slides.
        "sliding_window": window or values["max_position_embeddings"],
        "layer_types": [SLIDING if slide else FULL for slide in slides],
    }
