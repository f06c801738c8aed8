"""Kernels compiled when they are first needed: NVRTC, the cubin cache, the driver, loading. Imports no torch."""
