"""Qwen 3 with mixtures of experts, as Qwen3-30B-A3B: transformers' qwen3_moe.

Every layer has a mixture in place of a network. The weights of the experts that a token has chosen add up to 1; no
key says so.
"""

from __future__ import annotations

from typing import Any

from q6k_kernels.models.architecture import Architecture, Values, biases
from q6k_kernels.models.hyperparameters import EXPERTS, EXPERTS_USED, Keys, Shapes, scaled_rope
from q6k_kernels.models.layer import ExpertsForm, HeadNorms
from q6k_kernels.models.sizes import common_sizes, head_sizes, mixture_sizes
from q6k_kernels.models.stored import SEPARATE


def _sizes(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    values, width = common_sizes(keys, shapes), keys.integer("feed_forward_length", 1, 1 << 24)
    mixture = mixture_sizes(keys, shapes, together=width)
    return {**values, **head_sizes(keys, shapes, values), **mixture, "intermediate_size": width}


def _qwen3moe(keys: Keys, shapes: Shapes, _: Values) -> tuple[str, Values]:
    return "qwen3_moe", {
        "rope_parameters": scaled_rope(keys),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **biases(shapes),
    }


ROWS = (
    Architecture(
        "qwen3moe",
        _qwen3moe,
        used=frozenset({EXPERTS, EXPERTS_USED}),
        renamed=SEPARATE,
        sizes=_sizes,
        head_norms=HeadNorms(),
        experts=ExpertsForm(),
    ),
)
