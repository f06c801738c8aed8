"""Tiny models for llama.cpp, as in `golden_cases`: Gemma 4, with experts, and with keys that layers share."""

from __future__ import annotations

from collections.abc import Mapping

from golden_cases import ATTENTION, HEAD_NORMS, NETWORK, NORMS_AFTER, OUTSIDE, Case, Shapes, shapes, sized


def by_kind(slides: list[bool], *of_kinds: tuple[Mapping[str, str], Mapping[str, int]], first: int = 0) -> Shapes:
    """Return the shapes of layers without and with a sliding window, each kind given by its names and sizes."""
    found = Shapes()
    for layer, kind in enumerate(slides, first):
        found |= shapes(*of_kinds[kind], f"blk.{layer}.")
    return found


_SLIDING = {"h": 64, "q": 96, "k": 48, "d": 24, "f": 80, "v": 101, "1": 1}
_GLOBAL = _SLIDING | {"q": 160, "k": 40, "d": 40}
_SHARED_VALUES = {name: letters for name, letters in ATTENTION.items() if name != "attn_v"}
_GEMMA4 = NETWORK | NORMS_AFTER | HEAD_NORMS | {"layer_output_scale": "1"}
_GEMMA4_SLIDES = [True, True, False, True, False]
_GEMMA4_KEYS = sized(layers=5, heads=4, key_heads=2, head=40, hidden=64, network=80, tokens=101) | {
    "attention.sliding_window": 8,
    "attention.head_count_kv": [2 if slides else 1 for slides in _GEMMA4_SLIDES],
    "attention.key_length_swa": 24,
    "attention.value_length_swa": 24,
    "attention.sliding_window_pattern": _GEMMA4_SLIDES,
    "attention.shared_kv_layers": 0,
    "embedding_length_per_layer_input": 0,
    "rope.dimension_count": 40,
    "rope.dimension_count_swa": 24,
    "rope.freq_base": 1000000.0,
    "rope.freq_base_swa": 10000.0,
    "final_logit_softcapping": 3.0,
}
_EXPERTS = {
    "post_ffw_norm_1": "h",
    "post_ffw_norm_2": "h",
    "pre_ffw_norm_2": "h",
    "ffn_gate_inp": "eh",
    "ffn_gate_up_exps": "egh",
    "ffn_down_exps": "ehm",
}
_EXPERT_SCALES = {"ffn_gate_inp": "h", "ffn_down_exps": "e"}
_EXPERT_SIZES = {"e": 6, "m": 40, "g": 80}
_E2B_SLIDES = [True, True, False] * 2
_E2B_SLIDING = _SLIDING | {"k": 24, "p": 16, "n": 6 * 16}
_E2B_GLOBAL = _E2B_SLIDING | {"q": 160, "k": 40, "d": 40}
_E2B = _GEMMA4 | {"inp_gate": "ph", "proj": "hp", "post_norm": "h"}
_WITHOUT_KEYS = {
    name: letters for name, letters in (ATTENTION | _E2B).items() if name not in ("attn_k", "attn_v", "attn_k_norm")
}
_OF_ALL_LAYERS = {"per_layer_token_embd": "vn", "per_layer_model_proj": "nh", "per_layer_proj_norm": "p"}
_GEMMA4_FACTORS = [1.0] * 5 + [1e30] * 15

GEMMA4: dict[str, Case] = {
    "gemma4": Case(
        "gemma4",
        _GEMMA4_KEYS,
        shapes(OUTSIDE, _SLIDING)
        | {"rope_freqs.weight": (20,)}
        | by_kind(_GEMMA4_SLIDES, (_SHARED_VALUES | _GEMMA4, _GLOBAL), (ATTENTION | _GEMMA4, _SLIDING)),
        values={"rope_freqs.weight": _GEMMA4_FACTORS},
        gelu=True,
    ),
    "gemma4-experts": Case(
        "gemma4",
        _GEMMA4_KEYS | {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 40},
        shapes(OUTSIDE, _SLIDING)
        | {"rope_freqs.weight": (20,)}
        | by_kind(
            _GEMMA4_SLIDES,
            (_SHARED_VALUES | _GEMMA4 | _EXPERTS, _GLOBAL | _EXPERT_SIZES),
            (ATTENTION | _GEMMA4 | _EXPERTS, _SLIDING | _EXPERT_SIZES),
        )
        | {
            name: shape
            for layer in range(len(_GEMMA4_SLIDES))
            for name, shape in shapes(
                _EXPERT_SCALES, _SLIDING | _EXPERT_SIZES, f"blk.{layer}.", kind="scale"
            ).items()
        },
        values={"rope_freqs.weight": _GEMMA4_FACTORS},
        seed=1,
        gelu=True,
    ),
    "gemma4-shared": Case(
        "gemma4",
        _GEMMA4_KEYS
        | {
            "block_count": 6,
            "attention.head_count_kv": 1,
            "attention.sliding_window_pattern": _E2B_SLIDES,
            "attention.shared_kv_layers": 3,
            "feed_forward_length": [80] * 3 + [160] * 3,
            "embedding_length_per_layer_input": 16,
        },
        shapes(OUTSIDE | _OF_ALL_LAYERS, _E2B_SLIDING)
        | {"rope_freqs.weight": (20,)}
        | by_kind(_E2B_SLIDES[:3], (ATTENTION | _E2B, _E2B_GLOBAL), (ATTENTION | _E2B, _E2B_SLIDING))
        | by_kind(
            _E2B_SLIDES[3:],
            (_WITHOUT_KEYS, _E2B_GLOBAL | {"f": 160}),
            (_WITHOUT_KEYS, _E2B_SLIDING | {"f": 160}),
            first=3,
        ),
        values={"rope_freqs.weight": _GEMMA4_FACTORS},
        seed=1,
        gelu=True,
    ),
}
"""The cases by name."""
