"""Tiny models for llama.cpp, as in `golden_cases`: mixtures of experts in place of networks."""

from __future__ import annotations

from golden_cases import ATTENTION, HEAD_NORMS, Case, shapes, sized, uniform

_MIXTURE = {
    "ffn_norm": "h",
    "ffn_gate_inp": "eh",
    "ffn_gate_exps": "emh",
    "ffn_up_exps": "emh",
    "ffn_down_exps": "ehm",
}
# One KV head, heads x size that differs from the hidden size, and no width that is a multiple of 64.
_SIZES = {"h": 64, "q": 96, "k": 24, "d": 24, "e": 7, "m": 40, "v": 101}

MIXTURES: dict[str, Case] = {
    "qwen3moe": Case(
        "qwen3moe",
        sized(layers=3, heads=4, key_heads=1, head=24, hidden=64, network=120, tokens=101)
        | {
            "rope.freq_base": 1000000.0,
            "expert_count": 7,
            "expert_used_count": 3,
            "expert_feed_forward_length": 40,
        },
        uniform(3, ATTENTION | HEAD_NORMS | _MIXTURE, _SIZES) | shapes({"output": "vh"}, _SIZES),
    ),
}
"""The cases by name."""
