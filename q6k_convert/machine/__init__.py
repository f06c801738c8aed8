"""What this machine can do: the doctor, and building the C++ library of the operations."""

__all__ = ["build_ops", "doctor"]
