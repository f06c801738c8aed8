"""Slots of the cache of keys and values, and its size, from a model's hyper-parameters alone. Imports no torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from q6k_kernels.bundle.metadata import Metadata
from q6k_kernels.errors import UnsupportedModelError
from q6k_kernels.models.architecture import described
from q6k_kernels.models.hyperparameters import Shapes
from q6k_kernels.models.registry import architecture_of

SLACK = 64
"""Steps that can be undone: the positions that they overwrote in a ring had left every window."""
ALIGNMENT = 8
"""Multiple that slots are rounded up to: 16 bytes of 16-bit scores, the alignment that fast kernels want."""
FULL, SLIDING = "full_attention", "sliding_attention"
_ELEMENT_BYTES = 2


def aligned(slots: int) -> int:
    """Round up to a multiple of `ALIGNMENT`."""
    return -(-slots // ALIGNMENT) * ALIGNMENT


def ring_slots(window: int, capacity: int) -> int:
    """Return the slots of a layer with a sliding window in a cache of that capacity."""
    return min(aligned(capacity), aligned(window + SLACK))


def layer_kinds(config: Any) -> list[str]:
    """Return the kind of each layer, `FULL` or `SLIDING`.

    Raises:
        UnsupportedModelError: a layer is neither.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = FULL if getattr(config, "sliding_window", None) is None else SLIDING
        kinds = [kind] * config.num_hidden_layers
    if unknown := set(kinds) - {FULL, SLIDING}:
        raise UnsupportedModelError(
            f"the model has layers of kind {', '.join(sorted(unknown))}; known are {FULL} and {SLIDING}",
            "Generate with transformers' own `model.generate`.",
        )
    return list(kinds)


def cache_bytes(metadata: Metadata, shapes: Shapes, capacity: int) -> int:
    """Return the bytes of all keys and values, in 16-bit floats, of a cache for `capacity` positions.

    Raises:
        HyperparameterError: a key is missing, out of range or not what the tensors' shapes say.
        UnsupportedModelError: the model needs something that is not supported.
        BundleError: a key is of the wrong type.
    """
    _, values = described(architecture_of(metadata), metadata, shapes)
    config = SimpleNamespace(**values)
    of_kind = {FULL: aligned(capacity), SLIDING: 0}
    kinds = layer_kinds(config)
    if SLIDING in kinds:
        of_kind[SLIDING] = ring_slots(int(config.sliding_window), capacity)
    slots = sum(of_kind[kind] for kind in kinds)
    return 2 * slots * int(config.num_key_value_heads) * int(config.head_dim) * _ELEMENT_BYTES
