"""The q6k-planar bundle: its bit layout, its file format, and what runs it.

Importing this package imports no torch; the names below do when they are first used. Once it is imported,
transformers' `from_pretrained` opens bundles (see `plugin`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from q6k_kernels import plugin

if TYPE_CHECKING:
    from q6k_kernels.models.assemble import load_model
    from q6k_kernels.weights.layers import PackedEmbedding, PackedLinear
    from q6k_kernels.weights.reader import Bundle, open_bundle
    from q6k_kernels.weights.weight import PackedWeight, dequantize, embedding, linear

__all__ = [
    "Bundle",
    "PackedEmbedding",
    "PackedLinear",
    "PackedWeight",
    "dequantize",
    "embedding",
    "linear",
    "load_model",
    "open_bundle",
]

_MODULES = {
    "Bundle": "weights.reader",
    "PackedWeight": "weights.weight",
    "PackedEmbedding": "weights.layers",
    "PackedLinear": "weights.layers",
    "dequantize": "weights.weight",
    "embedding": "weights.weight",
    "load_model": "models.assemble",
    "open_bundle": "weights.reader",
    "linear": "weights.weight",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # so that the next access finds it
    return value


plugin.watch()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
