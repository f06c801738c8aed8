"""GLM 4 of April 2025: transformers' glm4, with norms before and after each part, and gate and up in one tensor.

Neighbours rotate, in transformers too.
"""

from __future__ import annotations

from functools import partial

from q6k_kernels.models.architecture import Architecture, Values, biases
from q6k_kernels.models.hyperparameters import ROTARY, Keys, Shapes, rotated_part, scaled_rope
from q6k_kernels.models.layer import LayerNorms, Rotation
from q6k_kernels.models.sizes import sizes


def _glm4(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    part = rotated_part(keys, values["head_dim"])
    return "glm4", {"rope_parameters": scaled_rope(keys) | {"partial_rotary_factor": part}, **biases(shapes)}


ROWS = (
    Architecture(
        "glm4",
        _glm4,
        sizes=partial(sizes, joined_up=True),
        used=frozenset({ROTARY}),
        norms=LayerNorms(after_attention="post_self_attn_layernorm", after="post_mlp_layernorm"),
        rotation=Rotation(neighbours=True),
    ),
)
