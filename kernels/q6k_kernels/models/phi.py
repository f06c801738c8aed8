"""Phi 3, 3.5, 4 and 4-mini: transformers' phi3, with one tensor for q, k and v, and one for gate and up.

Of Phi 4-mini three quarters of each head rotate; models for 128k positions have factors for short and long texts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from q6k_kernels.models.architecture import Architecture, Values
from q6k_kernels.models.hyperparameters import (
    ATTENTION_FACTOR,
    ROTARY,
    WINDOW,
    Keys,
    Shapes,
    original_context,
    rope,
    rotated_part,
    scaled_rope,
)
from q6k_kernels.models.sizes import sizes
from q6k_kernels.models.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor

_SCALING = "rope.scaling.type"


def _phi3(keys: Keys, _: Shapes, values: Values) -> tuple[str, Values]:
    scaled = rope(keys) if keys.string(_SCALING, "none") == "longrope" else scaled_rope(keys)
    # llama.cpp leaves windows of this architecture out. transformers has them, and the models were trained so.
    window = keys.integer(WINDOW, 0, 1 << 31, 0)
    return "phi3", {
        "rope_parameters": scaled | {"partial_rotary_factor": rotated_part(keys, values["head_dim"])},
        "original_max_position_embeddings": original_context(keys),
        "rotary_scale": keys.real(ATTENTION_FACTOR, 0.0, 1e3, 1.0),
        "sliding_window": window if 0 < window < values["max_position_embeddings"] else None,
    }


def _halved(config: Any, rows: int) -> Tensor | None:
    """Return the order of rows of q, k and v; those of v stay."""
    from q6k_kernels.models.rotary import halves, rotated  # imported here: sizes are told without torch

    if (count := rotated(config)) == config.head_dim:
        return None
    import torch

    heads = config.num_attention_heads + config.num_key_value_heads
    moved = torch.arange(heads)[:, None] * config.head_dim + halves(config.head_dim, count)
    return torch.cat([moved.flatten(), torch.arange(moved.numel(), rows)])


_QKV = Stored(rows=_halved)
ROWS = (
    Architecture(
        "phi3",
        _phi3,
        sizes=partial(sizes, joined_heads=True, joined_up=True),
        used=frozenset({WINDOW, ROTARY, ATTENTION_FACTOR}),
        stored={"attn_qkv.weight": _QKV, "attn_qkv.bias": _QKV},
        own_rotary=True,
    ),
)
