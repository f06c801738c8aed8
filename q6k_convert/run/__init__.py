"""Run a bundle's model: generate text, export it as a program, check and describe what is to be shipped."""

__all__ = ["export_command", "generate_command", "publishing", "running", "sanity", "shipped_files", "spdx"]
