"""The text part of Gemma 4: transformers' gemma4_text. Layers with and without a window have heads of other sizes.

Norms are as transformers has them, without 1 added. Each head of v has a norm without weights, scores are not
scaled, and the output of each layer is multiplied by a number. Layers without a window may use their keys, as
projected, as values too; `rope_freqs.weight` divides the frequencies of these layers alone, and where it is 1e30
nothing rotates. In some models each layer has an embedding of its own, and the last layers use keys and values of
earlier ones.
"""

from __future__ import annotations

from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models.architecture import FREQUENCY_FACTORS, FULL, SLIDING, Architecture, Values
from q6k_kernels.models.hyperparameters import (
    EXPERT_WIDTH,
    EXPERTS,
    EXPERTS_USED,
    LOGIT_CAP,
    ONLY_FUNCTIONS,
    ROTARY,
    SHARED_LAYERS,
    WINDOW,
    WINDOW_PATTERN,
    Keys,
    Shapes,
    rope,
)
from q6k_kernels.models.layer import NORMS_AROUND, ExpertsForm, HeadNorms
from q6k_kernels.models.sizes import common_sizes, matrix
from q6k_kernels.models.stored import Stored

_PER_LAYER = "embedding_length_per_layer_input"
_SUFFIXES = {SLIDING: "_swa", FULL: ""}
"""Kind of layer -> what the keys of its heads' sizes end in."""
_FIELDS = {SLIDING: ("head_dim", "num_key_value_heads"), FULL: ("global_head_dim", "num_global_key_value_heads")}
"""Kind of layer -> fields of the configuration for its heads: their size, and the number of those of keys."""


def _sizes(keys: Keys, shapes: Shapes) -> Values:
    values = common_sizes(keys, shapes)
    slides = keys.flags_of_layers(WINDOW_PATTERN)
    if slides is None:
        raise keys.wrong(WINDOW_PATTERN, "missing")
    kinds = [SLIDING if each else FULL for each in slides]
    if kinds[-1] != FULL:
        raise _unsupported(keys, WINDOW_PATTERN, "says that the last layer has a window")
    shared = keys.integer(SHARED_LAYERS, 0, len(kinds) - 1, 0)
    own = kinds[: len(kinds) - shared]
    if missing := sorted(set(kinds) - set(own)):
        raise keys.wrong(SHARED_LAYERS, f"{shared} leaves no layer of kind {missing[0]} that has keys")
    for kind in dict.fromkeys(kinds):
        values |= _heads(keys, shapes, values["num_attention_heads"], kind, own)
    # A model without windows: transformers wants their sizes all the same.
    for field, of_full in zip(_FIELDS[SLIDING], _FIELDS[FULL], strict=True):
        values.setdefault(field, values[of_full])
    return {
        **values,
        **_networks(keys, shapes, len(own)),
        **_mixture(keys, shapes),
        "layer_types": kinds,
        "num_kv_shared_layers": shared,
    }


def _heads(keys: Keys, shapes: Shapes, heads: int, kind: str, own: list[str]) -> Values:
    """Return the sizes of the heads of one kind of layer, compared with the first such layer's tensors."""
    size_key, count_key = f"attention.key_length{_SUFFIXES[kind]}", "attention.head_count_kv"
    size = keys.integer(size_key, 2, 1 << 16)
    if size % 2:
        raise keys.wrong(size_key, f"expected an even number, for rotary embeddings, found {size}")
    for key in (f"attention.value_length{_SUFFIXES[kind]}", f"{ROTARY}{_SUFFIXES[kind]}"):
        if keys.integer(key, 0, 1 << 16, size) != size:
            raise _unsupported(keys, key, f"differs from the {size} of a head's keys")
    counts = {count for count, each in zip(keys.of_layers(count_key, 1, heads, heads), own) if each == kind}  # noqa: B905
    if len(counts) > 1:
        raise _unsupported(keys, count_key, f"differs between layers of kind {kind}: {sorted(counts)}")
    (count,) = counts
    if heads % count:
        raise keys.wrong(count_key, f"expected a divisor of {heads} heads, found {count}")
    first = own.index(kind)
    for name, rows, key in (("attn_q", heads * size, size_key), ("attn_k", count * size, count_key)):
        keys.expect(key, rows, matrix(keys, shapes, f"blk.{first}.{name}.weight")[0], f"rows of {name}")
    return dict(zip(_FIELDS[kind], (size, count), strict=True))


def _networks(keys: Keys, shapes: Shapes, own: int) -> Values:
    """Return the width of networks, and whether it is double in layers without keys of their own."""
    key = "feed_forward_length"
    widths = keys.of_layers(key, 1, 1 << 24)
    for layer in {0, len(widths) - 1}:
        keys.expect(key, widths[layer], matrix(keys, shapes, f"blk.{layer}.ffn_up.weight")[0], "rows of ffn_up")
    wide = own < len(widths) and widths[-1] == 2 * widths[0]
    if widths != [width << (wide and layer >= own) for layer, width in enumerate([widths[0]] * len(widths))]:
        raise _unsupported(keys, key, f"differs between layers: {sorted(set(widths))}")
    return {"intermediate_size": widths[0], "use_double_wide_mlp": wide}


def _mixture(keys: Keys, shapes: Shapes) -> Values:
    """Return the sizes of the mixture of experts that stands beside each network, if there is one."""
    experts = keys.integer(EXPERTS, 0, 1 << 16, 0)
    if not experts:
        return {"enable_moe_block": False}
    keys.expect(EXPERTS, experts, matrix(keys, shapes, "blk.0.ffn_gate_inp.weight")[0], "rows of ffn_gate_inp")
    return {
        "enable_moe_block": True,
        "num_experts": experts,
        "top_k_experts": keys.integer(EXPERTS_USED, 1, experts),
        "moe_intermediate_size": keys.integer(EXPERT_WIDTH, 1, 1 << 24),
    }


def _gemma4(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    if FREQUENCY_FACTORS not in shapes:
        raise keys.wrong(ROTARY, f"a part of each head rotates, and no tensor {FREQUENCY_FACTORS} says which")
    first = values["layer_types"].index(FULL)
    shares = f"blk.{first}.attn_v.weight" not in shapes
    if not shares and values["num_global_key_value_heads"] != values["num_key_value_heads"]:
        raise _unsupported(keys, "attention.head_count_kv", "differs between layers, all of which have attn_v")
    return "gemma4_text", {
        "rope_parameters": {FULL: rope(keys), SLIDING: rope(keys, "rope.freq_base_swa")},
        "attention_k_eq_v": shares,
        "sliding_window": keys.integer(WINDOW, 1, 1 << 31),
        "final_logit_softcapping": keys.real(LOGIT_CAP, 0.0, 1e6, 0.0) or None,
        "hidden_size_per_layer_input": keys.integer(_PER_LAYER, 0, 1 << 20, 0),
        "vocab_size_per_layer_input": values["vocab_size"],
    }


def _unsupported(keys: Keys, key: str, problem: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{keys.metadata.path}: {keys.prefix}.{key} {problem}", ONLY_FUNCTIONS)


ROWS = (
    Architecture(
        "gemma4",
        _gemma4,
        used=frozenset({WINDOW, LOGIT_CAP, SHARED_LAYERS, EXPERTS, EXPERTS_USED}),
        renamed={
            "layer_scalar": "layer_scalar.weight",
            "router.scale": "router.proj.scale",
            "router.per_expert_scale": "experts.down_proj.scale",
            "experts.gate_up_proj": "experts.gate_up_proj.weight",
            "experts.down_proj": "experts.down_proj.weight",
        },
        stored={
            "per_layer_token_embd.weight": Stored(layered=1),
            "per_layer_model_proj.weight": Stored(layered=0),
        },
        sizes=_sizes,
        frequency_factors=True,
        factors_of=FULL,
        norms=NORMS_AROUND,
        head_norms=HeadNorms(),
        value_norms=True,
        scaled_layers=True,
        experts=ExpertsForm(beside=True),
        embedded_layers=True,
        activation="gelu_tanh",
        scaled_embedding=True,
        capped_logits=True,
    ),
)
