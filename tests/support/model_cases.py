"""Tiny models of every architecture and peculiarity, their logits, and the distance of logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tiny_gemma4 import GEMMA4, GEMMA4_EXPERTS, GEMMA4_SHARED
from tiny_mixtures import QWEN3MOE
from tiny_models import F32, Tiny, llama3_factors
from tiny_qwen35 import QWEN35, QWEN35_MOE

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
LATE = torch.arange(400, 424).expand(2, -1)  # positions where scaled frequencies change the logits

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
MISTRAL3 = YARN | {
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
THETA = {"rope_type": "default", "rope_theta": 2e5}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA2_KEYS = {
    "attention.sliding_window": 8,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "rope.freq_base": 1e4,
}
GEMMA3_KEYS = {
    "attention.sliding_window": 8,
    "rope.freq_base": 5e5,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 8.0,
}

LLAMA = Tiny("llama", "llama", {"rms_norm_eps": 1e-3, "rope_parameters": THETA}, {"rope.freq_base": 2e5})
GEMMA2 = Tiny(
    "gemma2",
    "gemma2",
    {
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 64,
    },
    GEMMA2_KEYS,
)
GEMMA3 = Tiny(
    "gemma3",
    "gemma3_text",
    {
        "num_hidden_layers": 7,
        "sliding_window": 8,
        "query_pre_attn_scalar": 64,
        "rope_parameters": GEMMA3_ROPES,
        "eos_token_id": 2,
    },
    GEMMA3_KEYS,
)
MODELS = {
    "llama": LLAMA,
    "llama, tied": replace(LLAMA, config=LLAMA.config | {"tie_word_embeddings": True}),
    "llama, biases": replace(LLAMA, config=LLAMA.config | {"attention_bias": True, "mlp_bias": True}),
    "llama, biases of q, k and v": replace(
        LLAMA, config=LLAMA.config | {"attention_bias": True}, without=("*.o_proj.bias",)
    ),
    "llama, biases of k": replace(
        LLAMA, config=LLAMA.config | {"attention_bias": True}, without=("*.[oqv]_proj.*",)
    ),
    "llama, equal numbers for each layer": replace(
        LLAMA,
        keys=LLAMA.keys
        | {"attention.head_count": [8, 8], "attention.head_count_kv": [2, 2], "feed_forward_length": [256, 256]},
    ),
    "llama, default theta": Tiny("llama", "llama"),
    "llama, as many key heads as heads": replace(
        LLAMA, config=LLAMA.config | {"num_key_value_heads": 8}, keys=LLAMA.keys | {"attention.head_count_kv": None}
    ),
    "llama 3.1": Tiny(
        "llama",
        "llama",
        {"rope_parameters": LLAMA3},
        {"rope.freq_base": 5e5},
        freqs=llama3_factors(64, 5e5, 8.0, 1.0, 4.0, 256),
    ),
    "llama, linear": Tiny(
        "llama", "llama", {"rope_parameters": LINEAR}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    ),
    "llama, linear as in 2023": Tiny("llama", "llama", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}),
    "mistral as llama": Tiny("llama", "mistral", {"sliding_window": 8}, {"attention.sliding_window": 8}),
    "mistral": Tiny("mistral", "mistral", {"sliding_window": None}),
    "mistral3": Tiny(
        "mistral3",
        "ministral3",
        {"rope_parameters": MISTRAL3, "num_key_value_heads": 1},
        {
            "rope.freq_base": 1e6,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 4.0,
            "rope.scaling.yarn_beta_slow": 0.5,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.1,
        },
    ),
    "mistral3 without growing queries": Tiny(
        "mistral3",
        "llama",
        {"rope_parameters": YARN},
        {
            "rope.freq_base": 1e6,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    ),
    "qwen2": Tiny(
        "qwen2",
        "qwen2",
        {"hidden_size": 512, "num_key_value_heads": 2, "rope_parameters": THETA},
        {"rope.freq_base": 2e5},
    ),
    "qwen2, no biases": Tiny("qwen2", "qwen2", {"hidden_size": 512}, without=("*.bias",)),
    "qwen2, YaRN of the whole context": Tiny(
        "qwen2",
        "qwen2",
        {"hidden_size": 512, "rope_parameters": YARN | {"original_max_position_embeddings": 512}},
        {"rope.freq_base": 1e6, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
    ),
    "qwen2, tied, YaRN": Tiny(
        "qwen2",
        "qwen2",
        {"hidden_size": 512, "rope_parameters": YARN, "tie_word_embeddings": True},
        {
            "rope.freq_base": 1e6,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    ),
    "qwen3": Tiny("qwen3", "qwen3", {"rope_parameters": THETA}, {"rope.freq_base": 2e5}),
    "qwen3, tied": Tiny("qwen3", "qwen3", {"tie_word_embeddings": True}),
    "qwen3moe": QWEN3MOE,
    "qwen3moe, tied, width by the chosen": replace(
        QWEN3MOE,
        config=QWEN3MOE.config | {"tie_word_embeddings": True, "intermediate_size": 768},
        keys={"expert_feed_forward_length": None},
    ),
    "qwen35": QWEN35,
    "qwen35moe": QWEN35_MOE,
    "qwen35, tied, predicting blocks, projections of other types": replace(
        QWEN35,
        config=QWEN35.config
        | {
            "tie_word_embeddings": True,
            "num_hidden_layers": 5,
            "linear_num_value_heads": 6,
            "layer_types": [*["linear_attention", "full_attention"] * 2, "linear_attention"],
        },
        keys={
            "attention.recurrent_layers": [True, False, True, False, True, False],
            "full_attention_interval": None,
        },
        types={"*.ssm_alpha*": F32, "*.ssm_beta*": F32, "blk.2.attn_gate*": F32},
        predicting=1,
    ),
    "gemma2": GEMMA2,
    "gemma2, untied": replace(GEMMA2, config=GEMMA2.config | {"tie_word_embeddings": False}),
    "gemma3": GEMMA3,
    "gemma3, default theta": replace(
        GEMMA3,
        config=GEMMA3.config
        | {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in GEMMA3_ROPES}},
        keys={"attention.sliding_window": 8},
    ),
    "gemma3, untied, capped": replace(
        GEMMA3,
        config=GEMMA3.config
        | {
            "tie_word_embeddings": False,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 3,
            "layer_types": ALTERNATING,
            "rope_parameters": {**GEMMA3_ROPES, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}},
        },
        keys=GEMMA3.keys
        | {
            "final_logit_softcapping": 3.0,
            "attention.scale": 0.25,
            "attention.sliding_window_pattern": [True, False, True],
            "rope.freq_base_swa": 300.0,
        },
    ),
    "gemma4": GEMMA4,
    "gemma4, experts": GEMMA4_EXPERTS,
    "gemma4, experts, gate and up apart": replace(GEMMA4_EXPERTS, apart=True),
    "gemma4, shared keys": GEMMA4_SHARED,
    "gemma4, untied, values of their own": replace(
        GEMMA4,
        config=GEMMA4.config
        | {"tie_word_embeddings": False, "attention_k_eq_v": False, "num_global_key_value_heads": None},
    ),
    "gemma3, no windows": replace(
        GEMMA3,
        config=GEMMA3.config | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
        keys=GEMMA3.keys | {"attention.sliding_window": None},
    ),
}


def logits(model: Any) -> Tensor:
    """Return logits at positions where every peculiarity has an effect."""
    with torch.inference_mode():
        result: Tensor = model(IDS, position_ids=LATE).logits
    return result


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the spread of the expected values."""
    return float((found - expected).abs().max() / expected.std())
