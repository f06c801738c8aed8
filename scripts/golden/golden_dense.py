"""Tiny models for llama.cpp, as in `golden_cases`: the architectures that differ from Llama in a detail."""

from __future__ import annotations

from golden_cases import ATTENTION, HEAD_NORMS, NETWORK, NORMS_AFTER, Case, Shapes, shapes, sized, uniform

_UNGATED = {name: letters for name, letters in NETWORK.items() if name != "ffn_gate"}
_ONLY_AFTER = {
    name: letters for name, letters in (ATTENTION | NETWORK | NORMS_AFTER).items() if name[-5:] != "_norm"
}
_ONLY_AFTER |= NORMS_AFTER
# One KV head and heads x size that differs from the hidden size, or is equal where llama.cpp wants it so.
_ODD = {"h": 64, "q": 96, "k": 24, "d": 24, "f": 80, "v": 101}
_ODD_KEYS = sized(layers=3, heads=4, key_heads=1, head=24, hidden=64, network=80, tokens=101)
_SQUARE = {"h": 64, "q": 64, "k": 16, "d": 16, "f": 96, "v": 97}
_SQUARE_KEYS = sized(layers=3, heads=4, key_heads=1, head=16, hidden=64, network=96, tokens=97)
_ODD_HEAD, _SQUARE_HEAD = shapes({"output": "vh"}, _ODD), shapes({"output": "vh"}, _SQUARE)
_YARN = {
    "rope.freq_base": 1000000.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 16.0,
    "rope.scaling.original_context_length": 16,
}
_GLM = {name: letters for name, letters in (ATTENTION | NETWORK | NORMS_AFTER).items() if name != "ffn_gate"}
_GLM |= {"ffn_up": "uh"}
_NO_NORM = {name: letters for name, letters in NETWORK.items() if name != "ffn_norm"}
_RMS = "attention.layer_norm_rms_epsilon"
_LAYER_NORM = {name: value for name, value in _SQUARE_KEYS.items() if name != _RMS}
_LAYER_NORM |= {"attention.layer_norm_epsilon": 1e-5}
_OSS = ATTENTION | {"post_attention_norm": "h", "attn_sinks": "n", "ffn_gate_inp": "eh"}
_OSS |= {"ffn_gate_exps": "efh", "ffn_up_exps": "efh", "ffn_down_exps": "ehf"}
_FOUR_LAYERS = {"block_count": 4}


def _biases(layers: int, rows: dict[str, int]) -> Shapes:
    """Return the shapes of biases."""
    return {f"blk.{layer}.{name}.bias": (size,) for layer in range(layers) for name, size in rows.items()}


_JOINED = {"attn_norm": "h", "attn_qkv": "jh", "attn_output": "hh"}
_JOINED |= {"ffn_norm": "h", "ffn_up": "uh", "ffn_down": "hf"}
_PHI = _SQUARE | {"j": 96, "u": 192}
_NO_HEAD_SIZE = ("attention.key_length", "attention.value_length")
_PHI_KEYS = {name: value for name, value in _SQUARE_KEYS.items() if name not in _NO_HEAD_SIZE}
_PHI_SHORT, _PHI_LONG = [1.0, 1.1, 1.25, 1.5, 2.0, 3.0], [1.0, 1.5, 2.0, 4.0, 8.0, 16.0]


def _phi4_mini(original: int, attention: float) -> Case:
    """Return a model whose contexts are long, by llama.cpp, if they have room for more than `original` tokens."""
    return Case(
        "phi3",
        _PHI_KEYS
        | {
            "rope.dimension_count": 12,
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": attention,
            "attention.sliding_window": 0,
        },
        uniform(3, _JOINED, _PHI) | {"rope_factors_short.weight": (6,), "rope_factors_long.weight": (6,)},
        values={"rope_factors_short.weight": _PHI_SHORT, "rope_factors_long.weight": _PHI_LONG},
    )


DENSE: dict[str, Case] = {
    "phi3": Case(
        "phi3",
        _PHI_KEYS | {"rope.dimension_count": 16},
        uniform(3, _JOINED, _PHI) | shapes({"output": "vh"}, _PHI),
    ),
    "phi4-mini": _phi4_mini(original=256, attention=1.06),
    "phi4-mini-long": _phi4_mini(original=32, attention=1.3),
    "mistral3": Case(
        "mistral3",
        _ODD_KEYS
        | _YARN
        | {
            "rope.dimension_count": 24,
            "rope.scaling.yarn_beta_fast": 4.0,
            "rope.scaling.yarn_beta_slow": 0.5,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.4,
        },
        uniform(3, ATTENTION | NETWORK, _ODD) | _ODD_HEAD,
    ),
    "internlm2": Case(
        "internlm2",
        _SQUARE_KEYS | {"rope.freq_base": 1000000.0},
        uniform(3, ATTENTION | NETWORK, _SQUARE) | _SQUARE_HEAD,
    ),
    "exaone": Case(
        "exaone",
        _ODD_KEYS,
        uniform(3, ATTENTION | NETWORK, _ODD) | {"rope_freqs.weight": (12,)},
        values={"rope_freqs.weight": [1.0] * 4 + [1.5, 2.0, 3.0, 5.0] + [8.0] * 4},
    ),
    "smollm3": Case(
        "smollm3",
        _ODD_KEYS | _FOUR_LAYERS | {"rope.dimension_count": 24, "rope.freq_base": 5000000.0},
        uniform(4, ATTENTION | NETWORK, _ODD),
    ),
    "seed_oss": Case(
        "seed_oss",
        _ODD_KEYS | {"rope.freq_base": 10000000.0},
        uniform(3, {name: of for name, of in (ATTENTION | NETWORK).items() if name != "ffn_norm"}, _ODD)
        | {f"blk.{layer}.post_attention_norm.weight": (64,) for layer in range(3)}
        | _biases(3, {"attn_q": 96, "attn_k": 24, "attn_v": 24})
        | _ODD_HEAD,
    ),
    "granite": Case(
        "granite",
        _SQUARE_KEYS
        | {
            "rope.dimension_count": 16,
            "attention.scale": 0.2,
            "embedding_scale": 6.0,
            "residual_scale": 0.4,
            "logit_scale": 3.0,
        },
        uniform(3, ATTENTION | NETWORK, _SQUARE),
    ),
    "gemma": Case("gemma", _ODD_KEYS, uniform(3, ATTENTION | NETWORK, _ODD), gelu=True),
    "qwen2vl": Case(
        "qwen2vl",
        _SQUARE_KEYS
        | {
            "rope.freq_base": 1000000.0,
            "rope.dimension_sections": [2, 3, 3, 0],
            # llama.cpp of October 2026 does not read the epsilon of this architecture and computes with none.
            "attention.layer_norm_rms_epsilon": 1e-12,
        },
        uniform(3, ATTENTION | NETWORK, _SQUARE) | _biases(3, {"attn_q": 64, "attn_k": 16, "attn_v": 16}),
    ),
    "qwen3vl": Case(
        "qwen3vl",
        _ODD_KEYS | {"rope.freq_base": 5000000.0, "rope.dimension_sections": [4, 4, 4, 0], "n_deepstack_layers": 3},
        uniform(3, ATTENTION | NETWORK | HEAD_NORMS, _ODD) | _ODD_HEAD,
    ),
    "glm4": Case(
        "glm4",
        _SQUARE_KEYS | {"rope.dimension_count": 8},
        uniform(3, _GLM, _PHI)
        | _biases(3, {"attn_q": 64, "attn_k": 16, "attn_v": 16})
        | shapes({"output": "vh"}, _PHI),
    ),
    "cohere2": Case(
        "cohere2",
        _LAYER_NORM
        | _FOUR_LAYERS
        | {
            "rope.dimension_count": 16,
            "rope.scaling.type": "none",
            "attention.sliding_window": 8,
            "logit_scale": 0.25,
        },
        uniform(4, ATTENTION | _NO_NORM, _SQUARE),
    ),
    "command-r": Case(
        "command-r", _LAYER_NORM | {"logit_scale": 0.0625}, uniform(3, ATTENTION | _NO_NORM, _SQUARE)
    ),
    "gpt-oss": Case(
        "gpt-oss",
        _ODD_KEYS
        | {
            "rope.freq_base": 150000.0,
            "attention.sliding_window": 8,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 80,
        },
        uniform(3, _OSS, _ODD | {"e": 4, "n": 4})
        | _biases(3, {"attn_q": 96, "attn_k": 24, "attn_v": 24, "attn_output": 64, "ffn_gate_inp": 4})
        | {
            f"blk.{layer}.ffn_{name}_exps.bias": (4, rows)
            for layer in range(3)
            for name, rows in (("gate", 80), ("up", 80), ("down", 64))
        }
        | _ODD_HEAD,
    ),
    "arcee": Case(
        "arcee",
        _ODD_KEYS | {"rope.dimension_count": 24},
        uniform(3, ATTENTION | _UNGATED, _ODD) | _ODD_HEAD,
    ),
    "ernie4_5": Case("ernie4_5", _ODD_KEYS | {"rope.freq_base": 500000.0}, uniform(3, ATTENTION | NETWORK, _ODD)),
    "hunyuan-dense": Case(
        "hunyuan-dense",
        _ODD_KEYS | {"rope.freq_base": 11158840.0, "rope.scaling.type": "none", "rope.scaling.factor": 1.0},
        uniform(3, ATTENTION | NETWORK | HEAD_NORMS, _ODD),
    ),
    "olmo2": Case(
        "olmo2",
        _SQUARE_KEYS,
        uniform(3, _ONLY_AFTER | {"attn_q_norm": "h", "attn_k_norm": "k"}, _SQUARE) | _SQUARE_HEAD,
    ),
    "olmo3": Case(
        "olmo2",
        _SQUARE_KEYS
        | _YARN
        | {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False, True]},
        uniform(3, _ONLY_AFTER | {"attn_q_norm": "h", "attn_k_norm": "k"}, _SQUARE) | _SQUARE_HEAD,
    ),
    "exaone4": Case(
        "exaone4",
        _SQUARE_KEYS | {"rope.freq_base": 1000000.0},
        uniform(3, _ONLY_AFTER | HEAD_NORMS, _SQUARE),
    ),
    "exaone4-32b": Case(
        "exaone4",
        _SQUARE_KEYS | {"block_count": 64, "rope.freq_base": 1000000.0, "attention.sliding_window": 8},
        uniform(64, _ONLY_AFTER | HEAD_NORMS, _SQUARE),
    ),
}
"""The cases by name."""
