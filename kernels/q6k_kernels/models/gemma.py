"""Gemma 1 and 2, and the text part of Gemma 3: transformers' gemma, gemma2 and gemma3_text.

GGUF stores the weights of norms with 1 added. Where a file is silent, windows, soft caps and scales follow
llama.cpp's rules.
"""

from __future__ import annotations

from q6k_kernels.models.architecture import FULL, SLIDING, Architecture, Values, biases
from q6k_kernels.models.hyperparameters import (
    LOGIT_CAP,
    SCORE_CAP,
    SCORE_SCALE,
    WINDOW,
    Keys,
    Shapes,
    rope,
    scaled_rope,
)
from q6k_kernels.models.layer import NORMS_AROUND, HeadNorms
from q6k_kernels.models.windows import windows


def _gemma(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "gemma", {"rope_parameters": scaled_rope(keys), **biases(shapes)}


def _gemma2(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    return "gemma2", {
        "rope_parameters": scaled_rope(keys),
        "attn_logit_softcapping": _softcap(keys, SCORE_CAP, 50.0),
        "final_logit_softcapping": _softcap(keys, LOGIT_CAP, 30.0),
        "query_pre_attn_scalar": _attention_scalar(keys, values, layers_of_27b=46),
        **windows(keys, values, period=2, window=4096),
        **biases(shapes),
    }


def _gemma3(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    ropes = {
        # Only global layers see the whole context, so only their positions are scaled.
        FULL: scaled_rope(keys),
        SLIDING: rope(keys, "rope.freq_base_swa"),
    }
    return "gemma3_text", {
        "rope_parameters": ropes,
        "final_logit_softcapping": _softcap(keys, LOGIT_CAP, 0.0),
        "query_pre_attn_scalar": _attention_scalar(keys, values, layers_of_27b=62),
        **windows(keys, values, period=6, window=0),
        **biases(shapes),
    }


def _softcap(keys: Keys, key: str, default: float) -> float | None:
    return keys.real(key, 0.0, 1e6, default) or None


def _attention_scalar(keys: Keys, values: Values, layers_of_27b: int) -> int:
    """Return the number whose root divides scores. Most files omit it; 27B models are told by their layers."""
    if SCORE_SCALE in keys:
        scalar = keys.real(SCORE_SCALE, 1e-6, 1.0) ** -2
        if abs(scalar - round(scalar)) > 1e-3 * scalar:
            raise keys.wrong(
                SCORE_SCALE, f"expected the root of a whole number, inverted; found {scalar:g} under it"
            )
        return round(scalar)
    if values["num_hidden_layers"] == layers_of_27b:
        return int(values["hidden_size"] // values["num_attention_heads"])
    return int(values["head_dim"])


ROWS = (
    Architecture("gemma", _gemma, norm_offset=1.0, activation="gelu_tanh", scaled_embedding=True),
    Architecture(
        "gemma2",
        _gemma2,
        used=frozenset({WINDOW, SCORE_SCALE, SCORE_CAP, LOGIT_CAP}),
        norm_offset=1.0,
        norms=NORMS_AROUND,
        activation="gelu_tanh",
        scaled_embedding=True,
        capped_scores=True,
        capped_logits=True,
    ),
    Architecture(
        "gemma3",
        _gemma3,
        used=frozenset({WINDOW, SCORE_SCALE, LOGIT_CAP}),
        norm_offset=1.0,
        norms=NORMS_AROUND,
        head_norms=HeadNorms(),
        activation="gelu_tanh",
        scaled_embedding=True,
        capped_logits=True,
    ),
)
