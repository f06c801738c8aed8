"""The CUDA kernels, each beside the module that launches it, the plans of launches, and the dispatch.

Imports formats and jit; knows no model.
"""

__all__ = ["decode", "decode_plan", "device", "dispatch", "expand", "gemm_mma", "gemm_wgmma", "rows"]
