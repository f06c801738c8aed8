"""The commands: parse, call, print. Imports every other room."""

__all__ = ["main"]
