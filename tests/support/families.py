"""Tiny random models of every family, and the tokens that transformers itself generates with them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import transformers

from q6k_kernels.models.architecture import attach
from q6k_kernels.models.registry import ARCHITECTURES

VOCABULARY, WINDOW, PROMPT, ANSWER = 97, 8, 21, 60
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
STATE_SIZES = ("linear_key_head_dim", "linear_value_head_dim")
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    # A soft cap that changes results, and transformers' only attention that applies it.
    "gemma2": ("Gemma2", {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"}),
    # Two value heads for each key head, half of an attention head rotated.
    "qwen35": (
        "Qwen3_5Text",
        {
            "layer_types": [LINEAR, FULL, LINEAR],
            **dict.fromkeys(STATE_SIZES, 8),
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": HALF,
        },
    ),
    # No weights of values in layers without a window, whose heads are larger; the first half of the angles turns.
    "gemma4": (
        "Gemma4Text",
        {
            "sliding_window": WINDOW,
            "layer_types": [FULL, SLIDING, FULL],
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
                FULL: {"rope_type": "proportional", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
            },
        },
    ),
    "gemma3": ("Gemma3Text", {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING]}),
}


@lru_cache
def tiny(family: str) -> Any:
    name, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.5, pad_token_id=0, eos_token_id=None,
        bos_token_id=None, **({"query_pre_attn_scalar": 8} if family in ("gemma2", "gemma3") else {}), **more,
    )  # fmt: skip
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    attach(model, ARCHITECTURES[name.removesuffix("Text").lower().replace("_", "")])
    return model


def prompt(length: int = PROMPT) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@lru_cache
def expected(family: str) -> list[int]:
    """Return the likeliest tokens, as transformers generates them."""
    ids = torch.tensor([prompt()])
    return tiny(family).generate(ids, max_new_tokens=ANSWER, do_sample=False)[0, PROMPT:].tolist()
