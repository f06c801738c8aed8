"""gpt-oss: transformers' gpt_oss. All networks are mixtures of experts; every other layer has a window.

A learned score of each head, its sink, takes part of the weights and has no value. transformers mixes the matrices
of gate and up and stores them transposed, so `ClampedExperts` take the place of its experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from q6k_kernels.models.architecture import Architecture, Values, biases
from q6k_kernels.models.hyperparameters import EXPERTS, EXPERTS_USED, WINDOW, Keys, Shapes, scaled_rope
from q6k_kernels.models.layer import ExpertsForm, Rotation
from q6k_kernels.models.sizes import common_sizes, head_sizes, mixture_sizes
from q6k_kernels.models.stored import SEPARATE
from q6k_kernels.models.windows import windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _sizes(keys: Keys, shapes: Shapes) -> dict[str, Any]:
    values, mixture = common_sizes(keys, shapes), mixture_sizes(keys, shapes)
    width = mixture["moe_intermediate_size"]
    return {**values, **head_sizes(keys, shapes, values), **mixture, "intermediate_size": width}


def _gpt_oss(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    scaled = scaled_rope(keys)
    # The borders of YaRN's ramp are not rounded, as in OpenAI's own code; llama.cpp rounds those of all models.
    whole = {"truncate": False} if scaled["rope_type"] == "yarn" else {}
    return "gpt_oss", {
        "rope_parameters": scaled | whole,
        "num_local_experts": values["num_experts"],
        **windows(keys, values, period=2, window=128),
        **biases(shapes),
    }


def _replace_experts(model: PreTrainedModel) -> None:
    from q6k_kernels.models.mixtures import ClampedExperts  # imported here: sizes are told without torch

    config, inner = cast("Any", model.config), cast("Any", model.model)
    for layer in inner.layers:
        layer.mlp.experts = ClampedExperts(config.num_local_experts, config.hidden_size, config.intermediate_size)


ROWS = (
    Architecture(
        "gpt-oss",
        _gpt_oss,
        sizes=_sizes,
        used=frozenset({WINDOW, EXPERTS, EXPERTS_USED}),
        renamed={
            "self_attn.sinks": "self_attn.sinks.weight",
            **SEPARATE,
            "mlp.experts.gate_up_proj_bias": "mlp.experts.gate_proj.bias",
            "mlp.experts.down_proj_bias": "mlp.experts.down_proj.bias",
        },
        sinks=True,
        rotation=Rotation(angles="once"),
        experts=ExpertsForm(router="router", biased=True),
        adapt=_replace_experts,
    ),
)
