"""Whole models: the architectures, their hyper-parameters, and transformers models filled with packed weights.
Imports `weights` and everything below.
"""

__all__ = [
    "adapters",
    "architecture",
    "assemble",
    "cache_layout",
    "cpu_form",
    "delta_net",
    "fusing",
    "hub_files",
    "layer",
    "mixtures",
    "quantizer",
    "ranks",
    "registry",
    "rotary",
]
