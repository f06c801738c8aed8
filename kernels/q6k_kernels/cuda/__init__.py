"""Each CUDA kernel beside what launches it, the plans that choose a launch, and the dispatch over all of them.
Imports formats and jit; knows no model.
"""

__all__ = ["decode", "decode_plan", "device", "dispatch", "expand", "gemm_mma", "gemm_wgmma", "rows"]
