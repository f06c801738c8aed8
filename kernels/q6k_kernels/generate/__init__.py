"""Text generation: prefill and decode, the decoding step in plain torch and in CUDA, cache, recording, sampling.
Imports `models` and everything below.
"""

__all__ = ["attend_cuda", "attention", "filters", "generator", "kv_cache", "likelihoods", "step_cuda"]
