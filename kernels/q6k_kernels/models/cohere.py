"""Command R and Aya, and Command R7B and A: transformers' cohere and cohere2.

Attention and feed-forward network read the same norm, which subtracts the mean. Neighbours rotate, in transformers
too; in cohere2 only in layers with a window. Logits have a factor.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from q6k_kernels.models.architecture import Architecture, Values, biases
from q6k_kernels.models.hyperparameters import LOGIT_SCALE, WINDOW, Keys, Shapes, scaled_rope
from q6k_kernels.models.layer import LayerNorms, Rotation
from q6k_kernels.models.sizes import sizes
from q6k_kernels.models.windows import windows


def _cohere(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    return "cohere", {
        "rope_parameters": scaled_rope(keys),
        "layer_norm_eps": values["rms_norm_eps"],
        # 0 is llama.cpp's number for none.
        "logit_scale": keys.real(LOGIT_SCALE, 0.0, 1e6, 0.0) or 1.0,
        "use_qk_norm": False,
        **biases(shapes),
    }


def _cohere2(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    return "cohere2", {
        "rope_parameters": scaled_rope(keys),
        "layer_norm_eps": values["rms_norm_eps"],
        "logit_scale": keys.real(LOGIT_SCALE, 0.0, 1e6) or 1.0,
        **windows(keys, values, period=4, window=0),
        **biases(shapes),
    }


def _has_window(attention: Any) -> bool:
    return attention.sliding_window is not None


_COHERE = Architecture(
    "command-r",
    _cohere,
    sizes=partial(sizes, epsilon="attention.layer_norm_epsilon"),
    used=frozenset({LOGIT_SCALE}),
    norms=LayerNorms(between="", parallel=True, centred=True),
    scaled_logits=True,
    rotation=Rotation(neighbours=True, angles="neighbours"),
)
ROWS = (
    _COHERE,
    replace(
        _COHERE,
        name="cohere2",
        describe=_cohere2,
        used=frozenset({LOGIT_SCALE, WINDOW}),
        rotation=replace(_COHERE.rotation, rotates=_has_window),
    ),
)
