"""The CUDA kernels, each beside the module that launches it, the plans of launches, and the dispatch.

Imports formats and jit; knows no model.
"""

__all__ = [
    "decode",
    "decode_plan",
    "device",
    "dispatch",
    "expand",
    "experts_decode",
    "experts_dispatch",
    "experts_gemm",
    "gemm_mma",
    "gemm_wgmma",
    "rows",
]
