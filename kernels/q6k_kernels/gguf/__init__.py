"""The GGUF reader: bounded bytes, a file, its tensors, a model of one file or more. Imports formats; no torch."""

__all__ = ["file", "model", "tensors"]
