"""Tiny models of architectures that are a table's row: their names, keys and sizes by llama.cpp's converter."""

from __future__ import annotations

import math
from dataclasses import replace

from model_cases import THETA, YARN
from tiny_gpt_oss import GPT_OSS, ROUTER
from tiny_models import Q3_K, Tiny

SQUARE = {"num_attention_heads": 4, "num_key_value_heads": 2}
"""Heads that are together as wide as the hidden size, where llama.cpp knows no other."""
NO_HEAD_SIZE = {"attention.key_length": None, "attention.value_length": None}
LAYER_NORM = {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-5}
BASE = {"rope.freq_base": 2e5}
AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


GRANITE = Tiny(
    "granite",
    "granite",
    SQUARE
    | {
        "rope_parameters": THETA,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
        "attention_bias": True,
    },
    BASE
    | NO_HEAD_SIZE
    | {"attention.scale": 0.2, "embedding_scale": 6.0, "residual_scale": 0.4, "logit_scale": 3.0},
)
OLMO3 = Tiny(
    "olmo2",
    "olmo3",
    SQUARE
    | {
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "layer_types": SLIDING,
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
    NO_HEAD_SIZE
    | {
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": [True, False, True],
        "rope.freq_base": 1e6,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    },
    names=AFTER,
)
JOINED = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
SHORT, LONG = [1.0 + pair / 24 for pair in range(24)], [1.0 + pair / 6 for pair in range(24)]
PHI4_MINI = Tiny(
    "phi3",
    "phi3",
    SQUARE
    | {
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 2e5,
            "partial_rotary_factor": 0.75,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 64,
        },
    },
    BASE
    | NO_HEAD_SIZE
    | {
        "rope.dimension_count": 48,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(512 / 64) / math.log(64)),
        "attention.sliding_window": 0,
    },
    factors={"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG},
    names=JOINED,
)
COHERE2 = Tiny(
    "cohere2",
    "cohere2",
    SQUARE | {"rope_parameters": THETA, "logit_scale": 0.25, "num_hidden_layers": 4, "sliding_window": 8},
    BASE
    | NO_HEAD_SIZE
    | LAYER_NORM
    | {"attention.sliding_window": 8, "rope.dimension_count": 64, "rope.scaling.type": "none", "logit_scale": 0.25},
)
DENSE = {
    "phi3": Tiny(
        "phi3",
        "phi3",
        SQUARE | {"rope_parameters": THETA, "sliding_window": 8},
        BASE | NO_HEAD_SIZE | {"attention.sliding_window": 8, "rope.dimension_count": 64},
        names=JOINED,
    ),
    "phi4-mini": PHI4_MINI,
    "internlm2": Tiny("internlm2", "llama", {"rope_parameters": THETA}, BASE),
    "exaone": Tiny("exaone", "llama", {"rope_parameters": THETA}, BASE),
    "smollm3": Tiny(
        "smollm3",
        "smollm3",
        SQUARE | {"num_hidden_layers": 5, "rope_parameters": THETA, "tie_word_embeddings": True},
        BASE | NO_HEAD_SIZE,
    ),
    "seed_oss": Tiny(
        "seed_oss",
        "seed_oss",
        {"rope_parameters": THETA},
        BASE,
        names={"post_attention_layernorm": "post_attention_norm"},
    ),
    "granite": GRANITE,
    "gemma": Tiny("gemma", "gemma", names={"post_attention_layernorm": "ffn_norm"}),
    "qwen2vl": Tiny(
        "qwen2vl",
        "qwen2",
        SQUARE | {"rope_parameters": THETA},
        BASE | NO_HEAD_SIZE | {"rope.dimension_sections": [8, 12, 12, 0]},
    ),
    "qwen3vl": Tiny(
        "qwen3vl",
        "qwen3",
        {"rope_parameters": THETA},
        BASE | {"rope.dimension_sections": [12, 10, 10, 0], "n_deepstack_layers": 3},
    ),
    "gpt-oss": GPT_OSS,
    "gpt-oss, some experts not packed": replace(
        GPT_OSS, types=ROUTER | {"blk.1.ffn_up_exps.weight": Q3_K}, config=GPT_OSS.config | {"hidden_size": 256}
    ),
    "arcee": Tiny("arcee", "arcee", {"rope_parameters": THETA}, BASE),
    "ernie4_5": Tiny("ernie4_5", "ernie4_5", {"rope_parameters": THETA}, BASE),
    "glm4": Tiny(
        "glm4",
        "glm4",
        {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}},
        BASE | {"rope.dimension_count": 32},
        names={
            "mlp.gate_up_proj": "ffn_up",
            "post_self_attn_layernorm": "post_attention_norm",
            "post_mlp_layernorm": "post_ffw_norm",
        },
    ),
    "cohere": Tiny(
        "command-r",
        "cohere",
        SQUARE | {"rope_parameters": THETA, "logit_scale": 0.25},
        BASE | NO_HEAD_SIZE | LAYER_NORM | {"rope.scaling.type": "none", "logit_scale": 0.25},
    ),
    "cohere2": COHERE2,
    "hunyuan-dense": Tiny(
        "hunyuan-dense",
        "hunyuan_v1_dense",
        {"rope_parameters": THETA},
        BASE | {"rope.scaling.type": "none", "rope.scaling.factor": 1.0},
        names={"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"},
    ),
    "olmo2": Tiny("olmo2", "olmo2", SQUARE | {"rope_parameters": THETA}, BASE | NO_HEAD_SIZE, names=AFTER),
    "olmo3": OLMO3,
    "exaone4": Tiny(
        "exaone4",
        "exaone4",
        SQUARE | {"rope_parameters": THETA, "sliding_window": None, "layer_types": ["full_attention"] * 2},
        BASE,
        names=AFTER,
    ),
}
