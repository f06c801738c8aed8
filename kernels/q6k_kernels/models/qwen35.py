"""Qwen 3.5 and 3.6: transformers' qwen3_5_text, and with experts qwen3_5_moe_text.

Most layers are gated delta nets, a form of linear attention: instead of keys and values they have a matrix of fixed
size for each value head, its state. GGUF has the value heads in another order: transformers' head (k, v), the v-th
of those that share key head k, is GGUF's (v, k). Rows of the layer's projections move when they are loaded. The
output projection's inputs cannot, so its activations do.

GGUF stores the weights of norms with 1 added, but for the delta net's own, and −exp(A_log) in place of A_log. Its
convolution has a row of weights for each channel. A block after the last layer, for predicting several tokens at
once, is left out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from q6k_kernels.models.architecture import FULL, LINEAR, Architecture, Values
from q6k_kernels.models.hyperparameters import (
    EXPERTS,
    EXPERTS_USED,
    MAX_LAYERS,
    PREDICTION,
    ROTARY,
    SECTIONS,
    Keys,
    Shapes,
    scaled_rope,
)
from q6k_kernels.models.layer import ExpertsForm, HeadNorms, Rotation
from q6k_kernels.models.sizes import common_sizes, head_sizes, matrix, mixture_sizes, sizes
from q6k_kernels.models.stored import AS_IT_IS, Stored

if TYPE_CHECKING:
    from torch import Tensor

_RECURRENT, _INTERVAL = "attention.recurrent_layers", "full_attention_interval"


def _qwen35(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    del shapes
    return "qwen3_5_text", {
        "rope_parameters": _rope(keys, values["head_dim"]),
        "layer_types": _kinds(keys, values["num_hidden_layers"]),
        **_delta_nets(keys),
    }


def _mixture(keys: Keys, shapes: Shapes, values: Values) -> tuple[str, Values]:
    _, more = _qwen35(keys, shapes, values)
    return "qwen3_5_moe_text", more


def _sizes_of_mixture(keys: Keys, shapes: Shapes) -> Values:
    values = common_sizes(keys, shapes)
    shared = matrix(keys, shapes, "blk.0.ffn_up_shexp.weight")[0]
    stated = keys.integer("expert_shared_feed_forward_length", 1, 1 << 24, shared)
    keys.expect("expert_shared_feed_forward_length", stated, shared, "ffn_up_shexp's rows")
    return {
        **values,
        **head_sizes(keys, shapes, values, gated=True),
        **mixture_sizes(keys, shapes),
        "shared_expert_intermediate_size": shared,
    }


def _rope(keys: Keys, head_dim: int) -> Values:
    """Return the rotary parameters: a part of each head is rotated.

    Sections of the angles are of positions in time, height and width, which are equal in a text.
    """
    rotated = keys.integer(ROTARY, 2, head_dim, head_dim)
    sections = keys.value(SECTIONS)
    if not isinstance(sections, list) or len(sections) < 3:
        raise keys.wrong(SECTIONS, f"expected three or four numbers, found {str(sections)[:80]}")
    return {
        **scaled_rope(keys),
        "partial_rotary_factor": rotated / head_dim,
        "mrope_section": [int(each) for each in sections[:3]],
    }


def _kinds(keys: Keys, layers: int) -> list[str]:
    """Return the kind of each layer: listed, or full attention at the end of each interval."""
    stated = keys.value(_RECURRENT)
    if isinstance(stated, list):
        recurrent = [bool(each) for each in stated][:layers]
        if len(recurrent) != layers:
            raise keys.wrong(_RECURRENT, f"expected a value for each of {layers} layers, found {len(recurrent)}")
    else:
        interval = keys.integer(_INTERVAL, 1, MAX_LAYERS, 4)
        recurrent = [(layer + 1) % interval != 0 for layer in range(layers)]
    return [LINEAR if each else FULL for each in recurrent]


def _delta_nets(keys: Keys) -> Values:
    state, inner = keys.integer("ssm.state_size", 1, 1 << 16), keys.integer("ssm.inner_size", 1, 1 << 24)
    key_heads, value_heads = (keys.integer(f"ssm.{key}", 1, 1 << 16) for key in ("group_count", "time_step_rank"))
    keys.expect("ssm.inner_size", inner, value_heads * state, "ssm.time_step_rank heads of ssm.state_size")
    if value_heads % key_heads:
        raise keys.wrong("ssm.group_count", f"expected a divisor of {value_heads} value heads, found {key_heads}")
    return {
        "linear_conv_kernel_dim": keys.integer("ssm.conv_kernel", 1, 1 << 8),
        "linear_key_head_dim": state,
        "linear_value_head_dim": state,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
    }


def _mixed_rows(config: Any, rows: int) -> Tensor | None:
    """Return the order of rows of q, k and v, of which only those of v move."""
    values = config.linear_num_value_heads * config.linear_value_head_dim
    if (order := _value_rows(config, values)) is None:
        return None
    import torch  # imported here: the size of a cache is told without it

    return torch.cat([torch.arange(rows - values), order + (rows - values)])


def _value_rows(config: Any, rows: int) -> Tensor | None:
    """Return the order of rows that are equally many for each value head."""
    return _heads(rows, config.linear_num_value_heads // config.linear_num_key_heads, config.linear_num_key_heads)


def value_inputs(config: Any, columns: int) -> Tensor | None:
    """Return transformers' input for each input of the output projection in the file, int64 (columns,)."""
    return _heads(
        columns, config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    )


def _heads(rows: int, outer: int, inner: int) -> Tensor | None:
    """Return the rows of heads (outer, inner) in the order (inner, outer); None if that is the same."""
    if outer == 1 or inner == 1:
        return None
    import torch

    return torch.arange(rows).view(outer, inner, -1).transpose(0, 1).reshape(-1)


def _logarithm(values: Tensor) -> Tensor:
    return (-values).log()


_DENSE = Architecture(
    "qwen35",
    _qwen35,
    used=frozenset({PREDICTION, ROTARY, SECTIONS}),
    renamed={"linear_attn.dt_bias": "linear_attn.dt_proj.bias"},
    stored={
        "attn_qkv.weight": Stored(rows=_mixed_rows),
        "attn_gate.weight": Stored(rows=_value_rows),
        "ssm_alpha.weight": Stored(rows=_value_rows),
        "ssm_beta.weight": Stored(rows=_value_rows),
        "ssm_a": Stored(rows=_value_rows, values=_logarithm, wide=True),
        "ssm_dt.bias": Stored(rows=_value_rows, wide=True),
        "ssm_conv1d.weight": Stored(rows=_mixed_rows),
        "ssm_norm.weight": AS_IT_IS,
        "ssm_out.weight": Stored(inputs=value_inputs),
    },
    norm_offset=1.0,
    head_norms=HeadNorms(),
    sizes=partial(sizes, gated=True),
    gated_attention=True,
    rotation=Rotation(axes=3),
)
ROWS = (
    _DENSE,
    replace(
        _DENSE,
        name="qwen35moe",
        describe=_mixture,
        used=_DENSE.used | {EXPERTS, EXPERTS_USED},
        renamed={
            **_DENSE.renamed,
            "mlp.experts.gate_up_proj": "mlp.experts.gate_up_proj.weight",
            "mlp.experts.down_proj": "mlp.experts.down_proj.weight",
        },
        sizes=_sizes_of_mixture,
        experts=ExpertsForm(shared="shared_expert"),
    ),
)
