"""Running a bundle's model from the command line: text, and export of a program."""

__all__ = ["export_command", "generate_command"]
