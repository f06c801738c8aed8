"""Models that are Llama but for a detail: transformers' smollm3, seed_oss, arcee and hunyuan_v1_dense.

The layers of InternLM 2, EXAONE 3 and dense ERNIE 4.5 are Llama's.
"""

from __future__ import annotations

from typing import Any

from q6k_kernels.models.architecture import Architecture, Values, biases
from q6k_kernels.models.hyperparameters import Keys, Shapes, scaled_rope
from q6k_kernels.models.layer import HeadNorms, Rotation
from q6k_kernels.models.stored import INTERLEAVED_HEADS

_UNROTATED = 4
"""Of as many layers of SmolLM3 the last has no rotary embeddings; no key says so."""


def _llama(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "llama", {"rope_parameters": scaled_rope(keys), **biases(shapes)}


def _smollm3(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "smollm3", {
        "rope_parameters": scaled_rope(keys),
        "no_rope_layer_interval": _UNROTATED,
        "use_sliding_window": False,
        **biases(shapes),
    }


def _uses_rope(attention: Any) -> bool:
    return bool(attention.use_rope)


def _seed_oss(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "seed_oss", {"rope_parameters": scaled_rope(keys), **biases(shapes)}


def _arcee(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "arcee", {"rope_parameters": scaled_rope(keys), **biases(shapes)}


def _hunyuan(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "hunyuan_v1_dense", {"rope_parameters": scaled_rope(keys), **biases(shapes)}


ROWS = (
    Architecture("internlm2", _llama, tensor_names="llama", stored=INTERLEAVED_HEADS),
    Architecture("exaone", _llama, tensor_names="llama", frequency_factors=True),
    # In transformers' ernie4_5 neighbours rotate, which is all that differs.
    Architecture("ernie4_5", _llama, tensor_names="llama", stored=INTERLEAVED_HEADS),
    Architecture("smollm3", _smollm3, stored=INTERLEAVED_HEADS, rotation=Rotation(rotates=_uses_rope)),
    Architecture("seed_oss", _seed_oss),
    Architecture(
        "arcee",
        _arcee,
        stored=INTERLEAVED_HEADS,
        frequency_factors=True,
        activation="relu_squared",
        gated_network=False,
    ),
    Architecture(
        "hunyuan-dense",
        _hunyuan,
        head_norms=HeadNorms(q="query_layernorm", k="key_layernorm", part="rotated head"),
    ),
)
