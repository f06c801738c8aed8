"""The bit layouts: weight types, GGML's types and blocks, planes, tiles, and the checks of shapes and dtypes.

Imports no other package of the project; `types`, `ggml`, `blocks` and `planes` import no torch.
"""

__all__ = ["blocks", "checks", "ggml", "planes", "tiles", "types", "words"]
