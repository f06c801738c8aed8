"""The q6k-planar bundle: its bit layout, its file format, and what runs it.

Importing this package imports no torch; the names below do when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from q6k_kernels.models.assemble import load_model
    from q6k_kernels.weights.layers import Q6KEmbedding, Q6KLinear
    from q6k_kernels.weights.reader import Bundle, open_bundle
    from q6k_kernels.weights.weight import PackedWeight, dequantize, embedding, q6k_linear

__all__ = [
    "Bundle",
    "PackedWeight",
    "Q6KEmbedding",
    "Q6KLinear",
    "dequantize",
    "embedding",
    "load_model",
    "open_bundle",
    "q6k_linear",
]

_MODULES = {
    "Bundle": "weights.reader",
    "PackedWeight": "weights.weight",
    "Q6KEmbedding": "weights.layers",
    "Q6KLinear": "weights.layers",
    "dequantize": "weights.weight",
    "embedding": "weights.weight",
    "load_model": "models.assemble",
    "open_bundle": "weights.reader",
    "q6k_linear": "weights.weight",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
