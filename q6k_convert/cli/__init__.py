"""Command line: parse, call, print. Imports every other package of q6k_convert."""

__all__ = ["main", "reporting"]
