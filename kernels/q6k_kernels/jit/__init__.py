"""Kernels compiled when they are first needed: NVRTC, the cubin cache, the driver, loading. Imports no torch."""

__all__ = ["compiler", "cubin_cache", "driver", "loader", "tensor_map"]
