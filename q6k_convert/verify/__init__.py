"""Verify a bundle: structure, content, source and device; and write the report."""

__all__ = ["comparison", "device_stage", "report", "source_stage", "stages"]
