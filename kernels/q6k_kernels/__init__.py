"""The q6k-planar bundle: its bit layout, its file format, and what runs it.

Importing this package imports no torch; the names below do when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from q6k_kernels.linear import Q6KEmbedding, Q6KLinear
    from q6k_kernels.model import load_model
    from q6k_kernels.reader import Bundle, open_bundle
    from q6k_kernels.weight import PackedWeight, dequantize, embedding, q6k_linear

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
    "Bundle": "reader",
    "PackedWeight": "weight",
    "Q6KEmbedding": "linear",
    "Q6KLinear": "linear",
    "dequantize": "weight",
    "embedding": "weight",
    "load_model": "model",
    "open_bundle": "reader",
    "q6k_linear": "weight",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
