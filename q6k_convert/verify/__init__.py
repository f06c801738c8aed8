"""Verify a bundle: structure, content, source and device; and write the report."""

__all__ = ["device_stage", "report", "source_stage", "stages"]
