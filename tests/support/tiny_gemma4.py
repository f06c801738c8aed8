"""Make tiny random models of Gemma 4, and the GGUF files that llama.cpp's converter would make of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from tiny_models import IN_LAYERS, NORMS, OUTSIDE, Tiny

SLIDING, FULL = "sliding_attention", "full_attention"
OF_GEMMA4 = {"layer_scalar": "layer_output_scale.weight"}
"""Parameters of a layer -> names in GGUF, besides those that all models have."""


@dataclass(frozen=True)
class TinyGemma4(Tiny):
    """A model to make; see `Tiny`. Its norms are stored as they are."""

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
        return model

    def gguf_name(self, parameter: str) -> str:
        """Return the GGUF name of a parameter of transformers."""
        module, kind = parameter.rsplit(".", 1)
        if module in OUTSIDE:
            return f"{OUTSIDE[module]}.{kind}"
        _, _, layer, inner = parameter.split(".", 3)
        name = OF_GEMMA4.get(inner) or f"{(IN_LAYERS | NORMS[True])[inner.rsplit('.', 1)[0]]}.{kind}"
        return f"blk.{layer}.{name}"

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
