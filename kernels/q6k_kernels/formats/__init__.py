"""All that knows what a bit means: GGML's types, its blocks, planes, and tiles as kernels read them. Imports no
other room; `ggml`, `blocks` and `planes` import no torch.
"""

__all__ = ["blocks", "checks", "ggml", "planes", "tiles", "types"]
