"""The sizes that all architectures have, from keys of the metadata, each compared with the shape of a tensor.

So no model is built that is larger than the bundle.
"""

from __future__ import annotations

import re
from typing import Any

from q6k_kernels.bundle.manifest import BundleError
from q6k_kernels.bundle.metadata import CONTEXT_LENGTH, ENDS, SUPPRESSED, Metadata, token_id_key
from q6k_kernels.errors import HyperparameterError, UnsupportedModelError
from q6k_kernels.models.hyperparameters import (
    EXPERT_WIDTH,
    EXPERTS,
    EXPERTS_USED,
    MAX_CONTEXT,
    MAX_LAYERS,
    ONLY_FUNCTIONS,
    PREDICTION,
    ROTARY,
    Keys,
    Shapes,
)

RMS_EPSILON = "attention.layer_norm_rms_epsilon"


def sizes(
    keys: Keys,
    shapes: Shapes,
    *,
    gated: bool = False,
    joined_heads: bool = False,
    joined_up: bool = False,
    epsilon: str = RMS_EPSILON,
) -> dict[str, Any]:
    """Read what most architectures have: `common_sizes`, and heads and networks that are alike in all layers.

    Args:
        keys: the keys.
        shapes: shapes of the tensors.
        gated: whether `attn_q` also has as many rows for a gate of attention's output.
        joined_heads: whether `attn_qkv` has the rows of q, k and v.
        joined_up: whether `ffn_up` also has the gate's rows.
        epsilon: key of the norms' epsilon.

    Raises:
        HyperparameterError: a key is missing, out of range or not what the tensors' shapes say.
        UnsupportedModelError: rotary embeddings cover a part of a head only, or values and keys differ in size.
    """
    values = common_sizes(keys, shapes, epsilon)
    feed_forward = keys.integer("feed_forward_length", 1, 1 << 24)
    rows = matrix(keys, shapes, "blk.0.ffn_up.weight")[0]
    keys.expect("feed_forward_length", feed_forward * (1 + joined_up), rows, "ffn_up's rows")
    heads = head_sizes(keys, shapes, values, gated=gated, joined=joined_heads)
    return {**values, "intermediate_size": feed_forward, **heads}


def head_sizes(
    keys: Keys, shapes: Shapes, values: dict[str, Any], *, gated: bool = False, joined: bool = False
) -> dict[str, Any]:
    """Read number and size of heads of keys and values, alike in all layers, with the errors of `sizes`.

    Args:
        keys: the keys.
        shapes: shapes of the tensors.
        values: what `common_sizes` returned.
        gated: see `sizes`.
        joined: `joined_heads` of `sizes`.
    """
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    kv_heads = keys.integer("attention.head_count_kv", 1, heads, heads)
    if heads % kv_heads:
        raise keys.wrong("attention.head_count_kv", f"expected a divisor of {heads} heads, found {kv_heads}")
    return {
        "num_key_value_heads": kv_heads,
        "head_dim": _head_dim(keys, shapes, hidden, heads, kv_heads, gated=gated, joined=joined),
    }


def mixture_sizes(keys: Keys, shapes: Shapes, together: int | None = None) -> dict[str, Any]:
    """Read the number and size of routed experts that are alike in all layers, with the errors of `sizes`.

    Args:
        keys: the keys.
        shapes: shapes of the tensors.
        together: width of all experts that a token chooses, for files that do not say that of one.
    """
    experts = keys.integer(EXPERTS, 1, 1 << 16)
    keys.expect(EXPERTS, experts, matrix(keys, shapes, "blk.0.ffn_gate_inp.weight")[0], "rows of ffn_gate_inp")
    used = keys.integer(EXPERTS_USED, 1, experts)
    between = keys.integer(EXPERT_WIDTH, 1, 1 << 24, together and max(1, together // used))
    if (down := shapes.get("blk.0.ffn_down_exps.weight")) is not None:
        keys.expect(EXPERT_WIDTH, between, down[-1], "columns of ffn_down_exps")
    return {"num_experts": experts, "num_experts_per_tok": used, "moe_intermediate_size": between}


def common_sizes(keys: Keys, shapes: Shapes, epsilon: str = RMS_EPSILON) -> dict[str, Any]:
    """Read what all architectures have: layers, heads of q, context, epsilon, ids of special tokens, tying.

    Raises:
        HyperparameterError: a key is missing, out of range or not what the tensors' shapes say.
    """
    vocabulary, hidden = matrix(keys, shapes, "token_embd.weight")
    keys.expect(
        "embedding_length", keys.integer("embedding_length", 1, 1 << 24), hidden, "token_embd.weight's rows"
    )
    blocks = keys.integer("block_count", 1, MAX_LAYERS)
    found = {int(match[1]) for name in shapes if (match := re.match(r"blk\.(\d{1,9})\.", name))}
    if found != set(range(blocks)):
        raise keys.wrong("block_count", f"{blocks}, but the tensors are those of {len(found)} layers")
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": blocks - keys.integer(PREDICTION, 0, blocks - 1, 0),
        "num_attention_heads": keys.integer("attention.head_count", 1, 1 << 16),
        "max_position_embeddings": keys.integer(CONTEXT_LENGTH, 1, MAX_CONTEXT),
        "rms_norm_eps": keys.real(epsilon, 0.0, 1.0),
        "tie_word_embeddings": "output.weight" not in shapes,
        **_special_tokens(keys.metadata, vocabulary),
    }


def matrix(keys: Keys, shapes: Shapes, name: str) -> tuple[int, int]:
    """Return the rows and columns of a tensor.

    Raises:
        HyperparameterError: there is no such tensor, or not one of two dimensions.
    """
    shape = shapes.get(name)
    if shape is None or len(shape) != 2:
        found = "none" if shape is None else f"one of shape {shape}"
        raise HyperparameterError(
            f"{keys.metadata.path.parent}: expected a tensor {name} of two dimensions, found {found}",
            "Use a GGUF file that holds the whole model.",
        )
    return shape[0], shape[1]


def _head_dim(
    keys: Keys, shapes: Shapes, hidden: int, heads: int, kv_heads: int, *, gated: bool, joined: bool
) -> int:
    whole = max(1, hidden // heads)
    rotary = keys.integer(ROTARY, 1, 1 << 16, whole)
    head_dim = keys.integer("attention.key_length", 1, 1 << 16, whole if ROTARY in keys.used else rotary)
    # Layers without attention have none of these tensors.
    block = next(
        (name.removesuffix("attn_q.weight") for name in shapes if name.endswith(".attn_q.weight")), "blk.0."
    )
    counts = (
        {"attn_qkv": ("attention.head_count", heads + 2 * kv_heads)}
        if joined
        else {
            "attn_q": ("attention.head_count", heads * (1 + gated)),
            "attn_k": ("attention.head_count_kv", kv_heads),
            "attn_v": ("attention.head_count_kv", kv_heads),
        }
    )
    for name, (key, count) in counts.items():
        rows = matrix(keys, shapes, f"{block}{name}.weight")[0]
        if rows != count * head_dim:
            problem = f"{count} heads of {head_dim} (attention.key_length) are {count * head_dim} rows of {name}"
            raise keys.wrong(key, f"{problem}, found {rows}")
    for key in (
        "attention.value_length",
        "attention.key_length_swa",
        "attention.value_length_swa",
        *(() if ROTARY in keys.used else (ROTARY,)),
        "rope.dimension_count_swa",
    ):
        if key in keys and keys.integer(key, 0, 1 << 16) != head_dim:
            raise UnsupportedModelError(
                f"{keys.metadata.path}: {keys.prefix}.{key} differs from the {head_dim} of a head's keys",
                ONLY_FUNCTIONS,
            )
    if head_dim % 2:
        raise keys.wrong(
            "attention.key_length", f"expected an even number, for rotary embeddings, found {head_dim}"
        )
    return head_dim


def _special_tokens(metadata: Metadata, vocabulary: int) -> dict[str, Any]:
    """Return the ids of special tokens that the model has: BOS, padding, and all that end a text or a turn."""
    found = dict[str, int]()
    for name in ("bos", "padding", *ENDS):
        if (token := metadata.integer(token_id_key(name))) is None:
            continue
        if 0 <= token < vocabulary:  # the tokenizer says what is taken for others
            found[name] = token
    ends = list(dict.fromkeys(found[name] for name in ENDS if name in found))
    return {
        "bos_token_id": found.get("bos"),
        "pad_token_id": found.get("padding"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }


def suppressed_tokens(metadata: Metadata, vocabulary: int) -> list[int]:
    """Return the ids of the model's tokens that must never be chosen, each once.

    Raises:
        BundleError: the key is no array of whole numbers, or of too many, or no token is left.
    """
    named = metadata.integers(SUPPRESSED) or []
    found = sorted({token for token in named if 0 <= token < vocabulary})
    if found and len(found) == vocabulary:
        raise BundleError(f"{metadata.path}: {SUPPRESSED}: all {vocabulary} tokens are named, and none is left")
    return found
