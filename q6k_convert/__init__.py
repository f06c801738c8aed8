"""Convert GGUF files to q6k-planar bundles, exactly and at the speed of the disk.

From Python: `convert_gguf` writes a bundle, `open_gguf` reads a GGUF's header and tensor list,
`decode` turns Q6_K blocks into int8 weights and scales. Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = ["__version__", "convert_gguf", "decode", "open_gguf"]

if TYPE_CHECKING:
    from q6k_convert.convert.pipeline import convert as convert_gguf
    from q6k_kernels.formats.blocks import decode
    from q6k_kernels.gguf.model import open_gguf

_HOMES = {
    "convert_gguf": ("q6k_convert.convert.pipeline", "convert"),
    "decode": ("q6k_kernels.formats.blocks", "decode"),
    "open_gguf": ("q6k_kernels.gguf.model", "open_gguf"),
}


def __getattr__(name: str) -> Any:
    """Import a public function on first use, so that `q6k-convert --help` imports no numpy."""
    if name in _HOMES:
        from importlib import import_module

        module, attribute = _HOMES[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
