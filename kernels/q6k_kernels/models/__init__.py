"""Whole models: what each architecture is, its hyper-parameters, and how a transformers model is filled with
packed weights. Imports weights and everything below.
"""

__all__ = ["architecture", "assemble", "fusing", "registry"]
