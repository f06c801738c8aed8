"""Text generation: prefill and decode, steps and chunks in plain torch and in CUDA, cache, recording, sampling.
Imports `models` and everything below.
"""

__all__ = [
    "attend_cuda",
    "attention",
    "checking",
    "chunk_cuda",
    "filters",
    "generator",
    "kv_cache",
    "likelihoods",
    "persist_cuda",
    "reading",
    "step_cuda",
    "texts",
    "texts_cuda",
]
