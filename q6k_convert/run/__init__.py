"""Run a bundle's model: generate text, or export it as a program."""

__all__ = ["export_command", "generate_command", "running"]
