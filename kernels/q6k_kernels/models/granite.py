"""Granite 3 and the dense models of Granite 4: transformers' granite, a Llama with four numbers.

They multiply the embedding's rows, the scores, and what a layer adds to its input, and divide the logits.
"""

from __future__ import annotations

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models.architecture import Architecture, Values, biases
from q6k_kernels.models.hyperparameters import (
    EMBEDDING_SCALE,
    LOGIT_SCALE,
    ONLY_FUNCTIONS,
    RESIDUAL_SCALE,
    SCORE_SCALE,
    Keys,
    Shapes,
    scaled_rope,
)
from q6k_kernels.models.stored import INTERLEAVED_HEADS

_ROTATED = "rope.scaling.finetuned"


def _granite(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    if keys.value(_ROTATED) is False:
        raise UnsupportedModelError(
            f"{keys.metadata.path}: {keys.prefix}.{_ROTATED} = False: it is built with rotary embeddings",
            ONLY_FUNCTIONS,
        )
    return "granite", {
        "rope_parameters": scaled_rope(keys),
        # 0 is llama.cpp's number for none.
        "attention_multiplier": keys.real(SCORE_SCALE, 0.0, 1e6, 0.0) or values["head_dim"] ** -0.5,
        "embedding_multiplier": keys.real(EMBEDDING_SCALE, 0.0, 1e6, 0.0) or 1.0,
        "residual_multiplier": keys.real(RESIDUAL_SCALE, 0.0, 1e6, 0.0) or 1.0,
        "logits_scaling": keys.real(LOGIT_SCALE, 1e-6, 1e6),
        **biases(shapes),
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }


ROWS = (
    Architecture(
        "granite",
        _granite,
        used=frozenset({SCORE_SCALE, EMBEDDING_SCALE, RESIDUAL_SCALE, LOGIT_SCALE}),
        stored=INTERLEAVED_HEADS,
        frequency_factors=True,
        multipliers=True,
    ),
)
