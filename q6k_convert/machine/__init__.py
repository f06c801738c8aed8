"""Check what this machine can run, and build the C++ library of the operations."""

__all__ = ["build_ops", "doctor"]
