"""Make tiny random models of Gemma 4, and the GGUF files that llama.cpp's converter would make of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tiny_models import F32, IN_LAYERS, NORMS, OUTSIDE, Tiny, add_stack

SLIDING, FULL = "sliding_attention", "full_attention"
HALVES = ("gate_exps.weight", "up_exps.weight")
OF_GEMMA4 = {
    "layer_scalar": "layer_output_scale.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
}
"""Parameters of a layer -> names in GGUF, besides those that all models have."""


OUTSIDE_OF_GEMMA4 = {
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
}


@dataclass(frozen=True)
class TinyGemma4(Tiny):
    """A model to make; see `Tiny`. Its norms are stored as they are.

    Attributes:
        apart: whether the file has the experts' gate and up in two stacks.
    """

    apart: bool = False
    architecture: str = "gemma4"
    kind: str = "gemma4_text"

    @property
    def is_gemma(self) -> bool:
        """Whether the model's norms have 1 added in a file."""
        return False

    def make(self) -> Any:
        """Return the model with random parameters."""
        model = super().make()
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter *= 0.3  # scores have no scale: larger ones would magnify the rounding of sums
            if name.endswith(("router.scale", "router.per_expert_scale")):
                parameter.uniform_(0.5, 1.5)
            if name.endswith("router.proj.weight"):
                parameter *= 20  # so that rounding chooses no other expert
        return model

    def gguf_name(self, parameter: str) -> str:
        """Return the GGUF name of a parameter of transformers."""
        module, kind = parameter.rsplit(".", 1)
        if module in OUTSIDE | OUTSIDE_OF_GEMMA4:
            return f"{(OUTSIDE | OUTSIDE_OF_GEMMA4)[module]}.{kind}"
        _, _, layer, inner = parameter.split(".", 3)
        name = OF_GEMMA4.get(inner) or f"{(IN_LAYERS | NORMS[True])[inner.rsplit('.', 1)[0]]}.{kind}"
        return f"blk.{layer}.{name}"

    def _add_tensor(self, writer: Any, parameter: str, values: Tensor, scales: str) -> None:
        if values.ndim < 3:
            super()._add_tensor(writer, parameter, values, scales)
            return
        names = [self.gguf_name(parameter)]
        if self.apart and parameter.endswith("gate_up_proj"):
            names = [f"{names[0].removesuffix('gate_up_exps.weight')}{part}" for part in HALVES]
        add_stack(writer, names, values, scales)

    def _all_keys(self, config: Any) -> dict[str, Any]:
        config = deepcopy(config)
        config.allow_global_per_layer_attribute_access = True  # of layers with a window
        given, slides = self.config, [kind == SLIDING for kind in config.layer_types]
        full = config.per_layer_config[FULL]
        keys = super()._all_keys(config) | {
            "attention.key_length": full.head_dim,
            "attention.value_length": full.head_dim,
            "attention.key_length_swa": config.head_dim,
            "attention.value_length_swa": config.head_dim,
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": slides,
            "attention.shared_kv_layers": config.num_kv_shared_layers,
            "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
            "rope.dimension_count": full.head_dim,
            "rope.dimension_count_swa": config.head_dim,
            "rope.freq_base": config.rope_parameters[FULL]["rope_theta"],
            "rope.freq_base_swa": config.rope_parameters[SLIDING]["rope_theta"],
            "final_logit_softcapping": config.final_logit_softcapping,
        }
        if config.enable_moe_block:
            keys |= {
                "expert_count": config.num_experts,
                "expert_used_count": config.top_k_experts,
                "expert_feed_forward_length": config.moe_intermediate_size,
            }
        if config.use_double_wide_mlp:
            own = config.num_hidden_layers - config.num_kv_shared_layers
            width = config.intermediate_size
            keys["feed_forward_length"] = [width] * own + [2 * width] * config.num_kv_shared_layers
        if given.get("num_global_key_value_heads"):
            counts = (given["num_global_key_value_heads"], config.num_key_value_heads)
            keys["attention.head_count_kv"] = [counts[each] for each in slides]
        return {key: value for key, value in (keys | self.keys).items() if value is not None}


ROTATED = 0.25
ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 5e5, "partial_rotary_factor": ROTATED},
}
GLOBAL_HEAD = 128
GEMMA4 = TinyGemma4(
    config={
        "num_hidden_layers": 5,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL],
        "sliding_window": 8,
        "global_head_dim": GLOBAL_HEAD,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "rope_parameters": ROPES,
        "final_logit_softcapping": 3.0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 96,
        "tie_word_embeddings": True,
    },
    freqs=[1.0] * int(GLOBAL_HEAD * ROTATED / 2) + [1e30] * (GLOBAL_HEAD // 2 - int(GLOBAL_HEAD * ROTATED / 2)),
)
GEMMA4_EXPERTS = replace(
    GEMMA4,
    config=GEMMA4.config
    | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 256},
    types={"*.ffn_gate_inp.weight": F32},
)
GEMMA4_SHARED = replace(
    GEMMA4,
    config=GEMMA4.config
    | {
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "attention_k_eq_v": False,
        "num_global_key_value_heads": None,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32,
    },
)
