"""Slots of the cache of keys and values, states of recurrent layers, and the sizes of both, from a model's
hyper-parameters alone. Imports no torch.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models.architecture import FULL, LINEAR, SLIDING, described
from q6k_kernels.models.hyperparameters import Shapes
from q6k_kernels.models.registry import architecture_of

SLACK = 64
"""Steps that can be undone: the positions that they overwrote in a ring had left every window."""
ALIGNMENT = 8
"""Multiple that slots are rounded up to: 16 bytes of 16-bit scores, the alignment that fast kernels want."""
CHUNK = 2048
"""The most tokens of a prompt in one pass, unless said otherwise."""
SHORT_WINDOW = 1024
"""The longest window of layers that hold the model's numbers where others hold codes: so few keys take little
memory however long a text is, and as codes they would be read no faster."""
STATE_COPIES = 3
"""Earlier states of recurrent layers that are kept beside the current ones: two so that steps can be undone, and
one from near the end of the last prompt."""
_STATE_BYTES = _SCALE_BYTES = 4


def aligned(slots: int) -> int:
    """Round up to a multiple of `ALIGNMENT`."""
    return -(-slots // ALIGNMENT) * ALIGNMENT


def ring_slots(window: int, capacity: int) -> int:
    """Return the slots of a layer with a sliding window in a cache of that capacity."""
    return min(aligned(capacity), aligned(window + SLACK))


def holds_codes(kind: str, window: int) -> bool:
    """Check whether a layer of a kind holds codes in a cache of 8 bits; `window` is that of `SLIDING` layers."""
    return kind != SLIDING or window > SHORT_WINDOW


def slots_beside(start: int, rows: int, window: int) -> int:
    """Return the slots that a chunk of `rows` tokens from `start` sees, side by side; a `window` of 0 is none."""
    return aligned((min(start, window - 1) if window else start) + rows)


def layer_kinds(config: Any) -> list[str]:
    """Return the kind of each layer: `FULL`, `SLIDING` or `LINEAR`.

    Raises:
        UnsupportedModelError: a layer is of another kind, or some layers have windows and some have states.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = FULL if getattr(config, "sliding_window", None) is None else SLIDING
        kinds = [kind] * config.num_hidden_layers
    known = (FULL, SLIDING, LINEAR)
    if unknown := set(kinds) - set(known):
        raise UnsupportedModelError(
            f"the model has layers of kind {', '.join(sorted(unknown))}; known are {', '.join(known)}",
            "Generate with transformers' own `model.generate`.",
        )
    if {SLIDING, LINEAR} <= set(kinds):
        # Undoing steps of states runs more steps again than a ring of keys can undo.
        raise UnsupportedModelError(
            f"the model has layers of both kinds {SLIDING} and {LINEAR}",
            "Generate with transformers' own `model.generate`.",
        )
    return list(kinds)


def state_sizes(config: Any) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Return the shapes of a recurrent layer's states: of its convolution, and of its value heads."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return (2 * keys + values, config.linear_conv_kernel_dim), (
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )


def cache_bytes(
    metadata: Metadata, shapes: Shapes, capacity: int, element_bytes: int = 2, *, codes: bool = False
) -> int:
    """Return the bytes of a cache for `capacity` positions: keys and values, by default of 16 bits, and states.

    With `codes` keys and values are codes of 8 bits, with a scale for each head and token, where `holds_codes`.

    Raises:
        HyperparameterError: a key is missing, out of range or not what the tensors' shapes say.
        UnsupportedModelError: the model needs something that is not supported.
        BundleError: a key is of the wrong type.
    """
    config, kinds, heads, window = _attention(metadata, shapes)

    def of_position(kind: str) -> int:
        count, dim = heads[kind]
        return 2 * count * (dim + _SCALE_BYTES if codes and holds_codes(kind, window) else dim * element_bytes)

    of_kind = {
        FULL: aligned(capacity) * of_position(FULL),
        SLIDING: ring_slots(window, capacity) * of_position(SLIDING),
    }
    if LINEAR in kinds:
        convolution, state = state_sizes(config)
        both = math.prod(convolution) * element_bytes + math.prod(state) * _STATE_BYTES
        of_kind[LINEAR] = (1 + STATE_COPIES) * both
    return sum(of_kind[kind] for kind in kinds)


def prompt_bytes(metadata: Metadata, shapes: Shapes, capacity: int, element_bytes: int = 2) -> int:
    """Return the bytes that a prompt's chunks take beside a cache of codes on a GPU, at most `CHUNK` tokens each.

    They are the keys and values of one layer, expanded. Raises what `cache_bytes` does.
    """
    _, kinds, heads, window = _attention(metadata, shapes)
    rows, found = min(CHUNK, capacity), 0
    for kind in {*kinds} - {LINEAR}:
        if holds_codes(kind, window):
            slots = slots_beside(capacity - rows, rows, window if kind == SLIDING else 0)
            found = max(found, 2 * math.prod(heads[kind]) * slots * element_bytes)
    return found


def _attention(metadata: Metadata, shapes: Shapes) -> tuple[Any, list[str], dict[str, tuple[int, int]], int]:
    """Return the configuration, the kind of each layer with a cache, by kind heads and their size, the window."""
    _, values = described(architecture_of(metadata), metadata, shapes)
    config = SimpleNamespace(**values)
    # Layers that share keys and values of earlier ones are the last.
    kinds = layer_kinds(config)[: config.num_hidden_layers - values.get("num_kv_shared_layers", 0)]
    heads = dict.fromkeys((FULL, SLIDING), (int(config.num_key_value_heads), int(config.head_dim)))
    if "global_head_dim" in values:
        heads[FULL] = int(config.num_global_key_value_heads), int(config.global_head_dim)
    return config, kinds, heads, int(config.sliding_window) if SLIDING in kinds else 0
